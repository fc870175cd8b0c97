"""The tasks: their batches, targets and held-out rows."""

from typing import Any

import pytest
import torch

from headscope.training import (
    TASKS,
    make_task,
)
from headscope.training.tasks import IGNORED


@pytest.mark.parametrize("name", TASKS)
def test_batch_depends_only_on_seed_and_step(name: str) -> None:
    task = make_task(name)
    torch.manual_seed(1)
    first = task.batch(7, 3, 5)
    torch.manual_seed(2)
    again = make_task(name).batch(7, 3, 5)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    for other in (task.batch(8, 3, 5), task.batch(7, 4, 5)):
        assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", ["copy", "sort", "lookups"])
def test_held_out_rows_never_occur_in_training(name: str) -> None:
    task: Any = make_task(name, 16 if name == "lookups" else 4)
    batch = task.held_out(500)
    source = batch.tokens if batch.source is None else batch.source
    held_out = {tuple(sorted(row) if name == "sort" else row) for row in source.tolist()}
    for step in range(40):
        batch = task.batch(0, step, 500)
        rows = (batch.tokens if batch.source is None else batch.source).tolist()
        assert held_out.isdisjoint(tuple(sorted(row) if name == "sort" else row) for row in rows)
    everything = torch.randint(task.symbols, (8000, task.length))
    assert 0.10 < task.is_held_out(everything).float().mean() < 0.15


def test_targets_of_copy_sort_and_lookups() -> None:
    copy, sort, lookups = (make_task(name).batch(0, 0, 2) for name in ("copy", "sort", "lookups"))
    assert copy.source is not None
    assert sort.source is not None
    assert torch.equal(copy.targets, copy.source)
    assert copy.tokens[0].tolist() == [16, *copy.source[0, :-1].tolist()]
    assert sort.targets[1].tolist() == sorted(sort.source[1].tolist())
    row, targets = lookups.tokens[0].tolist(), lookups.targets[0].tolist()
    assert targets[:10] == [IGNORED] * 10
    wanted = [3 + 27 * row[i - 1] + 9 * row[i - 3] + 3 * row[i - 6] + row[i - 10] for i in range(10, 40)]
    assert targets[10:] == wanted


def test_bytes_hold_out_whole_files_of_the_standard_library() -> None:
    task = make_task("bytes", 64)
    held_out = task.held_out(40)
    assert torch.equal(held_out.tokens[:, 1:], held_out.targets[:, :-1])
    text = bytes(task.batch(0, 0, 200).tokens.flatten().tolist())
    assert text.count(b"self") > 20
    from headscope.training.tasks import _library

    train_text, held_out_text = (bytes(part.tolist()) for part in (_library().train, _library().held_out))
    assert len(train_text) > 5_000_000
    assert set(train_text.split(b"\0")) & set(held_out_text.split(b"\0")) <= {b"", b"\n"}
    rows = [bytes(row) for row in held_out.tokens.tolist()]
    assert all(row in held_out_text for row in rows)
    assert sum(row in train_text for row in rows) <= 2  # a licence may stand in files of both kinds


def test_parts_of_a_batch_join_to_the_batch() -> None:
    batch = make_task("copy").batch(0, 0, 12)
    parts = [batch.part(which, 3) for which in range(3)]
    assert [len(part.tokens) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.source for part in parts if part.source is not None]), batch.source)


def test_bytes_refuse_rows_longer_than_the_held_out_files() -> None:
    with pytest.raises(ValueError, match=r"bytes with rows of length 100000000: the held-out files have \d+ bytes"):
        make_task("bytes", 100_000_000).batch(0, 0, 1)
