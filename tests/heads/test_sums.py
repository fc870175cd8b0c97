"""Sums of measures add up over documents, layers and shards."""

from __future__ import annotations

import pytest
import torch

from headscope.heads.measures import Ratio
from headscope.heads.measures.sums import MeasureSums, document_weights, weights_of
from tests.options import one_thread  # noqa: F401  (for the whole module)


def test_sums_add_up_in_any_order_and_intervals_contain_the_value() -> None:
    whole, parts = MeasureSums(), [MeasureSums(), MeasureSums()]
    for number in range(12):
        numerator = torch.full((1, 2), 1.0 + number % 5)
        weights = weights_of([(f"doc {number}", number % 2)])
        for into in (whole, parts[number % 3 == 0]):
            into.add({"x": Ratio(numerator, torch.full((1, 2), 4.0))}, 1, 3, weights)
            into.documents[f"doc {number}"] = 4
    merged = MeasureSums()
    for part in reversed(parts):
        merged.merge(part)
    torch.testing.assert_close(merged.values["x"], whole.values["x"])
    assert merged.documents == whole.documents
    value = whole.value("x", 1)
    low, high = whole.interval("x")
    assert value[1, 0] == pytest.approx(sum(1 + n % 5 for n in range(1, 12, 2)) / 24)
    assert value[0].isnan().all()
    assert low[1, 0] < value[1, 0] < high[1, 0]
    assert document_weights("a", 0)[:2].tolist() == [1, 0]
    assert not document_weights("a", 0)[2:].any()
    assert document_weights("a", 1)[2:].mean() == pytest.approx(1, abs=0.3)
    other = MeasureSums({"x": torch.zeros(2, 2, 5, 5)})
    with pytest.raises(ValueError, match=r"x has sums \(102, 2, 3, 2\) here and \(2, 2, 5, 5\) there"):
        whole.merge(other)
    with pytest.raises(ValueError, match="no replicates are kept for 'x'"):
        other.interval("x")


def test_sums_of_several_layers_are_added_at_once() -> None:
    """Layers that have the same sums may be added together."""
    ratio = Ratio(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 2))
    at_once, one_by_one = MeasureSums(), MeasureSums()
    at_once.add({"x": ratio}, [0, 2], 3, torch.ones(2, 2, dtype=torch.float64))
    for layer in (0, 2):
        one_by_one.add({"x": ratio}, layer, 3, torch.ones(2, 2, dtype=torch.float64))
    assert torch.equal(at_once.values["x"], one_by_one.values["x"])
    assert at_once.value("x")[2].tolist() == [2.0, 3.0]
    assert at_once.value("x")[1].isnan().all()


def test_sums_grow_with_layers_beyond_the_config() -> None:
    sums, one = MeasureSums(), torch.ones(1, 3)
    for layer, layers in ((0, 1), (1, 2), (2, 3)):
        sums.add({"a": Ratio(one * layer, one)}, layer, layers, torch.ones(2, 1))
    assert sums.value("a").tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
