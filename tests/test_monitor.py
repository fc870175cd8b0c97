"""monitor(): what it says against the dense maps, that it changes nothing, and the heads that its warnings name."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headscope import HeadWarning, MultiHeadAttention, Transformer, TransformerConfig, masks, monitor
from headscope.errors import HeadscopeError, NothingSeen
from headscope.monitor import HeadStats
from tests.options import unchecked
from tests.tiny import ids, llama

B, L, E, H = 2, 7, 12, 3


class Own(nn.Module):
    """Two layers with a causal mask."""

    def __init__(self, dropout_p: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MultiHeadAttention(E, H, dropout_p=dropout_p) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, mask=masks.causal())
        return x


def own(dropout_p: float = 0.0) -> Own:
    torch.manual_seed(0)
    return Own(dropout_p)


def heads_of(weight: Tensor, head: int, size: int = E // H) -> Tensor:
    """The rows of a head's queries in the packed map."""
    return weight.data[head * size : (head + 1) * size]


def look(model: nn.Module, *inputs: Tensor) -> HeadStats:
    watch = monitor(model, every=1)
    with watch:
        model(*inputs)
    return watch.history[-1]


def test_each_number_is_its_definition() -> None:
    model, x = own(), torch.randn(B, L, E)
    stats, inside = look(model, x), x
    for i, layer in enumerate(model.layers):
        dense = layer.matrix(inside, mask=masks.causal()).dense().double()
        rows = dense[:, :, 1:]
        entropy = -torch.xlogy(rows, rows).sum(-1)
        torch.testing.assert_close(stats.entropy[i], entropy.mean((0, 2)), atol=1e-6, rtol=1e-5)
        even = sum(math.log(n) for n in range(2, L + 1)) * B
        torch.testing.assert_close(stats.entropy_share[i], entropy.sum((0, 2)) / even, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stats.sink_mass[i], rows[..., 0].mean((0, 2)), atol=1e-6, rtol=1e-5)
        q, k = layer._queries(inside), layer._keys(inside)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(E // H)).tril() + torch.full((L, L), -torch.inf).triu(1)
        torch.testing.assert_close(stats.largest_logit[i], scores.amax((0, 2, 3)).double(), atol=1e-5, rtol=1e-5)
        inside = inside + layer(inside, mask=masks.causal())
    assert stats.sites == ("layers.0", "layers.1")
    assert not stats.dead.any()


def test_hand_built_heads() -> None:
    """Head 0 looks evenly; head 1 at the key with the largest first number, which stands first; head 2 is dead."""
    layer = MultiHeadAttention(E, H)
    nn.init.zeros_(layer.in_proj.weight)
    with torch.no_grad():
        layer.in_proj.bias[4] = 40.0  # head 1's query
        layer.in_proj.weight[E + 4, 0] = 10.0  # meets head 1's key
        nn.init.normal_(layer.in_proj.weight[2 * E : 2 * E + 8])
    x = torch.randn(B, L, E)
    x[:, :, 0] = 0
    x[:, 0, 0] = 1
    stats = look(layer, x)
    torch.testing.assert_close(stats.entropy_share[0, 0], torch.tensor(1.0).double())
    torch.testing.assert_close(stats.sink_mass[0, 0], torch.tensor(1 / L).double())
    torch.testing.assert_close(stats.largest_logit[0], torch.tensor([0.0, 200.0, 0.0]).double())
    assert stats.entropy[0, 1] < 1e-6
    assert stats.sink_mass[0, 1] > 0.999
    assert stats.dead.tolist() == [[False, False, True]]


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "headscope": lambda: (own(), torch.randn(B, L, E)),
    "dropout": lambda: (own(0.3), torch.randn(B, L, E)),
    "torch.nn": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 20, dropout=0.1, batch_first=True), 2),
        torch.randn(B, L, E),
    ),
    "transformers": lambda: (llama(), ids(B, L)),
}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_and_every_head_is_seen(name: str) -> None:
    def run(watched: bool) -> tuple[Tensor, list[Tensor], Tensor, int]:
        torch.manual_seed(1)
        model, x = MODELS[name]()
        model.train()
        watch = monitor(model, every=1 if watched else 10**9)
        watch.step = 0 if watched else 1
        with watch:
            out = model(x)
            out = out if isinstance(out, Tensor) else out.logits
            out.square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return out, gradients, torch.get_rng_state(), len(watch.table())

    (out, gradients, state, rows), (alone, wanted, before, none) = run(True), run(False)
    assert torch.equal(out, alone)
    assert len(gradients) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    assert torch.equal(state, before)
    assert none == 0
    assert rows >= 2 * H


def test_it_looks_every_so_many_steps() -> None:
    model, x, told = own(), torch.randn(B, L, E), []
    watch = monitor(model, every=3, log=lambda name, value, step: told.append((name, value, step)))
    for _ in range(8):
        with watch:
            model(x)
    assert [stats.step for stats in watch.history] == [0, 3, 6]
    assert len(told) == 3 * 2 * H * 4
    name, value, step = told[0]
    assert (name, step) == ("heads/0.0/entropy", 0)
    assert value == pytest.approx(float(watch.history[0].entropy[0, 0]))


