"""P[index] is P.dense()[index]: value, shape and dtype, for every index that torch takes and we do not refuse."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope import AttentionMatrix, masks
from headscope.ops.kernels import indexing
from headscope.ops.kernels.indexing import PartReader
from tests import reference
from tests.options import one_thread, unchecked  # noqa: F401
from tests.reference import operands

SIZES = (2, 6, 7, 11)
QUERY, KEY, VALUE = operands()
BIAS = torch.randn(1, 6, 7, 11)
OPTIONS: dict[str, Any] = {"bias": BIAS, "softcap": 2.0, "sinks": torch.randn(6)}
VISIBLE = torch.rand(2, 1, 7, 11) < 0.7
VISIBLE[1, :, 3] = False
P = reference.weights(QUERY, KEY, visible=VISIBLE, **OPTIONS)
SHAPES = [(3,), (2, 1), (2, 3), (1,), ()]  # they broadcast


def one_part(size: int) -> st.SearchStrategy[Any]:
    """An index for one axis: numbers, slices, tensors and lists of numbers, from either end."""
    number = st.integers(-size, size - 1)
    end = st.none() | st.integers(-size - 2, size + 2)

    def tensor(shape: tuple[int, ...]) -> st.SearchStrategy[torch.Tensor]:
        count = int(np.prod(shape))
        return st.lists(number, min_size=count, max_size=count).map(lambda given: torch.tensor(given).view(shape))

    return st.one_of(
        number,
        number.map(np.int64),
        st.builds(slice, end, end, st.none() | st.integers(1, 4)),
        st.sampled_from(SHAPES).flatmap(tensor),
        tensor((3,)).map(lambda t: t.to(torch.int32)),
        st.lists(number, min_size=3, max_size=3),
        tensor((2, 3)).map(lambda t: t.numpy()),
    )


@st.composite
def indices(draw: st.DrawFn) -> Any:
    parts = [draw(one_part(size)) for size in SIZES]
    start, stop = sorted((draw(st.integers(0, 4)), draw(st.integers(0, 4))))
    if draw(st.booleans()):
        parts[start:stop] = [Ellipsis]
    else:
        parts = parts[:stop]
    return parts[0] if len(parts) == 1 and draw(st.booleans()) else tuple(parts)


@settings(max_examples=120, deadline=None)
@given(indices(), st.booleans(), st.booleans())
def test_index_gives_the_same_part_as_indexing_the_dense_matrix(index: Any, known: bool, small_parts: bool) -> None:
    matrix = AttentionMatrix(QUERY, KEY, mask=VISIBLE, **OPTIONS)
    if known:
        matrix.entropy()
    with unchecked(), pytest.MonkeyPatch.context() as patch:
        if small_parts:
            patch.setattr(indexing, "_CELLS", 13)
            patch.setattr(indexing, "_POINTS", 2)
        result = matrix[index]
    expected = P[index]
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("after", ["nothing", "a product", "an index", "entropy"])
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.padding([11, 5]), masks.prefix(0)], ids=repr)
def test_index_gives_the_same_after_any_other_answer(mask: masks.Mask | None, after: str) -> None:
    matrix = AttentionMatrix(QUERY, KEY, mask=mask)
    earlier = {
        "nothing": lambda: None,
        "a product": lambda: matrix @ VALUE,
        "an index": lambda: matrix[0, 1:3, 2:5],
        "entropy": lambda: matrix.entropy(),
    }
    earlier[after]()
    visible = torch.ones(1, dtype=torch.bool) if mask is None else mask.tensor(7, 11, 2, 6)
    expected = reference.weights(QUERY, KEY, visible=visible)
    for index in [(), ..., (1, 5), (slice(None), [1, 4], 6), (0, 0, [1, 3, 6], [10, 0, 2]), (1, slice(1, 6, 3))]:
        torch.testing.assert_close(matrix[index].double(), expected[index], atol=1e-5, rtol=0)


def test_index_tensors_apply_mask_bias_softcap_and_sinks() -> None:
    matrix = AttentionMatrix(QUERY, KEY, mask=VISIBLE, **OPTIONS)
    index = torch.tensor([0, 1, 1]), torch.tensor([5, 2, 0]), torch.tensor([6, 0, 3]), torch.arange(11)[:, None]
    torch.testing.assert_close(matrix[index].double(), P[index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.0, 50.0, -300.0, 300.0, 4.0, -1e4])])
@pytest.mark.parametrize("shift", [0.0, 60.0, 200.0, -60.0, -200.0, "each row its own"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_index_normalizes_rows_with_scores_of_any_size(
    scale: float, shift: float | str, sinks: torch.Tensor | None
) -> None:
    rows = torch.linspace(-300, 300, 7)[:, None] if isinstance(shift, str) else torch.tensor([[shift]])
    query = torch.cat([QUERY * scale, rows.expand(2, 6, 7, 1)], -1)  # the shift as one more product
    key = torch.cat([KEY, torch.ones_like(KEY[..., :1])], -1)
    part = AttentionMatrix(query, key, scale=1.0, sinks=sinks)[1, :, 2:, 3:9]
    expected = reference.weights(query, key, scale=1.0, sinks=sinks)[1, :, 2:, 3:9]
    torch.testing.assert_close(part.double(), expected, atol=2e-4, rtol=0)


def test_index_of_an_empty_part_has_its_shape() -> None:
    matrix = AttentionMatrix(QUERY, KEY)
    assert matrix[:, 3:3].shape == (2, 0, 7, 11)
    assert matrix[0, ..., 5:2].shape == (6, 7, 0)
    assert matrix[[]].shape == (0, 6, 7, 11)
    assert matrix[:, :, torch.empty(0, dtype=torch.int64), 4].shape == (2, 6, 0)
    assert matrix[(0, 1), range(2)].shape == (2, 7, 11)


def test_index_computes_far_apart_rows_of_a_long_text() -> None:
    query, key = torch.randn(1, 2, 30_000, 4), torch.randn(1, 1, 30_000, 4)
    matrix = AttentionMatrix(query, key, mask=masks.causal())
    result = matrix[0, 1, [5, 29_000], 3]
    rows = query[0, 1, [5, 29_000]].double() @ key[0, 0].double().T / 2
    expected = torch.stack([torch.softmax(rows[0, :6], 0)[3], torch.softmax(rows[1, :29_001], 0)[3]])
    torch.testing.assert_close(result.double(), expected)


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "True": (True, ValueError, "axis B got True"),
    "None": ((0, None), ValueError, "axis H got None"),
    "a bool tensor": ((0, 0, torch.ones(7).bool()), ValueError, "axis L got a torch.bool tensor.*nonzero"),
    "a bool array": ((0, 0, np.ones(7, dtype=bool)), ValueError, "axis L got a torch.bool tensor"),
    "numpy's True": ((0, np.True_), ValueError, "axis H got a torch.bool tensor"),
    "a list of bools": ([True, False], ValueError, "axis B got a torch.bool tensor"),
    "a float tensor": ((0, 0, 0, torch.tensor([1.0])), ValueError, "axis S got a torch.float32 tensor"),
    "a number": (1.5, TypeError, "float"),
    "text": ("it", TypeError, "str"),
    "a step back": ((0, 0, slice(None, None, -2)), ValueError, "axis L got step -2"),
    "no step": ((0, 0, slice(None, None, 0)), ValueError, "axis L got step 0"),
    "too far": ((0, 6), IndexError, "6 is out of range for axis H, which has 6"),
    "too far back": ((0, 0, -8), IndexError, "-8 is out of range for axis L, which has 7"),
    "a tensor too far": ((0, 0, 0, torch.tensor([3, 11])), IndexError, "11 is out of range for axis S, which has 11"),
    "a tensor too far back": (torch.tensor([-3, 1]), IndexError, "-3 is out of range for axis B"),
    "5 axes": ((0, 0, 0, 0, 0), IndexError, "4 axes .* names 5"),
    "two ellipses": ((..., 0, ...), IndexError, "one ellipsis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_index_that_is_refused_names_the_axis_and_the_reason(name: str) -> None:
    index, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        AttentionMatrix(QUERY, KEY)[index]


def test_index_returns_a_copy_that_may_be_written_into() -> None:
    """The last part is cached; a change to the copy that was returned must not show in it."""
    query, key = torch.randn(1, 2, 7, 5), torch.randn(1, 2, 11, 5)
    matrix = AttentionMatrix(query, key, mask=masks.causal())
    expected = matrix.dense()[0, 1, 2:5, 1:9]
    for _ in range(3):
        part = matrix[0, 1, 2:5, 1:9]
        torch.testing.assert_close(part, expected)
        part.zero_()
    torch.testing.assert_close(matrix[0, 1, 2:6, 1:9][:3], expected)


def test_index_works_in_inference_mode_and_after_it() -> None:
    matrix = AttentionMatrix(torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4))
    with torch.inference_mode():
        first = matrix[0, 0, 0]
    torch.testing.assert_close(torch.stack([first, matrix[0, 0, 5]]), matrix.dense()[0, 0, [0, 5]])


def test_index_computes_consecutive_rows_as_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads, many rows: two blocks, not one block per row."""
    query = torch.randn(1, 3, 40, 4, generator=torch.Generator().manual_seed(0))
    matrix = AttentionMatrix(query, query, mask=masks.causal())
    dense, blocks = matrix.dense(), []
    inner = PartReader._weights
    monkeypatch.setattr(PartReader, "_weights", lambda reader, *given: blocks.append(1) or inner(reader, *given))
    for index in ((0, [2, 0], slice(5, 30)), (0, [2, 0], slice(5, 30), slice(3, 20, 2)), (0, 1, [4, 5, 6, 9, 9, 8])):
        blocks.clear()
        torch.testing.assert_close(matrix[index], dense[index])
        assert len(blocks) == (4 if isinstance(index[2], list) else 2)
