"""Record every type of the catalogue, hold it against the model's own eager maps, and write docs/models.md.

From the root of the repository: `PYTHONPATH=. python -m tests.watching.zoo.sweep [type ...] [--write docs/models.md]`.
"""

import argparse
import copy
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

from headscope.errors import HeadscopeError, NothingSeen, ProofError, UnsupportedAttention
from headscope.watching.recording import Recording, record
from tests.watching.zoo.catalog import ZOO, first_tensors
from tests.watching.zoo.reference import EagerCall, eager_calls

SECONDS = 60
CLOSE = 1e-5
CLOSE_KERNELS = 5e-5  # SDPA and eager round differently, and later layers see the difference
_COLUMNS = ("type", "family", "sites", "modules", "way in", "rebuilt to", "maps", "maps of eager", "verdict")
_BECAUSE = dict.fromkeys(("inkling2", "inkling2_text"), "its sinks are different for each query")
_HIDDEN = torch.finfo(torch.float32).min / 2


@dataclass(frozen=True)
class Row:
    """What became of one type."""

    name: str
    family: str
    sites: int = 0  # attention sites seen
    modules: int = 0  # modules that they are in
    unseen: int = 0  # modules named like attention that ran and were not seen
    ways: str = ""
    proof: float | None = None
    maps: float | None = None  # largest difference from eager's maps, recorded as the model runs by itself
    eager: float | None = None  # the same, recorded from a run with eager attention
    compared: int = 0  # sites whose maps were compared
    same: bool = False  # outputs equal to the bit with and without record
    verdict: str = ""

    @property
    def clean(self) -> bool:
        """Recorded, and nothing differs."""
        close = (self.maps or 0.0) < CLOSE_KERNELS and (self.eager or 0.0) < CLOSE
        return self.same and close and self.verdict.startswith("recorded")

    def fixed(self) -> tuple[str, ...]:
        """The columns that do not depend on the machine: all but the three differences."""
        cells = self.cells()
        return (*cells[:5], cells[8])

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        ran = f"{self.modules} of {self.modules + self.unseen}"
        numbers = (_short(self.proof), _short(self.maps), _short(self.eager))
        return (self.name, self.family, str(self.sites or "–"), ran, self.ways or "–", *numbers, self.verdict)


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


def examine(name: str, seconds: int = SECONDS) -> Row:
    """Build one type, run it with and without record, and compare. Refusals are in the row."""
    entry = ZOO[name]
    row = Row(name, entry.family)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    try:
        with time_limit(seconds), torch.no_grad():
            return _measure(row, entry.build())
    except TimeIsUp:
        return replace(row, verdict=f"not done in {seconds} s")
    except Exception as error:
        return replace(row, verdict=f"ERROR {type(error).__name__}: {error}"[:300].replace("\n", " "))


def _measure(row: Row, model: nn.Module) -> Row:
    plain, inputs = _run(model, ZOO[row.name].inputs(model)), ZOO[row.name].inputs(model)
    try:
        with record(model) as recording:
            watched = _run(model, inputs)
    except HeadscopeError as error:
        return _refused(row, error, model)
    same = len(plain) == len(watched) and all(_equal(a, b) for a, b in zip(plain, watched, strict=True))
    sites = [site for run in recording.runs for site in run.sites]
    row = replace(
        row,
        sites=len(sites),
        modules=len({site.name for site in sites}),
        unseen=len(recording.unseen),
        ways=", ".join(sorted({site.way for site in sites})),
        proof=recording.proof,
        same=same,
        verdict="recorded" if not recording.unseen else f"recorded in part; {_why_unseen(model, row.name, recording)}",
    )
    if "huggingface" in row.ways:
        row = _compare(row, model, recording)
    if not same:
        row = replace(row, verdict="OUTPUTS CHANGED")
    elif not row.clean:
        row = replace(row, verdict=f"MAPS DIFFER, {row.verdict}")
    return row


def _run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return first_tensors(model(**inputs))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def _refused(row: Row, error: HeadscopeError, model: nn.Module) -> Row:
    kinds = {NothingSeen: "not seen", ProofError: "refused by the proof", UnsupportedAttention: "refused"}
    kind = kinds.get(type(error), "refused")
    if isinstance(error, NothingSeen):
        return replace(row, verdict=f"{kind}: {_own_way(model, row.name)}")
    if isinstance(error, ProofError):
        return replace(row, verdict=f"{kind}: {_BECAUSE.get(row.name, 'not softmax of q·k as it was passed on')}")
    return replace(row, verdict=f"{kind}: {error}")


