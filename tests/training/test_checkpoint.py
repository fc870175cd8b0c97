"""Checkpoints: whole or not loaded."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from headscope.errors import HeadscopeError
from headscope.training import (
    checkpoint,
)

ROOT = Path(__file__).parent.parent.parent


def saved(folder: Path, step: int, value: float = 1.0) -> Path:
    tensors = {"model.a": torch.full((40, 30), value), "model.b": torch.tensor(value)}
    return checkpoint.save(folder, step, {"config": {}, "loss": 0.5}, tensors)


def test_last_two_checkpoints_stay_and_load_unchanged(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.123.part.safetensors").write_bytes(b"left by a killed process")
    (tmp_path / "notes.txt").write_text("mine")
    for step in (9, 10, 11):
        saved(tmp_path, step, value=step / 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "step-00000010.safetensors", "step-00000011.safetensors"]
    loaded = checkpoint.latest(tmp_path)
    assert loaded is not None
    assert (loaded.step, loaded.run) == (11, {"config": {}, "loss": 0.5})
    assert torch.equal(loaded.tensors["model.a"], torch.full((40, 30), 11 / 3))
    assert loaded.tensors["model.b"].shape == ()
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: done.append(name) or real(*args))
    saved(tmp_path, 10)
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 0.999])
def test_truncated_checkpoint_is_never_loaded(share: float, tmp_path: Path) -> None:
    saved(tmp_path, 10)
    last = saved(tmp_path, 20)
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    notes: list[str] = []
    loaded = checkpoint.latest(tmp_path, notes.append)
    assert loaded is not None
    assert loaded.step == 10
    (note,) = notes
    assert note.startswith(f"{last} is not whole and is skipped: ")


def test_damaged_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    good = path.read_bytes()
    for damaged in (good[:-8] + bytes(8), good.replace(b'\\"step\\": 10', b'\\"step\\": 11'), b"\xff" * 2000):
        assert damaged != good
        path.write_bytes(damaged)
        notes: list[str] = []
        assert checkpoint.latest(tmp_path, notes.append) is None
        assert len(notes) == 1
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(HeadscopeError, match="its format is 'None', not 'headscope-checkpoint'"):
        checkpoint.latest(tmp_path)


def test_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 10)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | {"version": "7"})
    with pytest.raises(HeadscopeError, match=r"checkpoint of version '7', this Headscope reads version 1: use the"):
        checkpoint.latest(tmp_path)


def test_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadscopeError, match=r"Cannot write the checkpoint .*step-00000003.*: (File exists|Not a dir)"):
        saved(tmp_path / "file", 3)


def test_training_never_pickles() -> None:
    for path in (ROOT / "src" / "headscope" / "training").glob("*.py"):
        assert not re.search(r"pickle|torch\.(save|load)\b|_object", path.read_text("utf-8")), path
