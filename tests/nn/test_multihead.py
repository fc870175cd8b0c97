"""MultiHeadAttention: the article's formula, its matrix, masks, positions and errors."""

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headscope import (
    AttentionMatrix,
    MultiHeadAttention,
    masks,
    positions,
)
from tests.nn.modules import B, E, H, L, S, module_of, x_of
from tests.options import unchecked


def by_the_article(module: MultiHeadAttention, query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
    """Concat(head_1 … head_h) W_O with head_i = softmax(Q W_i K W_i / sqrt d) V W_i, written out a head at a time."""
    weights = module.weights_as("linears")
    q, k, v = (
        x @ weights[f"linears.{i}.weight"].T + weights[f"linears.{i}.bias"] for i, x in enumerate((query, key, key))
    )
    heads, d = [], module.head_dim
    for h in range(module.num_heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(d)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(heads, -1) @ weights["linears.3.weight"].T + weights["linears.3.bias"]


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_forward_is_the_articles_formula(heads: int, across: bool) -> None:
    module, x, key = module_of(E, heads), x_of(), x_of(S, seed=2) if across else None
    torch.testing.assert_close(module(x, key), by_the_article(module, x, x if key is None else key))


def test_forward_with_a_mask_is_the_articles_formula() -> None:
    module, x = module_of(E, H), x_of()
    visible = torch.ones(L, L, dtype=torch.bool).tril()
    torch.testing.assert_close(module(x, mask=masks.causal()), by_the_article(module, x, x, visible))
    torch.testing.assert_close(module(x, mask=visible), by_the_article(module, x, x, visible))


def test_forward_of_two_positions_worked_by_hand() -> None:
    """Query and key maps are one, so position 1 meets scores 0 and ln 3 · √1: weights 1/4 and 3/4."""
    module = MultiHeadAttention(1, 1, bias=False)
    for part in module.parameters():
        nn.init.ones_(part)
    root = math.sqrt(math.log(3))
    out = module(torch.tensor([[[0.0], [root]]]))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([root / 2, root * 3 / 4]))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 1}, {"head_dim": 6}, {"qk_norm": True}, {"position": positions.rotary()}, {"bias": False}],
    ids=str,
)
def test_matrix_times_values_gives_the_output(options: dict[str, object]) -> None:
    module, x = module_of(E, H, **options), x_of()
    matrix = module.matrix(x, mask=masks.causal())
    assert isinstance(matrix, AttentionMatrix)
    values = module._project(x, x, x)[2].repeat_interleave(module.num_heads // module.num_kv_heads, 1)
    out = module.out_proj((matrix.dense() @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, mask=masks.causal()), out)
    torch.testing.assert_close(matrix.dense().sum(-1), torch.ones(B, H, L, dtype=torch.float64))


def test_matrix_of_cross_attention_gives_the_output() -> None:
    module, x, key = module_of(E, H, kdim=5, vdim=4), x_of(), x_of(S, 5)
    value = x_of(S, 4)
    dense = module.matrix(x, key).dense()
    assert dense.shape == (B, H, L, S)
    out = module.out_proj((dense @ module._project(x, key, value)[2]).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, key, value), out)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"qk_norm": True, "position": positions.rotary()}], ids=str
)
def test_gradients_match_finite_differences(options: dict[str, object]) -> None:
    module, x = module_of(E, H, **options), x_of(4).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (x,), {"mask": masks.causal()})

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_grouped_query_heads_share_keys_in_order() -> None:
    """H 6, G 3: heads 0 and 1 read key head 0. Written out with keys repeated."""
    module, x = module_of(E, 6, num_kv_heads=3), x_of()
    full = module_of(E, 6)
    weights = module.weights_as("linears")
    for i in (1, 2):
        for kind in ("weight", "bias"):
            part = weights[f"linears.{i}.{kind}"].unflatten(0, (3, 2))
            weights[f"linears.{i}.{kind}"] = part.repeat_interleave(2, 0).flatten(0, 1)
    full.load_weights(weights)
    torch.testing.assert_close(module(x), full(x))


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    module, x = module_of(E, H, dropout_p=0.5), x_of()
    module.eval()
    still = module(x)
    torch.testing.assert_close(still, module(x))
    module.train()
    torch.manual_seed(0)
    drawn = module(x.repeat(3000, 1, 1)).detach().view(3000, B, L, E)  # each text is drawn for by itself
    assert drawn.std(0).min() > 0.01
    torch.testing.assert_close(drawn.mean(0), still, atol=0.12, rtol=0)


