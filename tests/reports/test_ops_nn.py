"""Faults in the attention matrix and the attention modules."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from headscope import (
    AttentionMatrix,
    KVCache,
    MultiHeadAttention,
    Transformer,
    TransformerConfig,
    masks,
    positions,
    record,
    reductions,
)
from tests.options import unchecked


def test_answer_that_depends_on_what_was_asked_before() -> None:
    """The kernel's log-sum-exp, one float32 per row, stayed after `P @ v`: rows summed to 1 ± 4e-3."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    q[..., 8], k[..., 8] = 316.0, -316.0
    first, after_product = AttentionMatrix(q, k, scale=1.0), AttentionMatrix(q, k, scale=1.0)
    after_product @ v
    exact = AttentionMatrix(q.double(), k.double(), scale=1.0).dense().float()
    for P in (first, after_product):
        torch.testing.assert_close(P.dense(), exact, atol=1e-6, rtol=0)
        torch.testing.assert_close(P.dense().sum(-1), torch.ones(1, 2, 64), atol=1e-6, rtol=0)


def test_map_used_without_its_module() -> None:
    """`in_proj.weight` was sliced in cross-attention and in `.matrix()`: an adapter had no effect there."""
    torch.manual_seed(0)
    layer, x, source = MultiHeadAttention(12, 3), torch.randn(2, 5, 12), torch.randn(2, 7, 12)
    calls = (
        lambda: layer(x, source),
        lambda: layer(same := x + 1, same, x),
        lambda: layer.matrix(x).dense(),
    )
    for call in calls:
        used: list[torch.Tensor] = []
        before = call()
        hook = layer.in_proj.register_forward_hook(lambda *args, used=used: used.append(args[2]) or 2 * args[2])
        after = call()
        hook.remove()
        assert used
        assert (after - before).abs().max() > 1e-3


def test_weights_loaded_into_a_pruned_map() -> None:
    """`load_weights` wrote into a tensor that the pruned map does not use; `weights_as` gave the names of pruning."""
    layer, other = MultiHeadAttention(12, 3), MultiHeadAttention(12, 3)
    for name in ("in_proj", "out_proj"):
        prune.identity(getattr(layer, name), "weight")
    layer.load_weights(other.weights_as("linears"))
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), other(x))
    assert sorted(layer.weights_as("linears")) == sorted(other.weights_as("linears"))


def test_module_of_norms_after_to_empty() -> None:
    """reset_parameters() left the norms of queries and keys as to_empty() makes them."""
    with torch.device("meta"):
        layer = MultiHeadAttention(12, 3, qk_norm=True)
    layer = layer.to_empty(device="cpu")
    for norm in (layer.q_norm, layer.k_norm):
        assert norm is not None
        norm.weight.data.fill_(torch.nan)
    layer.reset_parameters()
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())


def test_batch_of_zero() -> None:
    """It was refused; torch gives an empty output."""
    x = torch.zeros(0, 4, 12)
    assert MultiHeadAttention(12, 3)(x, mask=masks.causal()).shape == x.shape


def test_sizes_in_the_wrong_order() -> None:
    """`MultiHeadAttention(8, 512)` said "both are at least 1"."""
    with pytest.raises(ValueError, match=r"were they swapped\? MultiHeadAttention\(512, 8\)"):
        MultiHeadAttention(8, 512)


def test_lengths_as_a_list() -> None:
    """`generate(lengths=[2, 4])`: list has no attribute shape."""
    model = Transformer(TransformerConfig(9, "decoder", 8, 2, num_layers=1, ff_dim=8)).eval()
    assert model.generate(torch.ones(2, 4, dtype=torch.long), max_new_tokens=1, lengths=[2, 4]).shape == (2, 5)


def test_frozen_module_that_came_out_trainable() -> None:
    """from_torch() of a frozen module gave one that is trained."""
    theirs = nn.MultiheadAttention(12, 3).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in MultiHeadAttention.from_torch(theirs).parameters())


def test_cache_that_cannot_be_pickled() -> None:
    """A cache held a weak reference."""
    layer, cache, x = MultiHeadAttention(12, 3), KVCache(8), torch.randn(1, 4, 12)
    with torch.no_grad():
        layer(x, cache=cache)
        assert torch.equal(layer(x, cache=pickle.loads(pickle.dumps(cache))), layer(x, cache=cache))


def test_mask_of_texts_read_as_a_mask_of_queries() -> None:
    """A [B, S] mask was read as [L, S] where the batch was as large as the text was long."""
    layer, x, is_text = MultiHeadAttention(12, 3), torch.randn(4, 4, 12), torch.ones(4, 4, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"masks\.keep\(mask\)"):
        layer(x, mask=is_text)
    torch.testing.assert_close(layer(x, mask=masks.keep(is_text)), layer(x, mask=masks.padding([1, 2, 3, 4])))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore:Converting a tensor")
def test_traced_module() -> None:
    """torch.jit.trace ended in "enable_gqa must be bool"."""
    layer, x = MultiHeadAttention(12, 3).eval(), torch.randn(2, 5, 12)
    with unchecked():
        traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x), layer(x))


def test_first_guesses() -> None:
    """`KVCache()`, `reduce={"e": Entropy()}` and `positions.alibi()` ended in a TypeError of Python."""
    layer, x = MultiHeadAttention(12, 3), torch.randn(1, 4, 12)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, cache=KVCache()), layer(x))
        P = layer.matrix(x)
        torch.testing.assert_close(P.reduce({"e": reductions.Entropy()})["e"], P.entropy())
    with pytest.raises(ValueError, match=r"write positions\.alibi\(positions\.alibi_slopes\(num_heads\)\)"):
        positions.alibi()


def test_recorded_batch_of_zero() -> None:
    """A batch of 0 under record() was a division by zero."""
    layer, x = MultiHeadAttention(12, 3), torch.zeros(0, 4, 12)
    with torch.no_grad(), record(layer) as recording:
        layer(x)
    assert recording[0].dense().shape == (0, 3, 4, 4)
