"""train(): the training loop, in one process or several; it resumes from checkpoints."""

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

Log = Callable[[str, float, int], None]


@dataclass(frozen=True)
class TrainingStep:
    """A training step that was done.

    Attributes:
        done: The number of steps done.
        of: The number of steps in all.
        loss: The loss on this step's batch before the update, in nats per target.
        rate: The learning rate.
    """

    done: int
    of: int
    loss: float
    rate: float


@dataclass(frozen=True)
class HeldOut:
    """The result of a model on rows that never occurred in training.

    Attributes:
        loss: Mean over all targets, in nats.
        exact: Share of rows that the model writes without a mistake; None for a task that does not measure it.
        rows: The number of rows.
    """

    loss: float
    exact: float | None
    rows: int

    @property
    def bits(self) -> float:
        """The loss in bits per target; for the task "bytes", bits per byte."""
        return self.loss / math.log(2)


@dataclass(frozen=True, eq=False)
class TrainResult:
    """A finished run.

    Attributes:
        model: The trained model, in evaluation mode.
        loss: The loss of the last step, in nats per target.
        held_out: The result on held-out rows.
        first_step: The number of steps that earlier runs had done.
        seconds: The time of this run.
        checkpoint: The last checkpoint; None if the run has no folder.
        heads: The last statistics of the heads; None if no step was left to do.
        precision: The precision of matrix products, "float32" or "bfloat16".
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

    Under torchrun, each process takes its part of every batch, and the result is that of one process. If the folder
    has a checkpoint of the same run, the run resumes from it; on one thread the result is then identical to that
    without the interruption. The state of torch's random numbers does not change.

    Args:
        config: The settings that decide the result.
        folder: The folder for checkpoints; None for none.
        save_every: Steps between checkpoints.
        watch_every: Steps between statistics of the heads, see :mod:`headscope.watching.monitoring`.
        device: "auto", "cpu" or "cuda".
        on_progress: Called after each step, in the main process.
        on_note: Called with messages, in the main process: a damaged checkpoint, a head whose statistics are a
            warning. Without it, heads are reported by Python's ``warnings``.
        log: Called with (name, value, step), in the main process: the loss, the learning rate, and the heads'
            statistics.

    Raises:
        ValueError: A batch size that is no multiple of the processes, or a number out of range.
        HeadscopeError: The folder is a file or has another run; a file cannot be written; the loss is not finite.
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
    with joined(device) as processes, _random_state_restored(processes.device), stop_signals() as flag:
        run = _TrainingRun(config, processes, None if folder is None else Path(folder))
        run.resume(on_note)
        first_step = run.step
        head_monitor = None
        if processes.is_main:
            head_monitor = monitor(run.model, every=watch_every, log=log, warn=on_note)
        else:
            on_progress = log = None
        run.train(save_every, head_monitor, flag, on_progress, log)
        held_out = run.held_out()
        if log is not None:
            log("held_out/loss", held_out.loss, run.step)
        heads = head_monitor.history[-1] if head_monitor is not None and head_monitor.history else None
        seconds, precision = time.monotonic() - began, "bfloat16" if run.in_bfloat16 else "float32"
        return TrainResult(run.model.eval(), run.loss, held_out, first_step, seconds, run.path, heads, precision)


class _TrainingRun:
    """The state of a run: weights, optimizer, steps done."""

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
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() <= 1]
        decayed = {"params": matrices, "weight_decay": config.weight_decay}
        self.optimizer = torch.optim.AdamW([decayed, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.98))
        self.step, self.loss = 0, math.nan
        self.path: Path | None = None
        self.in_bfloat16 = config.in_bfloat16(processes.device, processes.count)

    def resume(self, on_note: Callable[[str], None] | None) -> None:
        """Load the last whole checkpoint, if there is one; the main process reads it and broadcasts it."""
        if self.folder is None:
            return
        if self.folder.exists() and not self.folder.is_dir():
            raise HeadscopeError(f"{self.folder} is a file: checkpoints need a folder of their own.")
        if self.processes.is_main and (last := checkpoint.latest(self.folder, on_note)) is not None:
            self._check_same_run(last)
            self.step, self.loss, self.path = last.step, float(last.run["loss"]), last.path
            self._load_tensors(last.tensors)
        progress = torch.tensor([self.step, self.loss], dtype=torch.float64, device=self.processes.device)
        step, self.loss = self.processes.broadcast(progress).tolist()
        self.step = int(step)
        if self.step and self.processes.count > 1:
            for parameter in self.parameters.values():
                state = self.optimizer.state[parameter] or self._empty_state(parameter)
                self.optimizer.state[parameter] = state
                for tensor in (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]):
                    self.processes.broadcast(tensor)

    def train(
        self,
        save_every: int,
        head_monitor: Monitor | None,
        flag: StopFlag,
        on_progress: Callable[[TrainingStep], None] | None,
        log: Log | None,
    ) -> None:
        """Do all steps that are left."""
        config, model = self.config, self.model.train()
        parallel_model = self._data_parallel() if self.processes.count > 1 else model
        if head_monitor is not None:
            head_monitor.step = self.step
        while self.step < config.steps:
            rate = config.rate(self.step)
            stop = self._train_step(parallel_model, rate, head_monitor, flag)
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
        """The result on held-out rows; each process computes a part of them."""
        processes, model = self.processes, self.model.eval()
        whole = self.task.held_out(self.task.held_out_size)
        loss = targets = exact = rows = 0.0
        with torch.no_grad():
            for start in range(processes.rank * 64, len(whole.tokens), processes.count * 64):
                batch = whole.rows(slice(start, start + 64)).to(processes.device)
                target_count = int((batch.targets != IGNORED).sum())
                loss += float(self._loss(model, batch)) * target_count
                targets += target_count
                is_exact = self.task.exact(model, batch)
                rows += len(batch.tokens)
                exact += math.nan if is_exact is None else float(is_exact.sum())
        loss, targets, exact, rows = processes.total(loss, targets, exact, rows)
        return HeldOut(loss / targets, None if math.isnan(exact) else exact / rows, int(rows))

    def _train_step(self, model: nn.Module, rate: float, head_monitor: Monitor | None, flag: StopFlag) -> bool:
        """Do one step; whether a process received a signal to stop."""
        config, processes = self.config, self.processes
        batch = self.task.batch(config.seed, self.step, config.batch_size)
        batch = batch.part(processes.rank, processes.count).to(processes.device)
        torch.manual_seed(generator(config.seed, "dropout", self.step, processes.rank).initial_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        with head_monitor or nullcontext():
            loss = self._loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        total, stop = processes.total(float(loss.detach()), float(flag.is_set))
        self.loss = total / processes.count
        if not math.isfinite(self.loss):
            raise HeadscopeError(
                f"The loss is {self.loss} at step {self.step + 1}: the values got too large. Try a learning rate "
                f"below {config.learning_rate:g}, or a longer warm-up than {config.warmup} steps."
            )
        self.optimizer.step()
        self.step += 1
        return stop > 0

    def _loss(self, model: nn.Module, batch: TrainingBatch) -> Tensor:
        with torch.autocast(self.processes.device.type, dtype=torch.bfloat16, enabled=self.in_bfloat16):
            logits = model(batch.tokens, batch.source)
        return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)

    def _data_parallel(self) -> nn.Module:
        device = self.processes.device
        return DistributedDataParallel(self.model, device_ids=[device.index] if device.type == "cuda" else None)

    def _save(self) -> None:
        if self.folder is None or not self.processes.is_main:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{kind}": state[kind] for kind in ("exp_avg", "exp_avg_sq")}
        run = {"config": self.config.as_data(), "data": self.task.identity, "loss": self.loss}
        self.path = checkpoint.save(self.folder, self.step, run, tensors)

    def _check_same_run(self, last: checkpoint.Checkpoint) -> None:
        differences = self.config.differences(last.run["config"])
        if not differences and last.run["data"] != self.task.identity:
            differences = [f"data {last.run['data']}, now {self.task.identity}"]
        if differences:
            raise HeadscopeError(
                f"{last.path} is of another run ({'; '.join(differences)}). Give the same settings to resume it, "
                "or choose another folder."
            )

    def _load_tensors(self, tensors: dict[str, Tensor]) -> None:
        weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
        self.model.load_state_dict(weights)
        for name, parameter in self.parameters.items():
            state = self._empty_state(parameter)
            for kind in ("exp_avg", "exp_avg_sq"):
                state[kind].copy_(tensors[f"optimizer.{name}.{kind}"])
            self.optimizer.state[parameter] = state

    def _empty_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a parameter after ``step`` steps, with moments of zero."""
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return {"step": torch.tensor(float(self.step)), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


@contextmanager
def _random_state_restored(device: torch.device) -> Iterator[None]:
    """Restore the state of torch's random numbers after the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
