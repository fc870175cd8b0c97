"""One head or many: models of equal size that differ in their number of heads alone, compared over several seeds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headscope.errors import HeadscopeError
from headscope.files import whole_file
from headscope.nn.transformer import Transformer
from headscope.training import TrainConfig, make_task, train
from headscope.training.tasks import generator
from headscope.watching.recording import record

__all__ = [
    "FULL",
    "QUICK",
    "Mean",
    "Outcome",
    "Plan",
    "Report",
    "Row",
    "head_distance",
    "mean_of",
    "one_or_many",
    "plain",
]

# Student's t that leaves 2.5 % on each side, for 1, 2, … degrees of freedom; above 30 the normal distribution's.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_ROWS = 8  # queries of each text whose rows are compared
_TEXTS = 8


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        configs: One for each task; the number of heads and the seed are put in.
        heads: Numbers of heads.
        seeds: Seeds; each is used with every number of heads, with the same first weights and the same data.
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


def _plan(lookup_steps: int, byte_steps: int, **others: Any) -> Plan:
    small = make_task("bytes").model_config(embed_dim=64, num_layers=2, ff_dim=256)
    common: dict[str, Any] = {"precision": "float32"}
    lookups = TrainConfig("lookups", steps=lookup_steps, **common)
    return Plan((lookups, TrainConfig("bytes", steps=byte_steps, batch_size=8, model=small, **common)), **others)


FULL = _plan(400, 300)
QUICK = _plan(160, 40, heads=(1, 4), seeds=(0, 1, 2))


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Attributes:
        task: Its task.
        heads: How many heads.
        seed: Its seed.
        loss: On rows that never occurred in training, in nats a target.
        distance: Between the heads of a layer, see :func:`head_distance`; NaN for one head.
        parameters: How many numbers the model has.
        seconds: How long it took.
    """

    task: str
    heads: int
    seed: int
    loss: float
    distance: float
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and the half of its 95 % interval (Student's t); NaN where one seed or none says nothing."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "–"
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of one number for each seed, with its 95 % interval.

    >>> print(mean_of([1.0, 2.0, 3.0]))  # 4.303 · 1 / √3
    2.000 ± 2.484
    """
    if len(values) < 2:
        return Mean(values[0] if values else math.nan, math.nan)
    t = _T[len(values) - 2] if len(values) - 2 < len(_T) else 1.960
    return Mean(fmean(values), t * stdev(values) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Row:
    """One number of heads in one task, over all seeds.

    Attributes:
        task: The task.
        heads: How many heads.
        head_dim: Their size.
        loss: Held-out, in nats a target.
        gain: How much lower than with one head, seed by seed.
        step: How much lower than with the number of heads before, seed by seed.
        distance: Between the heads.
    """

    task: str
    heads: int
    head_dim: int
    loss: Mean
    gain: Mean
    step: Mean
    distance: Mean


@dataclass(frozen=True)
class Report:
    """The experiment's answer.

    Attributes:
        rows: One for each task and number of heads.
        outcomes: Every run.
        verdicts: What came out, in sentences.
    """

    rows: list[Row]
    outcomes: list[Outcome]
    verdicts: list[str]

    def markdown(self) -> str:
        """The table and the sentences."""
        seeds = len({outcome.seed for outcome in self.outcomes})
        lines = ["# One head or many", ""]
        lines += [
            f"Mean over {seeds} seeds ± half of the 95 % interval. Held-out loss in nats a target, lower is better."
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
        """The same as plain data; NaN becomes None."""
        rows = [asdict(row) for row in self.rows]
        outcomes = [asdict(outcome) for outcome in self.outcomes]
        return {"rows": plain(rows), "runs": plain(outcomes), "verdicts": self.verdicts}

    def csv(self) -> str:
        """Every run, one a line."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Outcome.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(plain([asdict(outcome) for outcome in self.outcomes]))
        return text.getvalue()


def one_or_many(
    folder: str | Path,
    plan: Plan = FULL,
    *,
    on_step: Callable[[int, int, str], None] | None = None,
    on_run: Callable[[Outcome], None] | None = None,
) -> Report:
    """Train models that differ in their number of heads alone, and compare them.

    Each finished run is saved, so that the same call goes on where it was stopped. The answer is written into the
    folder as ``one-or-many.md``, ``.json`` and ``.csv``.

    Args:
        folder: Where results go; it is made if need be.
        plan: What is trained.
        on_step: Told of training steps done in all, of how many, and in which run.
        on_run: Told of each run, also of those that were there already.

    Raises:
        HeadscopeError: The folder holds runs of another plan, or cannot be written.
    """
    folder = Path(folder)
    _write(folder / "runs", {})
    runs = plan.runs()
    total, before = sum(config.steps for config, _ in runs), 0
    outcomes = []
    for config, heads in runs:
        name = f"{config.task}, {heads} head{'s' if heads > 1 else ''}, seed {config.seed}"

        def tell(step: Any, before: int = before, name: str = name) -> None:
            if on_step is not None:
                on_step(before + step.done, total, name)

        outcomes.append(_run(folder / "runs", config, heads, tell))
        before += config.steps
        if on_run is not None:
            on_run(outcomes[-1])
    for task in {config.task for config in plan.configs}:
        sizes = {outcome.parameters for outcome in outcomes if outcome.task == task}
        assert len(sizes) == 1, f"models of {task} differ in size: {sizes}"
    report = _report(plan, outcomes)
    data = json.dumps(report.data(), indent=1, ensure_ascii=False, allow_nan=False)
    names = {"one-or-many.md": report.markdown(), "one-or-many.json": data + "\n", "one-or-many.csv": report.csv()}
    _write(folder, names)
    return report


def head_distance(model: Transformer, tokens: Int[Tensor, "B L"]) -> float:
    """How differently the heads of a layer look: the Jensen–Shannon distance of their rows, from 0 to 1.

    It is the square root of the divergence in bits (Endres and Schindelin 2003, doi 10.1109/TIT.2003.813506), between
    the rows P[h, i, :] of two heads: 0 if both look at the same places with the same weights, 1 if no place is shared.
    The mean is over pairs of heads, layers, texts, and 8 sampled rows in the second half of each text.

    Args:
        model: A decoder.
        tokens: [B, L], texts.

    Returns:
        The mean; NaN if there is one head.

    Example:
        >>> config = make_task("lookups").model_config(num_heads=2)
        >>> 0 < head_distance(Transformer(config), make_task("lookups").held_out(3).tokens) < 1
        True
    """
    if model.config.num_heads < 2:
        return math.nan
    with torch.no_grad(), record(model) as recording:
        model(tokens)
    length = tokens.shape[1]
    drawn = torch.randperm(length - length // 2, generator=generator("rows", length))[:_ROWS] + length // 2
    rows = drawn.sort().values.to(tokens.device)
    return fmean(
        float(jensen_shannon(part[first], part[second]).mean())
        for matrix in recording
        for part in (matrix[text, :, rows, :].double() for text in range(len(tokens)))
        for first, second in combinations(range(part.shape[0]), 2)
    )


def jensen_shannon(p: Float[Tensor, "*rows S"], q: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows"]:
    """The Jensen–Shannon distance of shares that add up to 1.

    >>> jensen_shannon(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])).tolist()
    [1.0, 0.0]
    """
    mixed = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return mixed.clamp(min=0).sqrt()


def _entropy(p: Tensor) -> Tensor:
    """In bits."""
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def _run(folder: Path, config: TrainConfig, heads: int, on_step: Callable[[Any], None]) -> Outcome:
    """One run's outcome: what was saved, or what it gives now."""
    path = folder / f"{config.task}-{heads}-heads-seed-{config.seed}.json"
    task = config.make_task()
    run = {"config": config.as_data(), "data": task.identity}
    if (saved := _saved(path, config, task.identity)) is not None:
        return saved
    result = train(config, on_step=on_step)
    distance = head_distance(result.model, task.held_out(_TEXTS).tokens.to(result.model.embedding.weight.device))
    size = sum(parameter.numel() for parameter in result.model.parameters())
    outcome = Outcome(config.task, heads, config.seed, result.held_out.loss, distance, size, result.seconds)
    _write(folder, {path.name: json.dumps(run | {"outcome": plain(asdict(outcome))}, indent=1)})
    return outcome


def _saved(path: Path, config: TrainConfig, data: str) -> Outcome | None:
    """What a run gave earlier; None if it was not done or its file was damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in found["outcome"].items()}
        differences, outcome = config.differences(found["config"]), Outcome(**values)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not differences and found["data"] != data:
        differences = [f"data {found['data']}, now {data}"]
    if differences:
        raise HeadscopeError(f"{path} is of another experiment ({'; '.join(differences)}): choose another folder.")
    return outcome


def _report(plan: Plan, outcomes: Sequence[Outcome]) -> Report:
    rows, verdicts = [], []
    for config in plan.configs:
        mine = [outcome for outcome in outcomes if outcome.task == config.task]
        losses = {heads: [o.loss for o in mine if o.heads == heads] for heads in plan.heads}
        for place, heads in enumerate(plan.heads):
            distances = [o.distance for o in mine if o.heads == heads and not math.isnan(o.distance)]
            first, before = plan.heads[0], plan.heads[max(0, place - 1)]
            gain, step = (_gain(losses[than], losses[heads]) if place else mean_of([]) for than in (first, before))
            size = config.sizes.embed_dim // heads
            rows.append(Row(config.task, heads, size, mean_of(losses[heads]), gain, step, mean_of(distances)))
            if place:
                verdicts.append(_verdict(config.task, heads, before, step, len(plan.seeds)))
    return Report(rows, list(outcomes), verdicts)


def _gain(before: Sequence[float], after: Sequence[float]) -> Mean:
    return mean_of([old - new for old, new in zip(before, after, strict=True)])


def _verdict(task: str, heads: int, before: int, gain: Mean, seeds: int) -> str:
    than = "one head" if before == 1 else f"{before} heads"
    if math.isnan(gain.half):
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


def plain(value: Any) -> Any:
    """Numbers that JSON does not know, NaN and infinities, as None, in lists and tables too."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with whole_file(folder / name) as scratch:
                scratch.write_text(text, "utf-8")
    except OSError as error:
        raise HeadscopeError(f"Cannot write into {folder}: {error.strerror or error}.") from error
