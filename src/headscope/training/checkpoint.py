"""Checkpoints: safetensors files that are loaded only if they are whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, uint8

from headscope.errors import HeadscopeError
from headscope.files import whole_file

FORMAT = "headscope-checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{1,12})\.safetensors")
_PARTS = re.compile(r"\.step-\d{1,12}\.\d+\.part\.safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a run.

    Attributes:
        step: Steps done.
        run: The settings of the run, as plain data.
        tensors: Weights and the optimizer's tensors, by name.
        path: The file.
    """

    step: int
    run: dict[str, Any]
    tensors: dict[str, Tensor]
    path: Path


class _NotWhole(Exception):
    """A truncated or damaged file."""


def save(folder: Path, step: int, run: dict[str, Any], tensors: dict[str, Tensor], *, keep: int = 2) -> Path:
    """Write a checkpoint to the disk, and remove all but the last ``keep``.

    Args:
        folder: The folder; it is created if it does not exist.
        step: Steps done.
        run: The settings of the run, as plain data.
        tensors: Weights and the optimizer's tensors, by name.
        keep: The number of checkpoints that stay.

    Raises:
        HeadscopeError: The file cannot be written.
    """
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"step": step, "run": run, "digest": _digest(step, run, data)}
    metadata = {"format": FORMAT, "version": str(VERSION), "checkpoint": json.dumps(header)}
    path = folder / f"step-{step:08d}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as scratch:
            save_file(data, scratch, metadata=metadata)
        for old in _checkpoint_paths(folder)[keep:]:
            old.unlink(missing_ok=True)
        for part in folder.iterdir():  # of a killed process
            if _PARTS.fullmatch(part.name):
                part.unlink(missing_ok=True)
    except OSError as error:
        raise HeadscopeError(f"Cannot write the checkpoint {path}: {error.strerror or error}.") from error
    return path


def latest(folder: Path, on_note: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The last checkpoint that is whole; None if there is none.

    Args:
        folder: The folder of the checkpoints.
        on_note: Called with a message for each file that is skipped.

    Raises:
        HeadscopeError: A checkpoint of another version of the format, or a file of another program.
    """
    for path in _checkpoint_paths(folder):
        try:
            return _load(path)
        except _NotWhole as reason:
            if on_note is not None:
                on_note(f"{path} is not whole and is skipped: {reason}.")
    return None


def _checkpoint_paths(folder: Path) -> list[Path]:
    """The paths of the checkpoints, the last step first."""
    if not folder.is_dir():
        return []
    matches = {path: match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return sorted(matches, key=lambda path: int(matches[path][1]), reverse=True)


def _load(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise HeadscopeError(
                    f"{path} is a file of another program, in the place of a checkpoint: its format is "
                    f"{str(metadata.get('format'))[:40]!r}, not {FORMAT!r}. Choose another folder."
                )
            if metadata.get("version") != str(VERSION):
                raise HeadscopeError(
                    f"{path} is a checkpoint of version {metadata.get('version', '')[:20]!r}, this Headscope reads "
                    f"version {VERSION}: use the Headscope that wrote it, or another folder."
                )
            header = json.loads(metadata["checkpoint"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        step, run, digest = int(header["step"]), dict(header["run"]), header["digest"]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _NotWhole(str(error)[:200]) from error
    if _digest(step, run, tensors) != digest:
        raise _NotWhole("its digest does not match its contents")
    return Checkpoint(step, run, tensors, path)


def _digest(step: int, run: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A digest of the run, the step, and each tensor's name, dtype, shape and bytes."""
    digest = hashlib.blake2b(json.dumps([step, run], sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()
