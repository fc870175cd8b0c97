"""A sweep over the catalogue: build every type, run it twice, and see which way its attention goes.

From the root of the repository: `PYTHONPATH=. python tests/zoo/check.py table.json [type ...]`.
"""

import json
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from tests.watching.zoo.catalog import ZOO, ZooModel, first_tensors
from tests.watching.zoo.reference import EagerCall, eager_calls, softmax_difference

SECONDS = 15
_LINE = "{:42}{:16}{:>10}{:>6}{:>9}  {:5}{:>6}  {}"
_LOOKS_LIKE_ATTENTION = re.compile(r"Attention|Attn")


@dataclass
class Row:
    """What one type did."""

    name: str
    family: str
    interface: int = 0  # calls through AttentionInterface
    sdpa: int = 0  # calls of F.scaled_dot_product_attention outside it
    torch_nn: int = 0  # calls of nn.MultiheadAttention
    silent: list[str] = field(default_factory=list)  # classes named like attention that did none of these
    finite: bool = False
    identical: bool = False
    eager: str = ""  # how eager's weights compare with softmax(q k scale + mask)
    kwargs: list[str] = field(default_factory=list)
    parameters: int = 0
    seconds: float = 0.0
    error: str = ""


class Ways(TorchFunctionMode):
    """Counts attention calls by the way they take, and finds attention modules that make none."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.row = row
        self.inside = 0  # depth of calls that are counted already
        self.started: list[int] = []
        self.silent: set[str] = set()

    def total(self) -> int:
        return self.row.interface + self.row.sdpa + self.row.torch_nn

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.scaled_dot_product_attention and not self.inside:
            self.row.sdpa += 1
        return function(*args, **(kwargs or {}))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.row.interface += 1
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return call

    def enter(self, module: nn.Module, _: Any) -> None:
        self.started.append(self.total())
        if isinstance(module, nn.MultiheadAttention):
            self.row.torch_nn += 1
            self.inside += 1

    def leave(self, module: nn.Module, _: Any, __: Any) -> None:
        if isinstance(module, nn.MultiheadAttention):
            self.inside -= 1
        if self.started.pop() == self.total():
            self.silent.add(type(module).__name__)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count what `model` does."""
        original = AttentionInterface.get_interface
        ways = self

        def get_interface(self: AttentionInterface, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
            return ways.counted(original(self, name, default))

        attentions = [m for m in model.modules() if _LOOKS_LIKE_ATTENTION.search(type(m).__name__)]
        hooks = [m.register_forward_pre_hook(self.enter) for m in attentions]
        hooks += [m.register_forward_hook(self.leave) for m in attentions]
        AttentionInterface.get_interface = get_interface
        try:
            with self:
                yield
        finally:
            AttentionInterface.get_interface = original
            for hook in hooks:
                hook.remove()
            self.row.silent = sorted(self.silent)


class TimeIsUp(BaseException):
    """Not an Exception, so that no library catches it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeIsUp

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def check(entry: ZooModel) -> Row:
    """Build one type, run it, and say what it did. Whatever goes wrong is in the row."""
    row = Row(entry.name, entry.family)
    start = time.monotonic()
    try:
        with time_limit(SECONDS), torch.no_grad():
            _measure(entry, row)
    except TimeIsUp:
        row.error = f"not done in {SECONDS} s"
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}"[:300]
    row.seconds = round(time.monotonic() - start, 2)
    return row


def _measure(entry: ZooModel, row: Row) -> None:
    model = entry.build()
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    inputs = entry.inputs(model)
    first = _outputs(model, inputs)
    row.finite = bool(first) and all(bool(torch.isfinite(tensor).all()) for tensor in first)
    again = entry.inputs(model)
    with Ways(row).watching(model):
        second = _outputs(model, again)
    row.identical = len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if row.interface:
        _measure_eager(eager_calls(model, inputs), row)


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return first_tensors(model(**inputs))


def _measure_eager(calls: list[EagerCall], row: Row) -> None:
    row.kwargs = sorted({name for call in calls for name, value in call.kwargs.items() if value is not None})
    missing = sum(call.weights is None for call in calls)
    differences = [softmax_difference(call) for call in calls if call.weights is not None]
    worst = max(differences, default=0.0)
    row.eager = f"{len(calls)} calls, difference {worst:.0e}" + (f", {missing} without weights" if missing else "")


def main(path: str, names: list[str]) -> None:
    """Check the named types, or all, print a table and write it to `path`."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    print(_LINE.format("type", "family", "interface", "sdpa", "torch.nn", "same", "s", "rest"))
    for name in names or sorted(ZOO):
        row = check(ZOO[name])
        rows.append(row)
        rest = row.error or "; ".join(filter(None, [" ".join(row.silent), row.eager]))
        counts = (row.interface, row.sdpa, row.torch_nn)
        same = "yes" if row.identical and row.finite else "NO"
        print(
            _LINE.format(row.name, row.family, *counts, same, row.seconds, rest),
            flush=True,
        )
    with open(path, "w") as file:
        json.dump([asdict(row) for row in rows], file, indent=1)
    failed = [row.name for row in rows if row.error or not (row.identical and row.finite)]
    print(f"{len(rows)} types, {len(failed)} failed: {' '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