def test_forwards_inside_one_step_count_together() -> None:
    model, x = own(), torch.randn(2 * B, L, E)
    watch = monitor(model, every=1)
    with watch:
        model(x[:B])
        model(x[B:])
    whole = look(model, x)
    for name in ("entropy", "entropy_share", "largest_logit", "sink_mass"):
        torch.testing.assert_close(getattr(watch.history[0], name), getattr(whole, name), atol=1e-6, rtol=1e-5)
    assert len(watch.history) == 1


def test_padding_is_left_out() -> None:
    model, text = llama(), ids(1, L)
    alone = look(model, text)
    for side, first in (("right", 0), ("left", 3)):
        padded = torch.cat([text, text[:, :3]] if side == "right" else [text[:, :3], text], 1)
        seen = torch.zeros_like(padded)
        seen[:, first : first + L] = 1
        watch = monitor(model, every=1)
        with watch:
            model(padded, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
        torch.testing.assert_close(watch.history[0].entropy, alone.entropy, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(watch.history[0].sink_mass, alone.sink_mass, atol=1e-5, rtol=1e-4)


def test_layers_with_fewer_heads_and_both_sides() -> None:
    sizes = {"embed_dim": 24, "num_heads": 6, "num_layers": 1, "ff_dim": 16, "dropout_p": 0.1}
    model = Transformer(TransformerConfig(31, **sizes))
    model.decoder.layers[0].cross_attention = MultiHeadAttention(24, 2)
    stats = look(model, torch.randint(31, (B, L)), torch.randint(31, (B, 5)))
    assert stats.sites == tuple(
        f"{name}_attention" for name in ("encoder.layers.0.self", "decoder.layers.0.self", "decoder.layers.0.cross")
    )
    assert stats.entropy.shape == (3, 6)
    assert stats.entropy[2].isnan().tolist() == [False] * 2 + [True] * 4


def test_exploding_logits_name_the_head_once() -> None:
    model, x = own(), torch.randn(B, L, E)
    watch = monitor(model, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch:
            model(x)
    heads_of(model.layers[1].in_proj.weight, 2).mul_(3000)
    with pytest.warns(HeadWarning, match=r"head 1\.2 \(layers\.1\) at step 1: its largest logit is .* above 100"):  # noqa: SIM117
        with watch:
            model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch:
            model(x)
    heads_of(model.layers[1].in_proj.weight, 2).div_(3000)
    with watch:
        model(x)
    heads_of(model.layers[1].in_proj.weight, 2).mul_(3000)
    with pytest.warns(HeadWarning, match=r"head 1\.2 .* at step 4"), watch:
        model(x)


def test_collapsing_entropy_names_the_head() -> None:
    layer, x = MultiHeadAttention(E, H), torch.randn(B, L, E)
    watch = monitor(layer, every=1, logit_limit=math.inf)
    with watch:
        layer(x)
    heads_of(layer.in_proj.weight, 1).mul_(1e4)
    with pytest.warns(HeadWarning, match=r"head 0\.1 .*: its entropy fell from \d+\.\d% to 0\.\d%"), watch:
        layer(x)


def test_a_head_that_comes_to_rest_on_the_first_key_is_no_collapse() -> None:
    layer, x = MultiHeadAttention(E, H), torch.randn(B, L, E)
    x[:, 0] = 0
    x[:, 0, 0] = 30
    watch = monitor(layer, every=1, logit_limit=math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch:
            layer(x)
        with torch.no_grad():
            layer.in_proj.weight[4:8], layer.in_proj.bias[4:8] = 0, 0
            layer.in_proj.bias[4], layer.in_proj.weight[E + 4] = 50.0, 0.0
            layer.in_proj.weight[E + 4, 0] = 5.0
        with watch:
            layer(x)
    assert watch.history[1].entropy_share[0, 1] < 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_no_longer_finite_are_a_warning_not_a_crash(value: float) -> None:
    model, x = own(), torch.randn(B, L, E)
    heads_of(model.layers[1].in_proj.weight, 0)[0, 0] = value
    watch = monitor(model, every=1)
    with pytest.warns(HeadWarning, match=r"head 1\.0 .*NaN or infinite"), watch:
        model(x)


def test_nothing_is_left_after_an_error() -> None:
    model, x = own(), torch.randn(B, L, E)
    watch = monitor(model, every=1)

    def fail() -> None:
        with watch:
            model(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert watch.history == []
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with watch:
        model(x)
    assert [stats.step for stats in watch.history] == [1]


def test_errors() -> None:
    model, x = own(), torch.randn(B, L, E)
    watch = monitor(model, every=1)
    with pytest.raises(HeadscopeError, match="watching already: one `with` at a time"), watch, watch:
        model(x)
    with pytest.raises(NothingSeen, match="no attention was seen inside the `with`"), watch:
        pass
    with unchecked(), pytest.raises(ValueError, match="every is 0: a look at least at every step"):
        monitor(model, every=0)
