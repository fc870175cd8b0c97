"""Masks against loops over all cells, alone and combined; classify and spans against the cells of blocks."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope import AttentionMatrix, MultiHeadAttention, attention, masks
from headscope.ops.masks import Mask, shifted
from headscope.ops.masks.codec import decode, encode
from tests.options import one_thread, unchecked  # noqa: F401
from tests.reference import all_in, visible_where

BATCH, HEADS, QUERIES, KEYS = 2, 3, 7, 11
Rule = Callable[[int, int, int, int], bool]
IDS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 5, 5]
UNORDERED = [[0, 1, 0, 1, 1, 0, 2, 2, 0, 1, 1], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]]
VISIBLE = torch.rand(BATCH, HEADS, QUERIES, KEYS, generator=torch.Generator().manual_seed(3)) < 0.6
FIRST = KEYS - QUERIES

EACH: dict[str, tuple[Mask, Rule]] = {
    "causal": (masks.causal(), lambda b, h, i, j: j <= i),
    "window": (masks.sliding_window(2), lambda b, h, i, j: i - 2 <= j <= i),
    "window of one": (masks.sliding_window(0), lambda b, h, i, j: i == j),
    "window both sides": (masks.sliding_window(3, right=1), lambda b, h, i, j: i - 3 <= j <= i + 1),
    "prefix": (masks.prefix(4), lambda b, h, i, j: j < 4),
    "prefix of all": (masks.prefix(11), lambda b, h, i, j: True),
    "padding": (masks.padding([11, 5]), all_in([11, 5])),
    "left padding": (
        masks.padding([11, 5], side="left", num_keys=KEYS),
        lambda b, h, i, j: j >= KEYS - [11, 5][b],
    ),
    "padding of nothing": (masks.padding([0, 5]), all_in([0, 5])),
    "documents": (masks.documents(IDS), lambda b, h, i, j: IDS[i] == IDS[j]),
    "documents that mix": (
        masks.documents(torch.tensor(UNORDERED)),
        lambda b, h, i, j: UNORDERED[b][i] == UNORDERED[b][j],
    ),
    "dense": (masks.dense(VISIBLE), lambda b, h, i, j: bool(VISIBLE[b, h, i - FIRST, j])),
    "dense [L, S]": (masks.dense(VISIBLE[0, 0]), lambda b, h, i, j: bool(VISIBLE[0, 0, i - FIRST, j])),
    "dense [1, H, 1, S]": (masks.dense(VISIBLE[:1, :, :1]), lambda b, h, i, j: bool(VISIBLE[0, h, 0, j])),
    "dense [B, 1, 1, 1]": (masks.dense(VISIBLE[:, :1, :1, :1]), lambda b, h, i, j: bool(VISIBLE[b, 0, 0, 0])),
    "packed": (masks.packed(VISIBLE), lambda b, h, i, j: bool(VISIBLE[b, h, i - FIRST, j])),
    "packed [B, 1, 1, S]": (masks.packed(VISIBLE[:, :1, :1]), lambda b, h, i, j: bool(VISIBLE[b, 0, 0, j])),
    "heads": (masks.heads([0, 2]), lambda b, h, i, j: h in (0, 2)),
    "queries": (masks.queries([5, 10]), lambda b, h, i, j: i in (5, 10)),
    "keys": (masks.keys([0, 5, 9]), lambda b, h, i, j: j in (0, 5, 9)),
    "function": (
        masks.function(lambda b, h, i, j: (i + j + b) % (h + 2) == 0),
        lambda b, h, i, j: (i + j + b) % (h + 2) == 0,
    ),
}


def expected(rule: Rule) -> Tensor:
    return visible_where(rule, BATCH, HEADS, QUERIES, KEYS)


@pytest.mark.parametrize("name", EACH)
def test_mask_equals_its_rule_in_every_cell(name: str) -> None:
    mask, rule = EACH[name]
    assert mask.tensor(QUERIES, KEYS, BATCH, HEADS).equal(expected(rule))


@pytest.mark.parametrize("name", EACH)
def test_mask_is_callable_cell_by_cell(name: str) -> None:
    mask, rule = EACH[name]
    cells = [c.flatten() for c in torch.meshgrid(*map(torch.arange, (BATCH, HEADS, QUERIES, KEYS)), indexing="ij")]
    answers = mask(cells[0], cells[1], cells[2] + FIRST, cells[3])
    assert answers.view(BATCH, HEADS, QUERIES, KEYS).equal(expected(rule))


def test_masks_combine_with_and_or_and_not() -> None:
    a, b, c = (EACH[name] for name in ("causal", "documents that mix", "padding"))
    both, either, negated = a[0] & b[0], a[0] | b[0], ~c[0]
    size = (QUERIES, KEYS, BATCH, HEADS)
    assert both.tensor(*size).equal(expected(a[1]) & expected(b[1]))
    assert either.tensor(*size).equal(expected(a[1]) | expected(b[1]))
    assert negated.tensor(*size).equal(~expected(c[1]))
    assert (a[0] & (b[0] | ~c[0])).tensor(*size).equal(expected(a[1]) & (expected(b[1]) | ~expected(c[1])))


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("num_kept", [8, KEYS])
def test_shifted_mask_is_the_mask_of_the_last_keys(name: str, num_kept: int) -> None:
    mask, rule = EACH[name]
    kept = shifted(mask, KEYS, num_kept).tensor(QUERIES, num_kept, BATCH, HEADS)
    assert kept.equal(expected(rule)[..., KEYS - num_kept :])


KINDS: dict[str, Mask] = {name: mask for name, (mask, _) in EACH.items() if name != "function"} | {
    "and": masks.causal() & masks.padding([11, 5]),
    "or": masks.causal() | masks.padding([11, 5]),
    "not": ~masks.documents(IDS),
    "stacked": shifted(masks.prefix(6), KEYS, KEYS - 2),
}


@pytest.mark.parametrize("name", KINDS)
def test_decode_gives_the_mask_that_was_encoded(name: str) -> None:
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> str:
        tensors[f"tensor {len(tensors)}"] = tensor
        return f"tensor {len(tensors) - 1}"

    data = json.loads(json.dumps(encode(KINDS[name], keep)))
    decoded = decode(data, tensors.__getitem__)
    assert decoded is not None
    assert repr(decoded) == repr(KINDS[name])
    assert decoded.tensor(QUERIES, KEYS, BATCH, HEADS).equal(KINDS[name].tensor(QUERIES, KEYS, BATCH, HEADS))


def test_is_causal_is_true_for_causal_alone() -> None:
    assert masks.causal().is_causal
    others = [mask for name, (mask, _) in EACH.items() if name != "causal"]
    others += [masks.causal() & masks.causal(), ~masks.causal(), masks.causal() | masks.prefix(1)]
    assert [mask for mask in others if mask.is_causal] == []


def test_mask_puts_queries_at_the_last_positions() -> None:
    step = masks.causal().tensor(2, 5)[0, 0].int().tolist()
    assert step == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    more_queries = masks.causal().tensor(5, 2)[0, 0].int().tolist()
    assert more_queries == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    window = masks.sliding_window(1).tensor(2, 5)[0, 0].int().tolist()
    assert window == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_dense_takes_one_key_if_there_is_one() -> None:
    visible = torch.tensor([[True], [False], [True]])
    assert masks.dense(visible).tensor(3, 1)[0, 0].equal(visible)


def test_packed_takes_an_eighth_of_the_memory_of_dense() -> None:
    visible = torch.rand(1, 1, 64, 64) < 0.5
    packed: Any = masks.packed(visible)
    assert packed.bits.nbytes * 8 == visible.nbytes
    assert packed.tensor(64, 64).equal(visible)


Case = tuple[Callable[[], Mask], Tensor]


@st.composite
def leaves(draw: st.DrawFn, queries: int, keys: int) -> Case:
    """How to make a mask, and its cells by brute force."""
    number = st.integers(0, keys + 1)
    kind = draw(
        st.sampled_from(["causal", "window", "prefix", "padding", "left", "documents", "dense", "packed", "function"])
    )
    ids = draw(st.lists(st.integers(0, 3), min_size=keys, max_size=keys))
    lengths = draw(st.lists(st.integers(0, keys), min_size=BATCH, max_size=BATCH))
    left, right = draw(number), draw(number)
    visible = torch.rand(BATCH, HEADS, queries, keys, generator=torch.Generator().manual_seed(left * 100 + right)) < 0.7
    ids = sorted(ids) if right % 2 else ids
    first = keys - queries
    options: dict[str, tuple[Callable[[], Mask], Rule]] = {
        "causal": (masks.causal, lambda b, h, i, j: j <= i),
        "window": (lambda: masks.sliding_window(left, right), lambda b, h, i, j: i - left <= j <= i + right),
        "prefix": (lambda: masks.prefix(left), lambda b, h, i, j: j < left),
        "padding": (lambda: masks.padding(lengths), all_in(lengths)),
        "left": (lambda: masks.padding(lengths, "left", keys), lambda b, h, i, j: j >= keys - lengths[b]),
        "documents": (lambda: masks.documents(ids), lambda b, h, i, j: ids[i] == ids[j]),
        "dense": (lambda: masks.dense(visible), lambda b, h, i, j: bool(visible[b, h, i - first, j])),
        "packed": (lambda: masks.packed(visible), lambda b, h, i, j: bool(visible[b, h, i - first, j])),
        "function": (
            lambda: masks.function(lambda b, h, i, j: (i * left + j + h) % 3 > 0),
            lambda b, h, i, j: (i * left + j + h) % 3 > 0,
        ),
    }
    make, rule = options[kind]
    return make, visible_where(rule, BATCH, HEADS, queries, keys)


@st.composite
def compositions(draw: st.DrawFn, queries: int, keys: int, depth: int = 3) -> Case:
    kind = draw(st.sampled_from(["leaf", "and", "or", "not"])) if depth else "leaf"
    if kind == "leaf":
        return draw(leaves(queries, keys))
    make, visible = draw(compositions(queries, keys, depth - 1))
    if kind == "not":
        return lambda: ~make(), ~visible
    other, also = draw(compositions(queries, keys, depth - 1))
    if kind == "and":
        return lambda: make() & other(), visible & also
    return lambda: make() | other(), visible | also


def part(draw: st.DrawFn, size: int) -> slice:
    start = draw(st.integers(0, size - 1))
    return slice(start, draw(st.integers(start + 1, size)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_classify_and_spans_agree_with_the_cells_of_any_combination(data: st.DataObject) -> None:
    keys = data.draw(st.integers(1, 14))
    queries = data.draw(st.integers(1, keys))
    make, visible = data.draw(compositions(queries, keys))
    with unchecked():
        check_blocks(make(), visible, data)


def check_blocks(mask: Mask, visible: Tensor, data: st.DataObject) -> None:
    queries, keys = visible.shape[2:]
    assert mask.tensor(queries, keys, BATCH, HEADS).equal(visible)

    b, q, k = part(data.draw, BATCH), part(data.draw, queries), part(data.draw, keys)
    at = slice(q.start + keys - queries, q.stop + keys - queries)
    verdict = mask.classify(b, at, k)
    block = visible[b, :, q, k]
    assert verdict is None or bool((block == verdict).all())

    covered = torch.zeros(keys, dtype=torch.bool)
    spans = mask.spans(b, at, keys, step=data.draw(st.integers(1, 5)))
    for (start, stop, mixed), following in pairwise([*spans, (keys, keys, False)]):
        assert start < stop <= following[0]
        assert mixed or bool(visible[b, :, q, start:stop].all())
        covered[start:stop] = True
    assert not bool(visible[b, :, q][..., ~covered].any())


@pytest.mark.parametrize("name", [name for name in EACH if name != "function"])
def test_classify_knows_a_block_of_one_cell(name: str) -> None:
    mask, rule = EACH[name]
    visible = expected(rule)
    same = visible[:, :1].eq(visible).all(1)  # a verdict speaks for every head
    for b, i, j in [(0, 0, 0), (1, 3, 4), (0, 6, 10), (1, 6, 5), (1, 2, 6)]:
        verdict = mask.classify(slice(b, b + 1), slice(FIRST + i, FIRST + i + 1), slice(j, j + 1))
        assert verdict == (bool(visible[b, 0, i, j]) if same[b, i, j] else None)


def test_classify_of_or_hides_what_neither_mask_shows() -> None:
    either = masks.sliding_window(1) | masks.prefix(2)
    assert either.classify(slice(0, 1), slice(8, 10), slice(3, 6)) is False
    assert either.classify(slice(0, 1), slice(8, 10), slice(1, 6)) is None


@pytest.mark.parametrize("name", ["causal", "window", "window both sides", "prefix", "padding", "left padding"])
def test_classify_is_right_for_every_block(name: str) -> None:
    mask, rule = EACH[name]
    visible = expected(rule)[:, 0]
    wrong = []
    with unchecked():
        for i, j in ((i, j) for i in range(QUERIES) for j in range(KEYS)):
            for rows, cols in ((rows, cols) for rows in (1, 2, 5) for cols in (1, 3, 4, 8)):
                q, k = slice(i, min(QUERIES, i + rows)), slice(j, min(KEYS, j + cols))
                verdict = mask.classify(slice(0, BATCH), slice(FIRST + q.start, FIRST + q.stop), k)
                if verdict is not None and not bool((visible[:, q, k] == verdict).all()):
                    wrong.append((q, k, verdict))
    assert wrong == []


def test_spans_of_a_long_mask_need_few_calls_of_classify() -> None:
    calls = []

    class Counted(type(masks.causal())):
        def classify(self, *block: slice) -> bool | None:
            calls.append(block)
            return super().classify(*block)

    rows = slice(600_000, 600_256)
    start, stop, mixed = Counted(None, 0).spans(slice(0, 1), rows, 1_000_000)[0]
    assert (start, mixed) == (0, False)
    assert 600_001 - 64 <= stop <= 600_001
    spans = Counted(1000, 0).spans(slice(0, 1), rows, 1_000_000)
    assert 1256 <= spans[-1][1] - spans[0][0] <= 1256 + 2 * 64
    assert len(calls) < 200


ERRORS: dict[str, tuple[Callable[[], object], list[str]]] = {
    "window": (lambda: masks.sliding_window(-3, 2), ["left=-3", "right=2", "from 0 up"]),
    "prefix": (lambda: masks.prefix(-17), ["-17", "counts keys"]),
    "padding below zero": (lambda: masks.padding([4, -13]), ["[4, -13]", "one whole number"]),
    "padding of two axes": (lambda: masks.padding(torch.tensor([[4]])), ["[4]", "each batch row"]),
    "padding of no rows": (lambda: masks.padding([]).tensor(7, 11, 2), ["0 lengths", "2 rows"]),
    "keep of integers": (lambda: masks.keep(torch.ones(2, 11).long()), ["int64 (2, 11)", "attention_mask.bool()"]),
    "keep of 3 axes": (lambda: masks.keep(torch.ones(2, 7, 11).bool()), ["(2, 7, 11)", "wanted a bool tensor [B, S]"]),
    "keep of a list": (lambda: masks.keep([[True]]), ["got list", "bool tensor [B, S]"]),
    "keep shape": (lambda: masks.keep(torch.ones(2, 12).bool()).tensor(7, 11, 2), ["(2, 1, 1, 12)", "axis S"]),
    "keep rows": (lambda: masks.keep(torch.ones(3, 11).bool()).tensor(7, 11, 2), ["(3, 1, 1, 11)", "axis B"]),
    "padding side": (lambda: masks.padding([4], side="top"), ["'top'", "'left' or 'right'"]),
    "left padding of what": (lambda: masks.padding([4], side="left"), ["num_keys"]),
    "padding rows": (lambda: masks.padding([4, 5, 6]).tensor(7, 11, 2), ["3 lengths", "2 rows"]),
    "padding length": (lambda: masks.padding([4, 13]).tensor(7, 11, 2), ["13 keys", "only 11"]),
    "left padding keys": (lambda: masks.padding([4], "left", 12).tensor(7, 11), ["12 keys", "there are 11"]),
    "documents shape": (lambda: masks.documents(torch.zeros(2, 3, 5)), ["(2, 3, 5)", "[B, S]"]),
    "documents length": (lambda: masks.documents([0] * 12).tensor(7, 11), ["(1, 12)", "11 positions"]),
    "documents batch": (lambda: masks.documents(torch.zeros(3, 11)).tensor(7, 11, 2), ["(3, 11)", "2 batch rows"]),
    "more queries than documents": (lambda: masks.documents([0] * 11).tensor(13, 11), ["13 queries", "11 keys"]),
    "dense of numbers": (lambda: masks.dense(torch.zeros(7, 11)), ["torch.float32", "bias="]),
    "dense of integers": (lambda: masks.dense(torch.ones(7, 11, dtype=torch.int64)), ["torch.int64", "bool"]),
    "dense of a list": (lambda: masks.dense([[True]]), ["list", "bool"]),
    "dense of 3 axes": (lambda: masks.dense(torch.ones(2, 7, 11).bool()), ["(2, 7, 11)", "unsqueeze"]),
    "dense of 1 key": (
        lambda: masks.dense(torch.ones(7, 1).bool()).tensor(7, 11),
        ["(1, 1, 7, 1)", "11 keys"],
    ),
    "packed of numbers": (lambda: masks.packed(torch.zeros(7, 11)), ["torch.float32"]),
    "dense shape": (
        lambda: masks.dense(VISIBLE).tensor(7, 12, 2, 3),
        ["(2, 3, 7, 11)", "(2, 3, 7, 12)", "axis S", "12"],
    ),
    "packed shape": (lambda: masks.packed(VISIBLE).tensor(7, 12, 2, 3), ["(2, 3, 7, 11)", "(2, 3, 7, 12)"]),
    "function of numbers": (lambda: masks.function(lambda b, h, i, j: i * 1.0).tensor(7, 11), ["Tensor", "bool"]),
    "function of python": (
        lambda: masks.function(lambda b, h, i, j: cast(Any, True)).tensor(7, 11),
        ["bool", "wanted a bool tensor"],
    ),
    "inside a composition": (lambda: (masks.causal() & ~masks.padding([4, 13])).tensor(7, 11, 2), ["13", "11"]),
    "inside the other side": (lambda: (masks.padding([4, 13]) | masks.causal()).tensor(7, 11, 2), ["13", "11"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mask_errors_say_what_came_and_what_was_wanted(name: str) -> None:
    call, words = ERRORS[name]
    with unchecked(), pytest.raises(ValueError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("queries", "words"), [(2, "may be [L, S] or [B, S]"), (5, "is [B, S] here"), (1, "is [B, S]")]
)
@pytest.mark.parametrize("way", ["attention", "matrix", "module"])
def test_bool_tensor_that_may_be_of_texts_is_refused(way: str, queries: int, words: str) -> None:
    """Batch 2 and 2 queries: which keys of each text, or which query sees which key?"""
    is_text = torch.tensor([[True, True, True], [True, False, False]])
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, 4, 3, 8)
    layer, x, source = MultiHeadAttention(16, 4), torch.randn(2, queries, 16), torch.randn(2, 3, 16)
    calls = {
        "attention": lambda mask: attention(query, key, key, mask=mask),
        "matrix": lambda mask: AttentionMatrix(query, key, mask=mask).dense(),
        "module": lambda mask: layer(x, source, mask=mask),
    }
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        calls[way](is_text)
    assert "masks.keep(mask)" in str(caught.value)
    assert "masks.dense(mask)" in str(caught.value)
    kept = calls[way](masks.keep(is_text))
    torch.testing.assert_close(kept, calls[way](is_text[:, None, None, :]))
    torch.testing.assert_close(kept, calls[way](masks.padding([3, 1])))
    if queries == 2:
        torch.testing.assert_close(calls[way](masks.dense(is_text)), calls[way](is_text[None, None]))


def test_bool_tensor_for_one_text_has_one_meaning() -> None:
    query, visible = torch.randn(1, 2, 1, 8), torch.tensor([[True, False, True]])
    P = AttentionMatrix(query, torch.randn(1, 2, 3, 8), mask=visible)
    assert float(P.dense()[..., 1].max()) == 0


def test_keep_of_one_axis_is_for_all_texts() -> None:
    cells = masks.keep(torch.tensor([True, False, True])).tensor(2, 3, batch=2)
    assert cells[:, 0].int().tolist() == [[[1, 0, 1]] * 2] * 2


def test_mask_combines_with_masks_only() -> None:
    with pytest.raises(TypeError, match=r"masks\.keep\(tensor\) from \[B, S\]"):
        masks.causal() & VISIBLE
    with pytest.raises(TypeError):
        masks.causal() | True


def test_mask_repr_is_the_code_that_makes_it() -> None:
    mask = masks.causal() & ~(masks.prefix(2) | masks.documents(IDS))
    assert repr(mask) == "causal() & ~(prefix(2) | documents(4 documents))"
    assert repr(masks.padding([3, 5])) == "padding([3, 5], side='right')"
    assert repr(masks.padding(range(9))) == "padding([0, 1, 2, 3, 4, 5, … 9 in all], side='right')"
    assert repr(masks.sliding_window(3, 1) | masks.causal()) == "sliding_window(3, right=1) | causal()"
    assert repr(masks.dense(VISIBLE)) == "dense((2, 3, 7, 11))"
    assert repr(masks.packed(VISIBLE)) == "packed((2, 3, 7, 11))"