class _Softmaxes(TorchDispatchMode):
    """Counts softmaxes over something square enough to be attention: below which module they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += "_softmax" in str(func) and args[0].dim() >= 3
        return func(*args, **(kwargs or {}))


def _own_way(model: nn.Module, name: str) -> str:
    with _Softmaxes() as softmaxes:
        _run(model, ZOO[name].inputs(model))
    return "own matmul and softmax" if softmaxes.seen else "no softmax (not this kind of attention)"


def _why_unseen(model: nn.Module, name: str, recording: Recording) -> str:
    """In words: the kinds of the modules that were not seen."""
    modules = dict(model.named_modules())
    kinds = sorted({type(modules[unseen]).__name__ for unseen in recording.unseen})
    return f"not {', '.join(kinds)}"


def _compare(row: Row, model: nn.Module, recording: Recording) -> Row:
    """Hold recorded maps against what the model's eager functions return."""
    inputs = ZOO[row.name].inputs(model)
    try:
        torch.manual_seed(0)
        calls = [call for call in eager_calls(model, inputs) if call.weights is not None]
    except (ValueError, ImportError, AttributeError) as error:
        return replace(row, verdict=f"{row.verdict}; no eager to compare with ({type(error).__name__})")
    if not calls:
        return row
    if any(bool(call.weights.isnan().any()) for call in calls if call.weights is not None):
        return replace(row, verdict=f"{row.verdict}; its own eager gives NaN")
    maps = list(_differences(recording, calls, inputs))
    eager_model = copy.deepcopy(model)
    eager_model.set_attn_implementation("eager")
    with record(eager_model) as again:
        _run(eager_model, inputs)
    eager = list(_differences(again, calls, inputs))
    return replace(row, maps=max(maps, default=None), eager=max(eager, default=None), compared=len(maps))


def _differences(recording: Recording, calls: list[EagerCall], inputs: dict[str, Any]) -> Iterator[float]:
    """The largest difference of each eager call's map from the one recorded, on rows that are text."""
    matrices = {(s.name, s.occurrence): m for run in recording.runs for s, m in zip(run.sites, run, strict=True)}
    counts: dict[str, int] = {}
    for call in calls:
        occurrence = counts.get(call.name, 0)
        counts[call.name] = occurrence + 1
        matrix = matrices.get((call.name, occurrence))
        if matrix is None or call.weights is None:
            yield float("inf")
            continue
        wanted = applied(call)
        got = matrix.dense()
        rows = text_rows(call, inputs.get("attention_mask"))
        difference = (got - wanted[..., : got.shape[-1]]).abs().amax(-1)
        difference = torch.maximum(difference, wanted[..., got.shape[-1] :].abs().sum(-1))
        yield float(difference[rows.expand_as(difference)].amax()) if rows.any() else 0.0


def applied(call: EagerCall) -> Tensor:
    """The weights that an eager call applied: what it returned, but for types that scale the output afterwards."""
    assert call.weights is not None
    weights = call.weights.float()
    if "GraniteSWA" not in type(call.module).__name__ and "GraniteMoeSWA" not in type(call.module).__name__:
        return weights
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    scores = call.query @ key.transpose(-1, -2) * call.kwargs["scaling"]
    if isinstance(call.mask, Tensor):
        scores = scores + call.mask[..., : scores.shape[-1]]
    sinks = call.module.sinks.view(1, -1, 1, 1)
    return weights * torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks)


def text_rows(call: EagerCall, attention_mask: Any) -> Tensor:
    """Query rows [B, 1|H, L] that are text and may see something."""
    assert call.weights is not None
    batch, _, queries, _ = call.weights.shape
    rows = torch.ones(batch, 1, queries, dtype=torch.bool)
    if isinstance(attention_mask, Tensor) and tuple(attention_mask.shape) == (batch, queries):
        rows = rows & attention_mask.bool()[:, None]
    if isinstance(call.mask, Tensor) and call.mask.dim() == 4:
        seen = call.mask if call.mask.dtype == torch.bool else call.mask > _HIDDEN
        rows = rows & seen.any(-1)
    return rows


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:.0e}"


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown, sorted by family and type."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in sorted(rows, key=lambda row: (row.family, row.name))]
    return "\n".join(lines)


