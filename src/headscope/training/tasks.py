"""What there is to learn: tasks that need no download, each batch of them a function of seed and step."""

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

__all__ = ["IGNORED", "TASKS", "Task", "TrainingBatch", "generator", "make_task"]

IGNORED = -100  # a target that is not asked for
_HELD_OUT_SHARE = 8  # one in so many sequences is never trained on


@dataclass(frozen=True)
class TrainingBatch:
    """Rows to learn from.

    Attributes:
        tokens: [B, L], what the decoder reads.
        targets: [B, L], what each position should say; -100 where nothing is asked.
        source: [B, S], what the encoder reads; None in a decoder's task.
    """

    tokens: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]
    source: Int[Tensor, "B S"] | None = None

    def part(self, which: int, of: int) -> TrainingBatch:
        """One of ``of`` parts of the rows, of the same size; together they are the batch."""
        size = len(self.tokens) // of
        rows = slice(which * size, (which + 1) * size)
        return TrainingBatch(self.tokens[rows], self.targets[rows], None if self.source is None else self.source[rows])

    def to(self, device: torch.device) -> TrainingBatch:
        """The same on a device."""
        source = None if self.source is None else self.source.to(device)
        return TrainingBatch(self.tokens.to(device), self.targets.to(device), source)


def generator(*what: object) -> torch.Generator:
    """Random numbers that depend on ``what`` alone: a seed, a step, a purpose.

    >>> torch.randint(100, (3,), generator=generator(0, "batch", 5)).tolist()
    [87, 35, 44]
    """
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Task(ABC):
    """A task: batches to learn from, and held-out ones that never occur among them.

    Args:
        length: L, positions a row.

    Raises:
        ValueError: rows that are too short.
    """

    name: str
    about: str  # one line for the help
    kind: Literal["encoder-decoder", "decoder"]
    vocab_size: int
    unit: str  # what a position of the answer is
    length, shortest = 0, 4
    steps, batch_size, held_out_size = 600, 64, 256
    sizes: ClassVar[dict[str, Any]]  # of the model, unless others are given

    def __init__(self, length: int = 0) -> None:
        self.length = length or type(self).length
        if self.length < self.shortest:
            raise ValueError(f"{self.name} with rows of length {self.length}: at least {self.shortest}.")

    def model_config(self, **sizes: Any) -> TransformerConfig:
        """The task's own model; ``sizes`` change it.

        >>> make_task("copy").model_config(num_heads=2).num_heads
        2
        """
        room = {"vocab_size": self.vocab_size, "kind": self.kind, "max_length": 2 * self.length}
        return TransformerConfig(**(room | self.sizes | sizes))

    @property
    def identity(self) -> str:
        """What the data depends on besides the settings; runs with another identity are other runs."""
        return f"{self.name} 1"

    @abstractmethod
    def batch(self, seed: int, step: int, size: int) -> TrainingBatch:
        """The batch of a step: the same for the same arguments, whatever came before."""

    @abstractmethod
    def held_out(self, size: int) -> TrainingBatch:
        """Rows that no batch contains, the same in every run."""

    def exact(self, model: Transformer, batch: TrainingBatch) -> Bool[Tensor, " B"] | None:
        """Which rows the model writes without a mistake, token after token; None where that is no fair question."""
        return None


