"""TrainConfig: the settings that decide the result of a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from headscope.nn.transformer import TransformerConfig
from headscope.ops.kernels.cpu import multiplies
from headscope.training.tasks import Task, make_task

# From these sizes bfloat16 is faster on a CPU, see docs/log.md: the fused kernel's backward pass is ten times as slow
# on rows of 10 as in float32, and steps of few positions spend their time on converting weights to bfloat16.
_LONG_ROWS, _MANY_POSITIONS = 64, 1024


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run. Runs with equal settings give equal results.

    Attributes:
        task: "copy", "sort", "lookups" or "bytes".
        steps: updates of the weights; 0: the task's default.
        batch_size: rows per step, of all processes together; 0: the task's default.
        length: positions per row; 0: the task's default.
        model: sizes of the model; None: the task's default.
        learning_rate: the highest learning rate; it rises over ``warmup`` steps, then falls to a tenth along a cosine.
        warmup: steps until the highest learning rate.
        weight_decay: of AdamW (arXiv 1711.05101), for matrices only.
        clip: the largest norm of the gradient.
        seed: of the first weights, the data and the dropout.
        precision: "float32", "bfloat16", or "auto": bfloat16 where it is faster, see :meth:`in_bfloat16`.

    Raises:
        ValueError: no such task, numbers out of range, or a model that does not fit the task.

    Example:
        >>> config = TrainConfig("copy", steps=200)
        >>> config.batch_size, config.sizes.num_heads
        (64, 4)
    """

    task: str
    steps: int = 0
    batch_size: int = 0
    length: int = 0
    model: TransformerConfig | None = None
    learning_rate: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        task = make_task(self.task, self.length)
        for name in ("steps", "batch_size", "length"):
            object.__setattr__(self, name, getattr(self, name) or getattr(task, name))
        if self.model is None:
            object.__setattr__(self, "model", task.model_config())
        for name in ("steps", "batch_size", "learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a number above 0.")
        for name in ("warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a number of at least 0.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}: it is one of auto, float32, bfloat16.")
        _check_model(self.sizes, task)

    @property
    def sizes(self) -> TransformerConfig:
        """The sizes of the model."""
        assert self.model is not None  # set by __post_init__
        return self.model

    def make_task(self) -> Task:
        """The task, with rows of this length."""
        return make_task(self.task, self.length)

    def in_bfloat16(self, device: torch.device, processes: int = 1) -> bool:
        """Whether matrix products are in bfloat16; the weights stay float32.

        With "auto" they are on a device with instructions for it. On a CPU the rows must also be long and the positions
        of a step many; otherwise float32 is faster.

        Args:
            device: The device of the run.
            processes: The number of processes that share each batch.

        >>> TrainConfig("copy").in_bfloat16(torch.device("cpu"))
        False
        """
        if self.precision != "auto":
            return self.precision == "bfloat16"
        if not multiplies(torch.bfloat16, device):
            return False
        positions = self.batch_size * self.length // processes
        return device.type != "cpu" or (self.length >= _LONG_ROWS and positions >= _MANY_POSITIONS)

    def rate(self, step: int) -> float:
        """The learning rate of a step; steps count from 0.

        >>> config = TrainConfig("copy", steps=100, learning_rate=1.0, warmup=10)
        >>> [round(config.rate(step), 2) for step in (0, 9, 55, 100)]
        [0.1, 1.0, 0.55, 0.1]
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share))))

    def as_data(self) -> dict[str, Any]:
        """The settings as plain data."""
        return asdict(self)

    def differences(self, data: dict[str, Any]) -> list[str]:
        """The differences between earlier settings, from :meth:`as_data`, and these: "steps 100, now 200".

        >>> TrainConfig("copy", steps=200).differences(TrainConfig("copy", steps=100).as_data())
        ['steps 100, now 200']
        """
        new, old = _flat(self.as_data()), _flat(data)
        return [f"{n} {old.get(n)}, now {new.get(n)}" for n in new | old if new.get(n) != old.get(n)]


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    """The settings and those of the model in one dict."""
    model = data.get("model") or {}
    return {name: value for name, value in data.items() if name != "model"} | dict(model)


def _check_model(model: TransformerConfig, task: Task) -> None:
    wanted = {"kind": task.kind, "vocab_size": task.vocab_size}
    for name, value in wanted.items():
        if getattr(model, name) != value:
            raise ValueError(
                f"The task {task.name} needs a model of {name} {value!r}, this one has {getattr(model, name)!r}: "
                f"make it with make_task({task.name!r}).model_config(…)."
            )
    if model.max_length < task.length + 1:
        raise ValueError(
            f"The task {task.name} has rows of length {task.length}, the model's max_length is {model.max_length}: "
            f"make it at least {task.length + 1}."
        )
