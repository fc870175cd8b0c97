"""Tasks that need no download; each batch is a function of seed and step."""

from __future__ import annotations

import hashlib
import sysconfig
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headscope.nn.transformer import Transformer, TransformerConfig

IGNORED = -100  # a target that does not count
_HELD_OUT_SHARE = 8  # one in so many sequences is never trained on


@dataclass(frozen=True)
class TrainingBatch:
    """Rows to learn from.

    Attributes:
        tokens: [B, L], the input of the decoder.
        targets: [B, L], the right token for each position; -100 where it does not count.
        source: [B, S], the input of the encoder; None in a task for decoders.
    """

    tokens: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]
    source: Int[Tensor, "B S"] | None = None

    def part(self, which: int, of: int) -> TrainingBatch:
        """Part ``which`` of ``of`` equal parts of the rows."""
        size = len(self.tokens) // of
        return self.rows(slice(which * size, (which + 1) * size))

    def rows(self, rows: slice) -> TrainingBatch:
        """The batch of some of the rows."""
        return TrainingBatch(self.tokens[rows], self.targets[rows], None if self.source is None else self.source[rows])

    def to(self, device: torch.device) -> TrainingBatch:
        """The batch on a device."""
        source = None if self.source is None else self.source.to(device)
        return TrainingBatch(self.tokens.to(device), self.targets.to(device), source)


