"""monitor(): what it says against the dense maps, that it changes nothing, and the heads that its warnings name."""

import inspect
import linecache
import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headscope import HeadWarning, MultiHeadAttention, Transformer, TransformerConfig, masks, monitor, record
from headscope.errors import HeadscopeError, NothingSeen
from headscope.watching.monitoring import HeadStats, Monitor
from tests.options import unchecked
from tests.tiny import bart, ids, llama

# A run that is made to go wrong warns more than once; each test says which warning it wants.
pytestmark = pytest.mark.filterwarnings("ignore::headscope.watching.monitoring.HeadWarning")

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


def measured(model: nn.Module, *inputs: Tensor) -> HeadStats:
    watch = monitor(model, every=1)
    with watch:
        model(*inputs)
    return watch.history[-1]


def test_head_stats_follow_their_definitions() -> None:
    model, x = own(), torch.randn(B, L, E)
    stats, inside = measured(model, x), x
    for i, layer in enumerate(model.layers):
        dense = layer.matrix(inside, mask=masks.causal()).dense().double()
        rows = dense[:, :, 1:]
        entropy = -torch.xlogy(rows, rows).sum(-1)
        torch.testing.assert_close(stats.entropy[i], entropy.mean((0, 2)), atol=1e-6, rtol=1e-5)
        uniform = sum(math.log(n) for n in range(2, L + 1)) * B
        torch.testing.assert_close(stats.entropy_share[i], entropy.sum((0, 2)) / uniform, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stats.sink_mass[i], rows[..., 0].mean((0, 2)), atol=1e-6, rtol=1e-5)
        q, k = layer._project(inside, inside)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(E // H)).tril() + torch.full((L, L), -torch.inf).triu(1)
        torch.testing.assert_close(stats.largest_logit[i], scores.amax((0, 2, 3)).double(), atol=1e-5, rtol=1e-5)
        inside = inside + layer(inside, mask=masks.causal())
    assert stats.sites == ("layers.0", "layers.1")
    assert not stats.dead.any()


def test_head_stats_of_hand_built_heads() -> None:
    """Head 0 is uniform; head 1 attends to the key with the largest first number, the first; head 2 is dead."""
    layer = MultiHeadAttention(E, H)
    nn.init.zeros_(layer.in_proj.weight)
    with torch.no_grad():
        layer.in_proj.bias[4] = 40.0  # head 1's query
        layer.in_proj.weight[E + 4, 0] = 10.0  # meets head 1's key
        nn.init.normal_(layer.in_proj.weight[2 * E : 2 * E + 8])
    x = torch.randn(B, L, E)
    x[:, :, 0] = 0
    x[:, 0, 0] = 1
    stats = measured(layer, x)
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
def test_monitor_changes_nothing_and_lists_every_head(name: str) -> None:
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


def test_monitor_measures_every_third_step() -> None:
    model, x, logged = own(), torch.randn(B, L, E), []
    watch = monitor(model, every=3, log=lambda name, value, step: logged.append((name, value, step)))
    for _ in range(8):
        with watch:
            model(x)
    assert [stats.step for stats in watch.history] == [0, 3, 6]
    assert len(logged) == 3 * 2 * H * 4
    name, value, step = logged[0]
    assert (name, step) == ("heads/0.0/entropy", 0)
    assert value == pytest.approx(float(watch.history[0].entropy[0, 0]))


def test_forwards_inside_one_step_are_added_up() -> None:
    model, x = own(), torch.randn(2 * B, L, E)
    watch = monitor(model, every=1)
    with watch:
        model(x[:B])
        model(x[B:])
    whole = measured(model, x)
    for name in ("entropy", "entropy_share", "largest_logit", "sink_mass"):
        torch.testing.assert_close(getattr(watch.history[0], name), getattr(whole, name), atol=1e-6, rtol=1e-5)
    assert len(watch.history) == 1


def test_monitor_leaves_out_padding() -> None:
    model, text = llama(), ids(1, L)
    alone = measured(model, text)
    for side, first in (("right", 0), ("left", 3)):
        padded = torch.cat([text, text[:, :3]] if side == "right" else [text[:, :3], text], 1)
        seen = torch.zeros_like(padded)
        seen[:, first : first + L] = 1
        watch = monitor(model, every=1)
        with watch:
            model(padded, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0))
        torch.testing.assert_close(watch.history[0].entropy, alone.entropy, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(watch.history[0].sink_mass, alone.sink_mass, atol=1e-5, rtol=1e-4)


def test_head_stats_have_rows_for_encoder_decoder_and_cross_attention() -> None:
    sizes = {"embed_dim": 24, "num_heads": 6, "num_layers": 1, "ff_dim": 16, "dropout_p": 0.1}
    model = Transformer(TransformerConfig(31, **sizes))
    model.decoder.layers[0].cross_attention = MultiHeadAttention(24, 2)
    stats = measured(model, torch.randint(31, (B, L)), torch.randint(31, (B, 5)))
    assert stats.sites == tuple(
        f"{name}_attention" for name in ("encoder.layers.0.self", "decoder.layers.0.self", "decoder.layers.0.cross")
    )
    assert stats.entropy.shape == (3, 6)
    assert stats.entropy[2].isnan().tolist() == [False] * 2 + [True] * 4


def test_warning_of_exploding_logits_names_the_head_once() -> None:
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


def test_warning_of_collapsing_entropy_names_the_head() -> None:
    layer, x = MultiHeadAttention(E, H), torch.randn(B, L, E)
    watch = monitor(layer, every=1, logit_limit=math.inf)
    with watch:
        layer(x)
    heads_of(layer.in_proj.weight, 1).mul_(1e4)
    with pytest.warns(HeadWarning, match=r"head 0\.1 .*: its entropy fell from \d+\.\d % to 0\.\d %"), watch:
        layer(x)


def test_warning_is_not_given_for_a_sink_on_the_first_key() -> None:
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


def test_monitor_leaves_nothing_behind_after_an_error() -> None:
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


def test_monitor_errors_say_what_to_do() -> None:
    model, x = own(), torch.randn(B, L, E)
    watch = monitor(model, every=1)
    with pytest.raises(HeadscopeError, match="watching already: one `with` at a time"), watch, watch:
        model(x)
    with pytest.raises(NothingSeen, match="no attention was seen inside the `with`"), watch:
        pass
    with unchecked(), pytest.raises(ValueError, match="every is 0: wanted a number of steps from 1"):
        monitor(model, every=0)


def quiet(model: nn.Module, *inputs: Tensor) -> HeadStats:
    """A measurement without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", HeadWarning)
        return measured(model, *inputs)


class Sdpa(nn.Module):
    """Torch's own function with uniform weights over what a mask shows."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask, self.packed = mask, nn.Linear(E, 3 * E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in self.packed(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q * 0, k, v, attn_mask=self.mask)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min, -65504.0, -1e4])
def test_keys_hidden_by_an_additive_mask_are_not_counted(hidden: float) -> None:
    mask = torch.full((L, L), hidden).triu(1) + 1e-5 * torch.arange(L)
    stats = quiet(Sdpa(mask), torch.randn(B, L, E))
    torch.testing.assert_close(stats.entropy_share, torch.ones(1, H).double(), atol=1e-6, rtol=0)
    uniform = sum(1 / n for n in range(2, L + 1)) / (L - 1)
    torch.testing.assert_close(stats.sink_mass, torch.full((1, H), uniform).double(), atol=1e-5, rtol=0)


def test_sink_mass_counts_the_first_key_of_the_text_in_a_window() -> None:
    class Windowed(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x, mask=masks.sliding_window(2))

    model, x = Windowed(), torch.randn(B, L, E)
    dense = model.layers[0].matrix(x, mask=masks.sliding_window(2)).dense().double()
    torch.testing.assert_close(quiet(model, x).sink_mass[0], dense[:, :, 1:, 0].mean((0, 2)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_monitor_leaves_out_padding_of_torch_nn(side: str) -> None:
    layer, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(1, L, E)
    blank = torch.full((1, 4, E), 9.0)
    padded = torch.cat([x, blank] if side == "right" else [blank, x], 1)
    hidden = (padded == 9).all(-1)
    alone, watch = quiet(layer, x, x, x), monitor(layer, every=1)
    with watch:
        layer(padded, padded, padded, key_padding_mask=hidden)
    for name in ("entropy", "entropy_share", "largest_logit", "sink_mass"):
        torch.testing.assert_close(getattr(watch.history[0], name), getattr(alone, name), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [6, 9])
def test_padding_of_the_source_leaves_all_rows_of_the_target(length: int) -> None:
    model, source, target = bart(), ids(B, 9), ids(B, length)
    shown = torch.ones_like(source)
    shown[:, 5:] = 0
    inputs = {"input_ids": source, "attention_mask": shown, "decoder_input_ids": target}
    watch = monitor(model, every=1)
    with watch, torch.no_grad():
        model(**inputs)
    with record(model) as recording, torch.no_grad():
        model(**inputs)
    rows = {"self_attn": slice(1, None), "encoder_attn": slice(None)}
    decoder = [i for i, site in enumerate(recording.sites) if "decoder" in site.name]
    assert len(decoder) == 4
    for i in decoder:
        wanted = recording[i].entropy()[:, :, rows[recording.sites[i].name.split(".")[-1]]].mean((0, 2))
        torch.testing.assert_close(watch.history[0].entropy[i], wanted.double(), atol=1e-6, rtol=1e-5)


class Across(nn.Module):
    """A target that attends to a source as long as itself, the second half of which is padding."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = MultiHeadAttention(E, H) if name == "headscope" else nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        half = torch.arange(L) < L // 2
        if isinstance(self.layer, MultiHeadAttention):
            return self.layer(x, source, mask=masks.dense(half.expand(L, L)))
        return self.layer(x, source, source, key_padding_mask=~half.expand(len(x), -1))[0]


@pytest.mark.parametrize("name", ["headscope", "torch.nn"])
def test_padded_source_as_long_as_the_target_leaves_all_rows(name: str) -> None:
    torch.manual_seed(0)
    model, x, source = Across(name), torch.randn(B, L, E), torch.randn(B, L, E)
    stats = quiet(model, x, source)
    with record(model) as recording, torch.no_grad():
        model(x, source)
    torch.testing.assert_close(stats.entropy[0], recording[0].entropy().mean((0, 2)).double(), atol=1e-6, rtol=1e-5)


def test_self_attention_may_have_other_values() -> None:
    layer, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, L, E)
    hidden = torch.arange(L).expand(B, -1) > 4
    watch = monitor(layer, every=1)
    with watch:
        layer(x, x, torch.randn(B, L, E), key_padding_mask=hidden)
    short = quiet(layer, x[:, :5], x[:, :5], x[:, :5])
    torch.testing.assert_close(watch.history[0].entropy, short.entropy, atol=1e-6, rtol=1e-5)


def test_table_log_and_warnings_have_only_heads_that_exist() -> None:
    model, logged = own(), []
    model.layers[1] = MultiHeadAttention(E, 2)
    watch = monitor(model, every=1, log=lambda name, value, step: logged.append(name))
    with warnings.catch_warnings(), watch:
        warnings.simplefilter("error")
        model(torch.randn(B, L, E))
    listed = [(row["layer"], row["head"]) for row in watch.table()]
    assert listed == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert {name.split("/")[1] for name in logged} == {f"{layer}.{head}" for layer, head in listed}
    assert watch.history[0].num_heads == (3, 2)


def test_text_of_one_token_has_no_entropy_and_no_warning() -> None:
    stats = quiet(own(), torch.randn(B, 1, E))
    assert stats.entropy.isnan().all()
    assert stats.sink_mass.isnan().all()
    assert stats.largest_logit.isfinite().all()
    assert stats.finite.all()


def test_call_without_visible_keys_gives_nan_and_no_warning() -> None:
    class Blind(Own):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x, mask=~masks.prefix(L))

    stats = quiet(Blind(), torch.randn(B, L, E))
    assert stats.largest_logit.isnan().all()
    assert not stats.dead.any()
    assert stats.finite.all()


@pytest.mark.parametrize(("share", "dead"), [(2e-3, False), (5e-4, True)])
def test_dead_is_below_a_thousandth_of_the_median_head(share: float, dead: bool) -> None:
    layer, x = MultiHeadAttention(E, H), torch.randn(1, L, E)
    values = layer.in_proj.weight.data[2 * E :]
    with torch.no_grad():
        values[8:] = values[4:8] = values[:4]  # all heads have the same values
        layer.in_proj.weight.data[: 2 * E] = 0  # and uniform weights
        values[4:8] *= share
    hidden = torch.cat([x, 1e6 * torch.randn(1, 3, E)], 1)
    watch = monitor(layer, every=1)
    with watch:
        layer(hidden, mask=masks.padding([L]))
    assert watch.history[0].dead.tolist() == [[False, dead, False]]


def test_dead_does_not_count_padding() -> None:
    """Head 1 writes something only in rows of padding: there it sees the one key with a value."""
    mask = torch.ones(1, H, L, L, dtype=torch.bool)
    mask[:, :, :, L - 1] = False  # padding: no query sees it
    mask[:, 1, : L - 1, 0] = False  # head 1: only the padding sees the first key
    x = torch.zeros(1, L, E)
    x[:, 0] = 1
    layer = MultiHeadAttention(E, H, bias=False)
    watch = monitor(layer, every=1)
    with watch:
        layer(x, mask=masks.dense(mask))
    assert watch.history[0].dead.tolist() == [[False, True, False]]


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_warning_names_only_the_head_that_is_not_finite(part: str) -> None:
    layer, x = MultiHeadAttention(E, H), torch.randn(B, L, E)
    good = quiet(layer, x)
    layer.in_proj.weight.data[{"query": 0, "key": E, "value": 2 * E}[part] + 4] = (
        math.inf if part == "key" else math.nan
    )
    watch = monitor(layer, every=1)
    with pytest.warns(HeadWarning, match=r"head 0\.1 .*NaN or infinite") as caught, watch:
        layer(x)
    assert len(caught) == 1
    assert watch.history[0].finite.tolist() == [[True, False, True]]
    torch.testing.assert_close(watch.history[0].entropy[0, [0, 2]], good.entropy[0, [0, 2]])
    assert watch.history[0].largest_logit[0, 1].isnan() == watch.history[0].entropy[0, 1].isnan() == (part != "value")
    assert not watch.history[0].dead.any()


def test_warning_of_a_bias_that_is_not_finite() -> None:
    with pytest.warns(HeadWarning, match=r"head 0\.2 .*NaN or infinite"):
        stats = measured(Sdpa(torch.full((L, L), math.nan)), torch.randn(B, L, E))
    assert not stats.finite.any()


def test_failed_forward_is_not_counted() -> None:
    class Fails(Own):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if self.fails:
                raise MemoryError
            return x

    model, x = Fails(), torch.randn(B, L, E)
    watch = monitor(model, every=1)
    with watch:
        with pytest.raises(MemoryError):
            model(100 * x)
        model.fails = False
        model(x)
    torch.testing.assert_close(watch.history[0].largest_logit, measured(model, x).largest_logit)


def test_step_without_a_forward_is_left_out() -> None:
    model, x = own(), torch.randn(B, L, E)
    watch = monitor(model, every=1)
    with watch:
        model(x)
    with watch:
        pass
    with watch:
        model(x)
    assert [stats.step for stats in watch.history] == [0, 2]


def test_warning_points_at_the_line_of_the_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "__exit__", inspect.unwrap(Monitor.__exit__))  # shape checks are a frame between
    layer = MultiHeadAttention(E, H)
    layer.in_proj.weight.data[:4] *= 1e5
    with pytest.warns(HeadWarning, match=r"head 0\.0") as caught, monitor(layer, every=1):  # this line
        layer(torch.randn(B, L, E))
    assert caught[0].filename == __file__
    assert linecache.getline(__file__, caught[0].lineno).endswith("# this line\n")
