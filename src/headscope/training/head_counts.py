"""One head or many: models that differ only in their number of heads, trained and compared over several seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from headscope.errors import HeadscopeError
from headscope.files import kind_by_start, output_path, whole_file
from headscope.training import TrainConfig, TrainingStep, make_task, train
from headscope.training.head_distances import head_distance

# Student's t that leaves 2.5 % on each side, for 1, 2, … degrees of freedom; above 30 the normal distribution's.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_TEXTS = 8  # held-out texts on which heads are compared


@dataclass(frozen=True)
class ExperimentPlan:
    """What is trained.

    Attributes:
        configs: One for each task; each run replaces the number of heads and the seed.
        heads: Numbers of heads.
        seeds: Each seed is used with every number of heads, so that first weights and data are the same.
    """

    configs: tuple[TrainConfig, ...]
    heads: tuple[int, ...] = (1, 2, 4, 8)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def runs(self) -> list[tuple[TrainConfig, int]]:
        """The settings and the number of heads of each run, one seed after another."""
        return [
            (replace(config, seed=seed, model=replace(config.sizes, num_heads=heads)), heads)
            for seed in self.seeds
            for config in self.configs
            for heads in self.heads
        ]


def _plan(lookup_steps: int, byte_steps: int, **others: Any) -> ExperimentPlan:
    small = make_task("bytes").model_config(embed_dim=64, num_layers=2, ff_dim=256)
    common: dict[str, Any] = {"precision": "float32"}
    lookups = TrainConfig("lookups", steps=lookup_steps, **common)
    return ExperimentPlan(
        (lookups, TrainConfig("bytes", steps=byte_steps, batch_size=8, model=small, **common)), **others
    )


FULL = _plan(400, 300)
QUICK = _plan(160, 40, heads=(1, 4), seeds=(0, 1, 2))


@dataclass(frozen=True)
class RunOutcome:
    """The result of one run.

    Attributes:
        task: Its task.
        heads: The number of heads.
        seed: Its seed.
        loss: On held-out rows, in nats per target.
        distance: Between the heads of a layer, see :mod:`headscope.training.head_distances`; NaN for one head.
        parameters: The number of parameters of the model.
        seconds: The time of the run.
    """

    task: str
    heads: int
    seed: int
    loss: float
    distance: float
    parameters: int
    seconds: float


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds and half the width of its 95 % interval (Student's t); NaN where there are too few seeds."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half_width

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.3f}" if math.isnan(self.half_width) else f"{self.mean:.3f} ± {self.half_width:.3f}"


def mean_of(values: Sequence[float]) -> SeedMean:
    """The mean of one value per seed, with its 95 % interval.

    >>> print(mean_of([1.0, 2.0, 3.0]))  # 4.303 · 1 / √3
    2.000 ± 2.484
    """
    if len(values) < 2:
        return SeedMean(values[0] if values else math.nan, math.nan)
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.960
    return SeedMean(fmean(values), t * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class HeadCountRow:
    """One number of heads in one task, over all seeds.

    Attributes:
        task: The task.
        heads: The number of heads.
        head_dim: Their size.
        loss: Held-out, in nats per target.
        gain: The loss with one head minus this loss, seed by seed.
        step: The loss with the next smaller number of heads minus this loss, seed by seed.
        distance: Between the heads of a layer.
    """

    task: str
    heads: int
    head_dim: int
    loss: SeedMean
    gain: SeedMean
    step: SeedMean
    distance: SeedMean


@dataclass(frozen=True)
class ExperimentReport:
    """The result of the experiment.

    Attributes:
        rows: One for each task and number of heads.
        outcomes: Every run.
        verdicts: The comparisons in sentences.
    """

    rows: list[HeadCountRow]
    outcomes: list[RunOutcome]
    verdicts: list[str]

    def markdown(self) -> str:
        """Tables and verdicts as Markdown."""
        seeds = len({outcome.seed for outcome in self.outcomes})
        lines = ["# One head or many", ""]
        lines += [
            f"Mean over {seeds} seeds ± half of the 95 % interval. Held-out loss in nats per target, lower is better."
        ]
        for task in dict.fromkeys(row.task for row in self.rows):
            count = next(outcome.parameters for outcome in self.outcomes if outcome.task == task)
            lines += ["", f"## {task}: {count:,} parameters, whatever the number of heads", ""]
            lines += ["| heads | head size | held-out loss | lower than one head by | distance between heads |"]
            lines += ["|---:|---:|---:|---:|---:|"]
            for row in (row for row in self.rows if row.task == task):
                cells = (row.heads, row.head_dim, row.loss, row.gain, row.distance)
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines += ["", "## What came out", "", *(f"- {verdict}" for verdict in self.verdicts), ""]
        return "\n".join(lines)

    def data(self) -> dict[str, Any]:
        """Rows, outcomes and verdicts as plain data; NaN becomes None."""
        rows = [asdict(row) for row in self.rows]
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return {"rows": finite_or_none(rows), "runs": finite_or_none(outcomes), "verdicts": self.verdicts}

    def csv(self) -> str:
        """The outcomes as CSV, one line per run."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(RunOutcome.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(finite_or_none([asdict(outcome) for outcome in self.outcomes]))
        return text.getvalue()