def generator(*key: object) -> torch.Generator:
    """Random numbers that depend only on ``key``: a seed, a step, a purpose.

    >>> torch.randint(100, (3,), generator=generator(0, "batch", 5)).tolist()
    [87, 35, 44]
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Task(ABC):
    """A task: batches to learn from, and held-out rows that never occur in them.

    Args:
        length: L, positions per row.

    Raises:
        ValueError: rows that are too short.
    """

    name: str
    about: str  # one line for the help
    kind: Literal["encoder-decoder", "decoder"]
    vocab_size: int
    unit: str  # the noun for a target
    length, shortest = 0, 4
    steps, batch_size, held_out_size = 600, 64, 256
    sizes: ClassVar[dict[str, Any]]  # of the default model

    def __init__(self, length: int = 0) -> None:
        self.length = length or type(self).length
        if self.length < self.shortest:
            raise ValueError(f"{self.name} with rows of length {self.length}: at least {self.shortest}.")

    def model_config(self, **sizes: Any) -> TransformerConfig:
        """The task's default model with some ``sizes`` replaced.

        >>> make_task("copy").model_config(num_heads=2).num_heads
        2
        """
        required = {"vocab_size": self.vocab_size, "kind": self.kind, "max_length": 2 * self.length}
        return TransformerConfig(**(required | self.sizes | sizes))

    @property
    def identity(self) -> str:
        """A name for the data; a checkpoint for data with another identity is refused."""
        return f"{self.name} 1"

    @abstractmethod
    def batch(self, seed: int, step: int, size: int) -> TrainingBatch:
        """The batch of a step; it depends only on the arguments."""

    @abstractmethod
    def held_out(self, size: int) -> TrainingBatch:
        """Rows that no batch contains; the same in every run."""

    def exact(self, model: Transformer, batch: TrainingBatch) -> Bool[Tensor, " B"] | None:
        """Whether the model writes each row without a mistake; None for a task that does not measure it."""
        return None


class _Sequences(Task):
    """Random sequences to copy or transform; a hash of the answer decides which are held out."""

    kind: Literal["encoder-decoder", "decoder"] = "encoder-decoder"
    unit = "symbol"
    length, symbols = 10, 16
    vocab_size = symbols + 1  # and the start token
    sizes: ClassVar = {"embed_dim": 64, "num_heads": 4, "num_layers": 2, "ff_dim": 256, "dropout_p": 0.0}

    def batch(self, seed: int, step: int, size: int) -> TrainingBatch:
        return self._answered(self._draw(size, generator(seed, self.name, "batch", step), held_out=False))

    def held_out(self, size: int) -> TrainingBatch:
        return self._answered(self._draw(size, generator(self.name, "held out"), held_out=True))

    def exact(self, model: Transformer, batch: TrainingBatch) -> Bool[Tensor, " B"] | None:
        start = torch.full_like(batch.targets[:, :1], self.symbols)
        written = model.generate(start, batch.source, max_new_tokens=self.length)
        return (written[:, 1:] == batch.targets).all(1)

    def answer(self, source: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """The right output."""
        return source

    def is_held_out(self, source: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """Whether each sequence is in the held-out eighth; sequences with the same answer are on the same side."""
        return _hash(self.answer(source)) % _HELD_OUT_SHARE == 0

    def _random(self, size: int, random: torch.Generator) -> Tensor:
        """Rows from both sides."""
        return torch.randint(self.symbols, (size, self.length), generator=random)

    def _draw(self, size: int, random: torch.Generator, held_out: bool) -> Tensor:
        rows = torch.empty(0, self.length, dtype=torch.long)
        while len(rows) < size:
            drawn = self._random(2 * size, random)
            rows = torch.cat((rows, drawn[self.is_held_out(drawn) == held_out]))
        return rows[:size]

    def _answered(self, source: Tensor) -> TrainingBatch:
        targets = self.answer(source)
        start = torch.full_like(targets[:, :1], self.symbols)
        return TrainingBatch(torch.cat((start, targets[:, :-1]), 1), targets, source)


class Copy(_Sequences):
    """Write a sequence again."""

    name = "copy"
    about = "write a random sequence again (encoder-decoder)"


class Sort(_Sequences):
    """Write a sequence in order."""

    name = "sort"
    about = "write a random sequence in order (encoder-decoder)"
    steps = 2000

    def answer(self, source: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """The symbols, the smallest first."""
        return source.sort(1).values

    def _random(self, size: int, random: torch.Generator) -> Tensor:
        """Rows with a palette of 2 to 16 symbols; with uniform symbols, a row rarely has one of them four times."""
        palette = torch.rand(size, self.symbols, generator=random).argsort(1)
        width = torch.randint(2, self.symbols + 1, (size, 1), generator=random)
        index = (torch.rand(size, self.length, generator=random) * width).long()
        return palette.gather(1, index)


class Lookups(_Sequences):
    """Predict one token that encodes the symbols at four offsets before each position.

    Offsets count from the query, so the values of the keys do not contain them. A head that attends to several of the
    four positions gets a mixture of their symbols, without their order.
    """

    name = "lookups"
    about = "name in one token the symbols 1, 3, 6 and 10 positions back (decoder)"
    kind = "decoder"
    unit = "answer"
    offsets, symbols = (1, 3, 6, 10), 3
    vocab_size = symbols + symbols ** len(offsets)
    length, shortest, batch_size = 40, 16, 32
    sizes: ClassVar = {
        "embed_dim": 64,
        "num_heads": 4,
        "num_layers": 1,
        "ff_dim": 256,
        "dropout_p": 0.0,
        "position": "rotary",
    }

    def exact(self, model: Transformer, batch: TrainingBatch) -> Bool[Tensor, " B"] | None:
        """None: the targets are not the next tokens of the text."""
        return None

    def _answered(self, source: Tensor) -> TrainingBatch:
        targets = torch.full_like(source, IGNORED)
        first = max(self.offsets)
        code = torch.zeros_like(source[:, first:])
        for offset in self.offsets:
            code = code * self.symbols + source[:, first - offset : self.length - offset]
        targets[:, first:] = self.symbols + code
        return TrainingBatch(source, targets)


class Bytes(Task):
    """The bytes of Python's own library, each predicted from those before it."""

    name = "bytes"
    about = "predict the next byte of the Python standard library's source (decoder)"
    kind = "decoder"
    unit = "byte"
    vocab_size = 256
    length, batch_size, steps, held_out_size = 128, 16, 1000, 128
    sizes: ClassVar = {
        "embed_dim": 128,
        "num_heads": 4,
        "num_layers": 4,
        "ff_dim": 512,
        "dropout_p": 0.0,
        "position": "rotary",
    }

    @property
    def identity(self) -> str:
        """The library and with it the data differ between Python versions."""
        return f"bytes 1 {self._checked_library().digest}"

    def batch(self, seed: int, step: int, size: int) -> TrainingBatch:
        """Random windows of the training files."""
        data = self._checked_library().train
        random = generator(seed, self.name, "batch", step)
        return self._windows(data, torch.randint(len(data) - self.length, (size,), generator=random))

    def held_out(self, size: int) -> TrainingBatch:
        """Windows at equal distances in the held-out files."""
        data = self._checked_library().held_out
        return self._windows(data, torch.arange(size) * (len(data) - self.length - 1) // size)

    def _checked_library(self) -> _Library:
        library = _library()
        if self.length >= len(library.held_out):
            raise ValueError(
                f"bytes with rows of length {self.length}: the held-out files have {len(library.held_out)} bytes."
            )
        return library

    def _windows(self, data: Tensor, starts: Tensor) -> TrainingBatch:
        rows = data[starts[:, None] + torch.arange(self.length + 1)].long()
        return TrainingBatch(rows[:, :-1], rows[:, 1:])


TASKS: dict[str, type[Task]] = {task.name: task for task in (Copy, Sort, Lookups, Bytes)}


def make_task(name: str, length: int = 0) -> Task:
    """A task by its name, with rows of ``length`` positions (0: the task's default).

    Raises:
        ValueError: no such task, or too short a length.

    >>> batch = make_task("sort", length=5).batch(seed=0, step=0, size=1)
    >>> batch.source.tolist(), batch.targets.tolist()
    ([[5, 5, 11, 11, 5]], [[5, 5, 5, 11, 11]])
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}. The tasks are: {', '.join(TASKS)}.")
    return TASKS[name](length)


def _hash(rows: Tensor) -> Tensor:
    """A number below 2³¹ for each row."""
    code = torch.zeros(len(rows), dtype=torch.long)
    for column in rows.T:
        code = (code * 1_000_003 + column + 1) % 2_147_483_647
    return code * 48_271 % 2_147_483_647


@dataclass(frozen=True)
class _Library:
    train: Tensor  # bytes, files one after another
    held_out: Tensor
    digest: str


@lru_cache(maxsize=1)
def _library() -> _Library:
    """The bytes of the standard library's modules in the order of their paths.

    Without tests, installed packages, and encodings, whose tables repeat from file to file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        if excluded.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes()
            mark = hashlib.blake2b(text, digest_size=8).digest()
            digest.update(mark)
            texts[mark[0] < 16].append(text + b"\0")  # one file in 16; the same text is always on the same side
    train, held_out = (torch.frombuffer(bytearray(b"".join(texts[side])), dtype=torch.uint8) for side in (False, True))
    return _Library(train, held_out, digest.hexdigest())