def test_fully_masked_row_gives_zeros_and_zero_gradients() -> None:
    module, x = module_of(E, H), x_of().requires_grad_()
    nothing = masks.dense(torch.zeros(L, L, dtype=torch.bool))
    out = module(x, mask=nothing)
    torch.testing.assert_close(out, module.out_proj.bias.expand(B, L, E))
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("training", [True, False])
def test_fully_masked_row_leaves_the_rest_of_the_batch_unchanged(training: bool) -> None:
    module, x = module_of(E, H).train(training), x_of().requires_grad_()
    out = module(x, mask=masks.padding([0, 5]))
    torch.testing.assert_close(out[0], module.out_proj.bias.expand(L, E))
    torch.testing.assert_close(out[1], module(x[1:, :], x[1:, :5])[0])
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad[0], torch.zeros(L, E, dtype=torch.float64))


def test_matrix_needs_no_second_mask() -> None:
    module, x = module_of(E, H), x_of()
    weights = module.matrix(x, mask=masks.causal()).dense()
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    torch.testing.assert_close(module(x, mask=masks.causal())[:, :1], module(x[:, :1]))


def test_causal_mask_is_aligned_to_the_last_query() -> None:
    module, x = module_of(E, H), x_of()
    whole = module(x, mask=masks.causal())
    torch.testing.assert_close(module(x[:, -3:], x, mask=masks.causal()), whole[:, -3:])


@pytest.mark.parametrize("shape", [(L, L), (1, 1, L, L), (B, 1, L, L), (1, H, L, L), (B, H, L, L)])
def test_mask_shapes_are_the_same_in_training_and_evaluation(shape: tuple[int, ...]) -> None:
    module, x = module_of(E, H), x_of()
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    trained = module.train()(x, mask=visible)
    torch.testing.assert_close(module.eval()(x, mask=visible), trained)


def test_matrix_is_before_dropout_and_sums_to_one() -> None:
    module, x = module_of(E, H, dropout_p=0.9).train(), x_of()
    torch.testing.assert_close(module.matrix(x).dense().sum(-1), torch.ones(B, H, L, dtype=torch.float64))


def test_matrix_is_per_head() -> None:
    weights = module_of(E, H).matrix(x_of()).dense()
    assert weights.shape == (B, H, L, L)
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 0.01


def test_positions_do_not_mix_with_heads() -> None:
    """A view without a transpose lets one position's numbers into another's: change one, see who changes."""
    module, x = module_of(E, H), x_of()
    other = x.clone()
    other[:, 4] += 1
    changed = (module(x, mask=masks.causal()) != module(other, mask=masks.causal())).any(-1)
    assert changed.tolist() == [[False] * 4 + [True] * 3] * B