def read_table(page: str) -> dict[str, tuple[str, ...]]:
    """The fixed columns of each type's row, by type, from a page that this script wrote."""
    rows = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(_COLUMNS) and cells[0] in ZOO:
            rows[cells[0]] = (*cells[:5], cells[8])
    return rows


def page(rows: list[Row]) -> str:
    """docs/models.md."""
    recorded = [row for row in rows if row.verdict.startswith("recorded")]
    part = [row for row in recorded if "in part" in row.verdict]
    refused = [row for row in rows if row.verdict.startswith("refused")]
    unseen = [row for row in rows if row.verdict.startswith("not seen")]
    compared = [row for row in recorded if row.maps is not None]
    maps = sum(row.compared for row in compared)
    proofs = [row.proof for row in recorded if row.proof is not None]
    numbers = {
        "types": len(rows),
        "recorded": len(recorded),
        "part": len(part),
        "refused": len(refused),
        "unseen": len(unseen),
        "compared": len(compared),
        "maps": maps,
        "worst_proof": _short(max(proofs, default=None)),
        "worst_map": _short(max((row.maps for row in compared if row.maps is not None), default=None)),
        "worst_eager": _short(max((row.eager for row in compared if row.eager is not None), default=None)),
        "transformers": transformers.__version__,
        "torch": re.sub(r"\+.*", "", torch.__version__),
        "table": table(rows),
    }
    return _PAGE.format(**numbers)


_PAGE = """# Which models can be recorded

Every model type of transformers that can be built small from its own config was built with random weights
(far from uniform attention), run twice on the same padded batch, without and with `record`, and compared.
Made with transformers {transformers} and torch {torch} by

    PYTHONPATH=. python -m tests.watching.zoo.sweep --write docs/models.md

Of {types} types **{recorded} are recorded** ({part} of them in part), {refused} are refused and {unseen} are not seen.
All recorded ones give the same outputs to the last bit with and without `record`; the largest difference of a
rebuilt output is {worst_proof}. {compared} of them have eager functions that return maps: all {maps} maps agree with
the recorded ones, the largest difference is {worst_map}; recorded from eager itself it is {worst_eager}.

What the columns say:

- *sites*: attention calls of one forward, each of which is a matrix of the recording.
- *modules*: modules that were seen to attend, of those and the modules that ran and are only named like attention.
- *way in*: where the calls were seen; docs/structure.md lists the four ways.
- *rebuilt to*: the proof. P @ V of four rows of every call, relative to what the model's own function returned.
- *maps*: largest difference of a recorded weight from the map that the model's eager function returned, where the
  recorded model ran as it does by default (mostly SDPA); *maps of eager*: where it ran with eager attention itself.
  Rows of padding, and rows that may see nothing at all, are left out of the maps. "–": no eager function returned maps.
- *verdict*: "recorded"; "in part": the named kinds of modules ran and were not seen; "not seen": every attention of
  the model is its own arithmetic, `record` raises `NothingSeen` and names the modules; "refused": `record` raises
  `ProofError` or `UnsupportedAttention` and gives no weights.

Eager maps are taken as returned, except granite_swa and granitemoe_swa: they return maps that their sinks have not
yet scaled, so the sinks' factor is applied before comparing. Another copy of a type may come from other code
(`trust_remote_code`): the proof is made again in every recording, this table is only a forecast.

{table}
"""


def main() -> None:
    """Examine the named types, or all; print each row, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=Path, help="where to write the page")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    names = arguments.names or sorted(ZOO)
    rows = []
    with ProcessPoolExecutor(
        arguments.jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for row in pool.map(examine, names, repeat(SECONDS)):
            rows.append(row)
            print(" | ".join(row.cells()), "" if row.same or not row.sites else "CHANGED", flush=True)
    expected = ("not seen", "refused")
    bad = [row.name for row in rows if not row.clean and not row.verdict.startswith(expected)]
    print(
        f"{len(rows)} types, {sum(row.clean for row in rows)} recorded and clean; not clean: {' '.join(bad) or 'none'}"
    )
    if arguments.write:
        arguments.write.write_text(page(rows), encoding="utf-8")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
