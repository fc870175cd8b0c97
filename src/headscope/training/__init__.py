"""Training small Transformers: :func:`train`, its settings, its tasks and its checkpoints."""

from headscope.training.config import TrainConfig
from headscope.training.loop import HeldOut, Step, TrainResult, train
from headscope.training.signals import Stopped
from headscope.training.tasks import TASKS, make_task

__all__ = ["TASKS", "HeldOut", "Step", "Stopped", "TrainConfig", "TrainResult", "make_task", "train"]