def compare_head_counts(
    folder: str | Path,
    plan: ExperimentPlan = FULL,
    *,
    force: bool = False,
    on_progress: Callable[[int, int, str], None] | None = None,
    on_outcome: Callable[[RunOutcome], None] | None = None,
) -> ExperimentReport:
    """Train models that differ only in their number of heads, and compare them.

    Each finished run is saved, so that the same call resumes after an interruption. The report is written into the
    folder as ``one-or-many.md``, ``.json`` and ``.csv``.

    Args:
        folder: Where results go; it is created if it does not exist.
        plan: What is trained.
        force: Whether the reports may overwrite files of another kind.
        on_progress: Called after each training step with the steps done in all runs, their total, and the run's name.
        on_outcome: Called with the outcome of each run, including runs that were saved earlier.

    Raises:
        HeadscopeError: The folder holds runs of another plan, or cannot be written.
    """
    folder = Path(folder)
    _write(folder / "runs", {})
    for name, kind in REPORTS.items():
        output_path(folder / name, kind, force=force)
    runs = plan.runs()
    total, before = sum(config.steps for config, _ in runs), 0
    outcomes = []
    for config, heads in runs:
        name = f"{config.task}, {heads} head{'s' if heads > 1 else ''}, seed {config.seed}"

        def on_step(step: TrainingStep, before: int = before, name: str = name) -> None:
            if on_progress is not None:
                on_progress(before + step.done, total, name)

        outcomes.append(_run(folder / "runs", config, heads, on_step))
        before += config.steps
        if on_outcome is not None:
            on_outcome(outcomes[-1])
    for task in {config.task for config in plan.configs}:
        sizes = {outcome.parameters for outcome in outcomes if outcome.task == task}
        assert len(sizes) == 1, f"models of {task} differ in size: {sizes}"
    report = _report(plan, outcomes)
    data = json.dumps(report.data(), indent=1, ensure_ascii=False, allow_nan=False)
    files = {"one-or-many.md": report.markdown(), "one-or-many.json": data + "\n", "one-or-many.csv": report.csv()}
    _write(folder, files)
    return report


REPORTS = {  # the files of a report, each known by its start
    "one-or-many.md": kind_by_start("such a report", b"# One head or many\n"),
    "one-or-many.json": kind_by_start("such a report", b'{\n "rows": ['),
    "one-or-many.csv": kind_by_start("such a report", ",".join(RunOutcome.__dataclass_fields__).encode()),
}


