"""A training run of a few steps of a small model, and comparisons of its results."""

import os
import subprocess
import sys
from typing import Any

import torch

from headscope.training import TrainConfig, TrainResult, make_task

OPTIONS = ["--embed-dim", "16", "--heads", "2", "--layers", "1", "--length", "5", "--batch-size", "12"]


def small(task: str = "copy", **settings: Any) -> TrainConfig:
    model = make_task(task, settings.get("length", 0)).model_config(embed_dim=16, num_heads=2, num_layers=1, ff_dim=32)
    return TrainConfig(task, **({"steps": 6, "batch_size": 12, "model": model, "precision": "float32"} | settings))


def weights(result: TrainResult) -> list[torch.Tensor]:
    return list(result.model.state_dict().values())


def same(first: TrainResult, second: TrainResult) -> bool:
    pairs = zip(weights(first), weights(second), strict=True)
    return first.loss == second.loss and all(torch.equal(a, b) for a, b in pairs)


def command(*words: str, processes: int = 1) -> subprocess.Popen[str]:
    """The command `headscope train` in a new process, or under torchrun in several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = [*start, "-m", "headscope", "train", *words]
    return subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
