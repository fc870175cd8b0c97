"""train(): the loop, on one process or on several, which goes on where an earlier run ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from headscope.distributed import Processes, joined
from headscope.errors import HeadscopeError
from headscope.nn.transformer import Transformer
from headscope.training import checkpoint
from headscope.training.config import TrainConfig
from headscope.training.signals import StopFlag, Stopped, stop_signals
from headscope.training.tasks import IGNORED, TrainingBatch, generator
from headscope.watching.monitoring import HeadStats, Monitor, monitor

__all__ = ["HeldOut", "TrainResult", "TrainingStep", "train"]

Log = Callable[[str, float, int], None]


@dataclass(frozen=True)
class TrainingStep:
    """A step that was done.

    Attributes:
        done: How many steps are done.
        of: How many there will be.
        loss: Of this step's batch before the update, in nats a target.
        rate: The learning rate.
    """

    done: int
    of: int
    loss: float
    rate: float


@dataclass(frozen=True)
class HeldOut:
    """How well a model does on rows that never occurred in training.

    Attributes:
        loss: Mean over all targets, in nats.
        exact: Share of the rows that it writes without a mistake; None where the task does not ask for it.
        rows: How many there were.
    """

    loss: float
    exact: float | None
    rows: int

    @property
    def bits(self) -> float:
        """The loss in bits a target, for the task "bytes" bits per byte."""
        return self.loss / math.log(2)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A finished run.

    Attributes:
        model: The trained model, ready to be used.
        loss: The last step's, in nats a target.
        held_out: How well it does on what it has not seen.
        first_step: Steps that an earlier run had done.
        seconds: What this run took.
        checkpoint: The last checkpoint; None if the run has no folder.
        heads: What the heads did when they were last looked at; None if no step was left to do.
        precision: What products were made in, "float32" or "bfloat16".
    """

    model: Transformer
    loss: float
    held_out: HeldOut
    first_step: int
    seconds: float
    checkpoint: Path | None
    heads: HeadStats | None
    precision: str


def train(
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    save_every: int = 100,
    watch_every: int = 50,
    device: str = "auto",
    on_progress: Callable[[TrainingStep], None] | None = None,
    on_note: Callable[[str], None] | None = None,
    log: Log | None = None,
) -> TrainResult:
    """Train a Transformer on a task.

    Started by torchrun, each process takes its part of every batch, and the result is that of one process. If the
    folder holds a checkpoint of the same run, it goes on from there; on one thread the result is then the same to the
    bit as without the interruption. torch's own random numbers are left as they were.

    Args:
        config: What is learnt, and how.
        folder: Where checkpoints go; None: nowhere.
        save_every: Steps between them.
        watch_every: Steps between looks at the heads, see :func:`headscope.watching.monitoring`.
        device: "auto", "cpu" or "cuda".
        on_progress: Told of each step, in the main process.
        on_note: Told of things to know, in the main process: a damaged checkpoint, a head that needs a look. Without
            it, heads are warned of by Python's ``warnings``.
        log: Told of (name, value, step), in the main process: the loss, the learning rate, and what the heads do.

    Raises:
        ValueError: A batch that the processes cannot share evenly, or a number out of range.
        HeadscopeError: The folder is a file or holds another run; a file cannot be written; the loss is no longer a
            number.
        Stopped: Ctrl-C or SIGTERM; a checkpoint was saved. It is a KeyboardInterrupt.

    Example:
        >>> from headscope.training import make_task
        >>> sizes = make_task("copy").model_config(embed_dim=16, num_layers=1)
        >>> result = train(TrainConfig("copy", steps=3, batch_size=4, model=sizes))
        >>> result.held_out.rows, result.model.config.embed_dim
        (256, 16)
    """
    if save_every < 1 or watch_every < 1:
        raise ValueError(f"save_every {save_every}, watch_every {watch_every}: both are at least 1.")
    began = time.monotonic()
    with joined(device) as processes, _own_randomness(processes.device), stop_signals() as flag:
        run = _TrainingRun(config, processes, None if folder is None else Path(folder))
        run.resume(on_note or (lambda note: None))
        first = run.step
        watch = None
        if processes.is_main:
            watch = monitor(run.model, every=watch_every, log=log, warn=on_note)
        else:
            on_progress = log = None
        run.go(save_every, watch, flag, on_progress, log)
        held_out = run.held_out()
        if log is not None:
            log("held_out/loss", held_out.loss, run.step)
        heads = watch.history[-1] if watch is not None and watch.history else None
        seconds, precision = time.monotonic() - began, "bfloat16" if run.halves else "float32"
        return TrainResult(run.model.eval(), run.loss, held_out, first, seconds, run.path, heads, precision)