class _Sequences(Task):
    """Random sequences to be written anew; which ones are held out is decided by a hash of the answer."""

    kind: Literal["encoder-decoder", "decoder"] = "encoder-decoder"
    unit = "symbol"
    length, symbols = 10, 16
    vocab_size = symbols + 1  # and the token that an answer starts with
    sizes: ClassVar = {"embed_dim": 64, "num_heads": 4, "num_layers": 2, "ff_dim": 256, "dropout_p": 0.0}

    def batch(self, seed: int, step: int, size: int) -> TrainingBatch:
        """The batch of a step."""
        return self._answered(self._draw(size, generator(seed, self.name, "batch", step), held_out=False))

    def held_out(self, size: int) -> TrainingBatch:
        """Rows that no batch contains."""
        return self._answered(self._draw(size, generator(self.name, "held out"), held_out=True))

    def exact(self, model: Transformer, batch: TrainingBatch) -> Bool[Tensor, " B"] | None:
        """Which sequences the model writes without a mistake."""
        start = torch.full_like(batch.targets[:, :1], self.symbols)
        written = model.generate(start, batch.source, max_new_tokens=self.length)
        return (written[:, 1:] == batch.targets).all(1)

    def answer(self, source: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """What is to be written."""
        return source

    def is_held_out(self, source: Int[Tensor, "B L"]) -> Bool[Tensor, " B"]:
        """Which sequences belong to the held-out eighth; those of the same answer belong together."""
        return _hash(self.answer(source)) % _HELD_OUT_SHARE == 0

    def _random(self, size: int, random: torch.Generator) -> Tensor:
        """Rows, held out or not."""
        return torch.randint(self.symbols, (size, self.length), generator=random)

    def _draw(self, size: int, random: torch.Generator, held_out: bool) -> Tensor:
        found = torch.empty(0, self.length, dtype=torch.long)
        while len(found) < size:
            drawn = self._random(2 * size, random)
            found = torch.cat((found, drawn[self.is_held_out(drawn) == held_out]))
        return found[:size]

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
        """Rows of 2 to 16 different symbols: where all are drawn alike, it is rare that one stands there four times."""
        palette = torch.rand(size, self.symbols, generator=random).argsort(1)
        width = torch.randint(2, self.symbols + 1, (size, 1), generator=random)
        which = (torch.rand(size, self.length, generator=random) * width).long()
        return palette.gather(1, which)


class Lookups(_Sequences):
    """Name at each position what stood at four places before it, all four in one token.

    The places are counted from the position that answers, so no key can know which of them it is to be: a head that
    looks at several of them at once gets a mixture that does not say which value stood where.
    """

    name = "lookups"
    about = "say in one token what stood 1, 3, 6 and 10 places back (decoder)"
    kind = "decoder"
    unit = "answer"
    places, symbols = (1, 3, 6, 10), 3
    vocab_size = symbols + symbols ** len(places)
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
        """None: the answers are not a text that the model writes on."""
        return None

    def _answered(self, source: Tensor) -> TrainingBatch:
        targets = torch.full_like(source, IGNORED)
        first = max(self.places)
        found = torch.zeros_like(source[:, first:])
        for place in self.places:
            found = found * self.symbols + source[:, first - place : self.length - place]
        targets[:, first:] = self.symbols + found
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
        """The library changes from one Python to the next, and with it the task."""
        return f"bytes 1 {self._checked_library().digest}"

    def batch(self, seed: int, step: int, size: int) -> TrainingBatch:
        """Windows that begin anywhere in the training files."""
        data = self._checked_library().train
        random = generator(seed, self.name, "batch", step)
        return self._windows(data, torch.randint(len(data) - self.length, (size,), generator=random))

    def held_out(self, size: int) -> TrainingBatch:
        """Windows spread evenly over the held-out files."""
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
    """A task by its name, with rows of ``length`` positions (0: its own).

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
    """The standard library's modules in the order of their paths.

    Left out are tests, what others installed, and encodings, whose tables are alike from file to file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    texts: dict[bool, list[bytes]] = {True: [], False: []}
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        if left_out.isdisjoint(path.relative_to(root).parts):
            text = path.read_bytes()
            mark = hashlib.blake2b(text, digest_size=8).digest()
            digest.update(mark)
            texts[mark[0] < 16].append(text + b"\0")  # one file in 16; the same text is always on the same side
    train, held_out = (torch.frombuffer(bytearray(b"".join(texts[side])), dtype=torch.uint8) for side in (False, True))
    return _Library(train, held_out, digest.hexdigest())
