"""Training small Transformers: :func:`train`, its settings, its tasks and its checkpoints."""

from headscope.training.config import TrainConfig
from headscope.training.loop import HeldOut, TrainingStep, TrainResult, train
from headscope.training.signals import Stopped
from headscope.training.tasks import TASKS, make_task

__all__ = ["TASKS", "HeldOut", "Stopped", "TrainConfig", "TrainResult", "TrainingStep", "make_task", "train"]
