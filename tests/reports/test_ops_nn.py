"""Faults in the attention matrix and the attention modules."""

import torch
from torch.nn.utils import prune

from headscope import AttentionMatrix, MultiHeadAttention


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