@pytest.mark.parametrize("scaling", [None, positions.linear_scaling(3.0), positions.llama3_scaling(4.0, original=64)])
def test_module_with_positions_can_be_pickled(scaling: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    ours = MultiHeadAttention(12, 3, position=positions.rotary(scaling=scaling))
    x = torch.randn(B, L, 12)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_only_on_the_distance(interleaved: bool) -> None:
    turn = positions.rotary(interleaved=interleaved).rotate
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    scores = [(turn(q, i + 5) * turn(k, i)).sum() for i in (0, 3, 900)]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
    assert abs(float((turn(q, 6) * turn(k, 0)).sum() - scores[0])) > 1e-4


def test_rotary_by_hand() -> None:
    """Head size 2: one pair, one radian a position, whatever the base; interleaved and half-split are the same."""
    x = torch.tensor([[[[1.0, 0.0]] * 3]])
    wanted = torch.tensor([[math.cos(t), math.sin(t)] for t in range(3)])
    for interleaved in (False, True):
        torch.testing.assert_close(positions.rotary(7.0, interleaved=interleaved).rotate(x)[0, 0], wanted)
    pair = positions.rotary(100.0).rotate(torch.tensor([[[[0.0, 1.0, 0.0, 0.0]] * 2]]))[0, 0, 1]
    torch.testing.assert_close(pair, torch.tensor([0.0, math.cos(0.1), 0.0, math.sin(0.1)]))
    pair = positions.rotary(100.0, interleaved=True).rotate(torch.tensor([[[[0.0, 0.0, 1.0, 0.0]] * 2]]))[0, 0, 1]
    torch.testing.assert_close(pair, torch.tensor([0.0, 0.0, math.cos(0.1), math.sin(0.1)]))


def test_alibi_adds_its_bias_to_the_scores() -> None:
    slopes = [0.5, 0.25, 0.125]
    module, plain, x = module_of(E, H, position=positions.alibi(slopes)), module_of(E, H), x_of()
    distance = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    bias = -torch.tensor(slopes).double()[:, None, None] * distance
    scores = plain.matrix(x).dense().log() + bias
    torch.testing.assert_close(module.matrix(x).dense(), scores.softmax(-1), atol=1e-6, rtol=1e-6)
    assert (module(x) - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MultiHeadAttention(13, 3), "embed_dim 13 cannot be cut into 3 heads"),
        (lambda: MultiHeadAttention(12, 6, num_kv_heads=4), "6 query heads cannot share 4 key/value heads"),
        (lambda: MultiHeadAttention(12, 0), "embed_dim 12, num_heads 0, head_dim 12: all are at least 1"),
        (lambda: MultiHeadAttention(8, 512), r"embed_dim 8, num_heads 512, head_dim 0: .*MultiHeadAttention\(512, 8\)"),
        (lambda: MultiHeadAttention(12, 3, head_dim=0), "num_heads 3, head_dim 0: all are at least 1"),
        (lambda: MultiHeadAttention(12, 3, dropout_p=1.0), "dropout_p is 1.0"),
        (lambda: MultiHeadAttention(9, 3, position=positions.rotary()), "head size is 3: it must be even"),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.alibi([1.0, 2.0])),
            "alibi has 2 slopes, but there are 3",
        ),
        (lambda: MultiHeadAttention(12, 3, position="rotary"), "position is 'rotary'"),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.rotary())(x_of().float(), x_of().float()),
            "rotary positions are of one sequence",
        ),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.alibi([1.0, 2.0, 3.0]))(
                x_of().float(), x_of().float()
            ),
            "alibi positions are of one sequence",
        ),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.rotary()).matrix(x_of().float(), x_of().float()),
            "rotary positions are of one sequence",
        ),
        (lambda: MultiHeadAttention(12, 3)(torch.randn(7, 12)), r"query has shape \(7, 12\), wanted \[batch"),
        (
            lambda: MultiHeadAttention(12, 3)(torch.randn(2, 0, 12)),
            r"query has shape \(2, 0, 12\): attention needs at least one position",
        ),
        (lambda: MultiHeadAttention(12, 3)(torch.randn(2, 7, 11)), r"\(2, 7, 11\), wanted \[batch, length, 12\]"),
        (
            lambda: MultiHeadAttention(12, 3)(torch.randn(2, 7, 12), torch.randn(3, 7, 12)),
            "key has batch 3, query has 2",
        ),
        (lambda: MultiHeadAttention(12, 3, kdim=5)(torch.randn(2, 7, 12)), "needs a key of its own"),
        (lambda: MultiHeadAttention(12, 3, kdim=5)(torch.randn(2, 7, 12), torch.randn(2, 7, 5)), "give a value too"),
        (
            lambda: MultiHeadAttention(12, 3).load_weights({"wq": torch.ones(3)}),
            "weights named wq are of no known layout",
        ),
        (
            lambda: MultiHeadAttention(12, 3).load_weights(MultiHeadAttention(6, 3).weights_as("torch")),
            r"\(6, 6\), this",
        ),
        (
            lambda: MultiHeadAttention(12, 3).load_weights(MultiHeadAttention(12, 3).state_dict()),
            r"use module\.load_state_dict\(weights\)",
        ),
        (
            lambda: MultiHeadAttention(12, 3).load_weights(
                nn.MultiheadAttention(12, 3).state_dict() | {"rel_bias": torch.ones(3)}
            ),
            "the weights hold rel_bias besides the four projections",
        ),
        (lambda: MultiHeadAttention.from_torch(nn.Linear(3, 3)), "got Linear: give it an nn.MultiheadAttention"),
        (lambda: MultiHeadAttention(12, 3).weights_as("jax"), "layout is 'jax'"),
        (lambda: MultiHeadAttention(12, 3, num_kv_heads=1).to_torch(), "has no shared key/value heads"),
        (
            lambda: MultiHeadAttention(12, 3, bias=False).load_weights(module_of(12, 3).weights_as("linears")),
            "which this module has no place for",
        ),
        (
            lambda: MultiHeadAttention(12, 3)(torch.randn(2, 7, 12), mask=[[True]]),
            "mask is a list; wanted a headscope mask",
        ),
        (lambda: positions.rotary(0.5), "base=0.5: it must be above 1"),
        (lambda: positions.rotary(scaling=4.0), r"scaling=4\.0: wanted a function, such as linear_scaling\(4\.0\)"),
        (lambda: positions.linear_scaling(0.0), "factor=0.0: it must be above 0"),
        (lambda: positions.llama3_scaling(0.0), "factor=0.0, low=1.0, high=4.0, original=8192: all must be above 0"),
        (lambda: positions.llama3_scaling(8.0, low=4.0), "low=4.0, high=4.0, original=8192: all must be above 0"),
        (lambda: positions.sinusoidal(3, 5), "embed_dim=5"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(make: Callable[[], object], text: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=text):
        make()


def test_exported_module_still_computes() -> None:
    layer, x = MultiHeadAttention(16, 4, position=positions.rotary()).eval(), torch.randn(2, 7, 16)
    torch.export.export(layer, (x,))
    assert type(layer(x).detach()) is Tensor


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 4}, {"packed": False}], ids=str)
def test_reset_parameters_initialises_everything_after_to_empty(options: dict[str, object]) -> None:
    with torch.device("meta"):
        module = MultiHeadAttention(E, H, qk_norm=True, **options)
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, torch.nan)
    module.reset_parameters()
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    assert module.q_norm is not None
    assert bool((module.q_norm.weight == 1).all())
    assert module.out_proj.weight.std() > 0.1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore:Converting a tensor")
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"position": positions.rotary()}, {"qk_norm": True}])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=str)
def test_traced_module_gives_the_same_output_for_other_sizes(options: dict[str, object], mask: masks.Mask) -> None:
    module = module_of(E, H, **options)
    with unchecked():
        traced = torch.jit.trace(Masked(module, mask), (x_of(),))
    for x in (x_of(), x_of(L + 4), torch.cat((x_of(), x_of(seed=3)))):
        torch.testing.assert_close(traced(x), module(x, mask=mask))