class _TrainingRun:
    """A run's state: the weights, the optimizer, the steps done."""

    def __init__(self, config: TrainConfig, processes: Processes, folder: Path | None) -> None:
        if config.batch_size % processes.count:
            raise ValueError(
                f"A batch of {config.batch_size} rows cannot be shared evenly by {processes.count} processes: make "
                f"batch_size a multiple of {processes.count}."
            )
        self.config, self.processes, self.folder = config, processes, folder
        self.task = config.make_task()
        torch.manual_seed(generator(config.seed, "weights").initial_seed())
        self.model = Transformer(config.sizes).to(processes.device)
        self.named = dict(self.model.named_parameters())
        matrices = [p for p in self.named.values() if p.dim() > 1]
        vectors = [p for p in self.named.values() if p.dim() <= 1]
        decayed = {"params": matrices, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW([decayed, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98))
        self.step, self.loss = 0, math.nan
        self.path: Path | None = None
        self.halves = config.in_bfloat16(processes.device, processes.count)

    def resume(self, note: Callable[[str], None]) -> None:
        """Go to the last whole checkpoint, if there is one; what the main process reads, all others get."""
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise HeadscopeError(f"{self.folder} is a file: checkpoints need a folder of their own.")
        if self.processes.is_main and (found := checkpoint.latest(self.folder, note)) is not None:
            self._check_same(found)
            self.step, self.loss, self.path = found.step, float(found.run["loss"]), found.path
            self._read(found.tensors)
        here = torch.tensor([self.step, self.loss], dtype=torch.float64, device=self.processes.device)
        step, self.loss = self.processes.share(here).tolist()
        self.step = int(step)
        if self.step and self.processes.count > 1:
            for parameter in self.named.values():
                state = self.optimizer.state[parameter] or self._blank(parameter)
                self.optimizer.state[parameter] = state
                for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                    self.processes.share(tensor)

    def go(
        self,
        save_every: int,
        watch: Monitor | None,
        flag: StopFlag,
        on_progress: Callable[[TrainingStep], None] | None,
        log: Log | None,
    ) -> None:
        """All steps that are left."""
        config, model = self.config, self.model.train()
        shared = self._shared() if self.processes.count > 1 else model
        if watch is not None:
            watch.step = self.step
        while self.step < config.steps:
            rate = config.rate(self.step)
            stop = self._one(shared, rate, watch, flag)
            if on_progress is not None:
                on_progress(TrainingStep(self.step, config.steps, self.loss, rate))
            if log is not None:
                log("train/loss", self.loss, self.step)
                log("train/learning_rate", rate, self.step)
            if stop or self.step % save_every == 0 or self.step == config.steps:
                self._save()
            if stop and self.step < config.steps:
                raise Stopped(self.step, self.path)

    def held_out(self) -> HeldOut:
        """The model on rows that it has not seen, each process a part of them."""
        me, model = self.processes, self.model.eval()
        whole = self.task.held_out(self.task.held_out_size)
        loss = targets = exact = rows = 0.0
        with torch.no_grad():
            for start in range(me.rank * 64, len(whole.tokens), me.count * 64):
                batch = _rows(whole, start, start + 64).to(me.device)
                asked = int((batch.targets != IGNORED).sum())
                loss += float(self._loss(model, batch)) * asked
                targets += asked
                right = self.task.exact(model, batch)
                rows += len(batch.tokens)
                exact += math.nan if right is None else float(right.sum())
        loss, targets, exact, rows = me.total(loss, targets, exact, rows)
        return HeldOut(loss / targets, None if math.isnan(exact) else exact / rows, int(rows))

    def _one(self, shared: nn.Module, rate: float, watch: Monitor | None, flag: StopFlag) -> bool:
        """One step; whether some process was asked to stop."""
        config, me = self.config, self.processes
        batch = self.task.batch(config.seed, self.step, config.batch_size).part(me.rank, me.count).to(me.device)
        torch.manual_seed(generator(config.seed, "dropout", self.step, me.rank).initial_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        with watch or nullcontext():
            loss = self._loss(shared, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.named.values(), config.clip)
        total, stop = me.total(float(loss.detach()), float(flag.asked))
        self.loss = total / me.count
        if not math.isfinite(self.loss):
            raise HeadscopeError(
                f"The loss is {self.loss} at step {self.step + 1}: the numbers got too large. Try a learning rate "
                f"below {config.learning_rate:g}, or a longer warm-up than {config.warmup} steps."
            )
        self.optimizer.step()
        self.step += 1
        return stop > 0

    def _loss(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        with torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self.halves):
            logits = model(batch.tokens, batch.source)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)

    def _shared(self) -> nn.Module:
        device = self.processes.device
        return DistributedDataParallel(self.model, device_ids=[device.index] if device.type == "cuda" else None)

    def _save(self) -> None:
        if self.folder is None or not self.processes.is_main:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.named.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{kind}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        run = {"config": self.config.as_data(), "data": self.task.identity, "loss": self.loss}
        self.path = checkpoint.save(self.folder, self.step, run, tensors)

    def _check_same(self, found: checkpoint.Checkpoint) -> None:
        differences = self.config.differences(found.run["config"])
        if not differences and found.run["data"] != self.task.identity:
            differences = [f"data {found.run['data']}, now {self.task.identity}"]
        if differences:
            raise HeadscopeError(
                f"{found.path} is of another run ({'; '.join(differences)}). Give the same settings to go on with it, "
                "or choose another folder."
            )

    def _read(self, tensors: dict[str, Tensor]) -> None:
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        for name, parameter in self.named.items():
            state = self._blank(parameter)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind].copy_(tensors[f"optimizer.{name}.{kind}"])
            self.optimizer.state[parameter] = state

    def _blank(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's memory of a parameter after ``step`` steps, to be filled."""
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {"step": torch.tensor(float(self.step)), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _rows(batch: TrainingBatch, start: int, stop: int) -> TrainingBatch:
    source = None if batch.source is None else batch.source[start:stop]
    return TrainingBatch(batch.tokens[start:stop], batch.targets[start:stop], source)


@contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """The block may seed torch's random numbers; afterwards they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