def _run(folder: Path, config: TrainConfig, heads: int, on_progress: Callable[[TrainingStep], None]) -> RunOutcome:
    """The outcome of one run, read from its file or trained now."""
    path = folder / f"{config.task}-{heads}-heads-seed-{config.seed}.json"
    task = config.make_task()
    run = {"config": config.as_data(), "data": task.identity}
    if (saved := _saved(path, config, task.identity)) is not None:
        return saved
    result = train(config, on_progress=on_progress)
    distance = head_distance(result.model, task.held_out(_TEXTS).tokens.to(result.model.embedding.weight.device))
    size = sum(parameter.numel() for parameter in result.model.parameters())
    outcome = RunOutcome(config.task, heads, config.seed, result.held_out.loss, distance, size, result.seconds)
    _write(folder, {path.name: json.dumps(run | {"outcome": finite_or_none(asdict(outcome))}, indent=1)})
    return outcome


def _saved(path: Path, config: TrainConfig, data: str) -> RunOutcome | None:
    """The outcome in a run's file; None if there is no file or it is damaged."""
    try:
        saved = json.loads(path.read_text("utf-8"))
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in saved["outcome"].items()}
        differences, outcome = config.differences(saved["config"]), RunOutcome(**values)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not differences and saved["data"] != data:
        differences = [f"data {saved['data']}, now {data}"]
    if differences:
        raise HeadscopeError(f"{path} is of another experiment ({'; '.join(differences)}): choose another folder.")
    return outcome


def _report(plan: ExperimentPlan, outcomes: Sequence[RunOutcome]) -> ExperimentReport:
    rows, verdicts = [], []
    for config in plan.configs:
        runs = [outcome for outcome in outcomes if outcome.task == config.task]
        losses = {heads: [o.loss for o in runs if o.heads == heads] for heads in plan.heads}
        for index, heads in enumerate(plan.heads):
            distances = [o.distance for o in runs if o.heads == heads and not math.isnan(o.distance)]
            first, before = plan.heads[0], plan.heads[max(0, index - 1)]
            gain, step = (_gain(losses[fewer], losses[heads]) if index else mean_of([]) for fewer in (first, before))
            size = config.sizes.embed_dim // heads
            rows.append(HeadCountRow(config.task, heads, size, mean_of(losses[heads]), gain, step, mean_of(distances)))
            if index:
                verdicts.append(_verdict(config.task, heads, before, step, len(plan.seeds)))
    return ExperimentReport(rows, list(outcomes), verdicts)


def _gain(before: Sequence[float], after: Sequence[float]) -> SeedMean:
    return mean_of([old - new for old, new in zip(before, after, strict=True)])


def _verdict(task: str, heads: int, before: int, gain: SeedMean, seeds: int) -> str:
    than = "one head" if before == 1 else f"{before} heads"
    if math.isnan(gain.half_width):
        return f"{task}: one seed cannot say whether {heads} heads do better than {than}."
    between = f"95 %: {gain.low:.3f} to {gain.high:.3f}"
    if gain.low > 0:
        return f"{task}: {heads} heads do better than {than}; the loss is lower by {gain.mean:.3f} nats ({between})."
    if gain.high < 0:
        between = f"95 %: {-gain.high:.3f} to {-gain.low:.3f}"
        return f"{task}: {heads} heads do worse than {than}; the loss is higher by {-gain.mean:.3f} nats ({between})."
    return (
        f"{task}: {heads} heads do no better and no worse than {than} as far as {seeds} seeds can tell; the loss "
        f"differs by {-gain.mean:+.3f} nats (95 %: {-gain.high:+.3f} to {-gain.low:+.3f})."
    )


def finite_or_none(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not have, replaced by None, in lists and dicts too."""
    if isinstance(value, dict):
        return {name: finite_or_none(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_none(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with whole_file(folder / name) as scratch:  # reports were checked before the work
                scratch.write_text(text, "utf-8")
    except OSError as error:
        raise HeadscopeError(f"Cannot write into {folder}: {error.strerror or error}.") from error