class Masked(nn.Module):
    """A module with a mask of its own, since only tensors are traced."""

    def __init__(self, module: nn.Module, mask: masks.Mask | None) -> None:
        super().__init__()
        self.module, self.mask = module, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, mask=self.mask)


EMPTY = torch.zeros(0, L, dtype=torch.bool)


@pytest.mark.parametrize(
    "mask", [None, masks.causal(), masks.sliding_window(2), masks.keep(EMPTY), masks.padding([])], ids=str
)
@pytest.mark.parametrize("options", [{}, {"position": positions.alibi([0.5, 0.2, 0.1]), "dropout_p": 0.1}], ids=str)
def test_batch_of_zero_gives_an_empty_output_as_in_torch(options: dict[str, object], mask: masks.Mask) -> None:
    module, x = module_of(E, H, **options), torch.zeros(0, L, E, dtype=torch.float64, requires_grad=True)
    out = module(x, mask=mask)
    assert out.shape == nn.MultiheadAttention(E, H, batch_first=True).double()(x, x, x)[0].shape == (0, L, E)
    out.sum().backward()
    assert x.grad is not None
    assert module.in_proj.weight.grad is not None
    assert not bool(module.in_proj.weight.grad.any())
    P = module.matrix(x.detach(), mask=mask)
    shapes = [P.dense().shape, P.entropy().shape, P.topk(2).values.shape, P.received().shape, P[:, 0, 1].shape]
    assert [tuple(shape) for shape in shapes] == [(0, H, L, L), (0, H, L), (0, H, L, 2), (0, H, L), (0, L)]
