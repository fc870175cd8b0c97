"""TrainConfig: precision and settings that are refused."""

import math
from typing import Any

import pytest
import torch

from headscope.training import (
    TrainConfig,
    make_task,
)
from tests.training.small import small


def test_auto_precision_takes_bfloat16_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    has = {"cpu": True, "cuda": True}
    monkeypatch.setattr("headscope.training.config.multiplies", lambda dtype, device: has[device.type])
    own, short = TrainConfig("bytes"), TrainConfig("copy")
    assert own.in_bfloat16(cpu)
    assert not short.in_bfloat16(cpu)
    assert short.in_bfloat16(cuda)
    assert TrainConfig("bytes", batch_size=16, length=64).in_bfloat16(cpu)
    assert not TrainConfig("bytes", batch_size=16, length=63).in_bfloat16(cpu)
    assert not TrainConfig("bytes", batch_size=16, length=64).in_bfloat16(cpu, processes=2)
    assert TrainConfig("copy", precision="bfloat16").in_bfloat16(cpu)
    assert not TrainConfig("bytes", precision="float32").in_bfloat16(cuda)
    has["cpu"] = False
    assert not own.in_bfloat16(cpu)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "juggle"}, "There is no task 'juggle'. The tasks are: copy, sort, lookups, bytes."),
        ({"length": 3}, "copy with rows of length 3: at least 4."),
        ({"steps": -7}, "steps is -7: it must be a number above 0."),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be a number above 0."),
        ({"learning_rate": math.inf}, "learning_rate is inf: it must be a number above 0."),
        ({"clip": math.nan}, "clip is nan: it must be a number above 0."),
        ({"warmup": -2}, "warmup is -2: it must be a number of at least 0."),
        (
            {"model": make_task("bytes").model_config()},
            "The task copy needs a model of kind 'encoder-decoder', this one has 'decoder': make it with "
            "make_task('copy').model_config(…).",
        ),
        (
            {"length": 70, "model": make_task("copy").model_config()},
            "The task copy has rows of length 70, the model's max_length is 20: make it at least 71.",
        ),
    ],
)
def test_config_refuses_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(**({"task": "copy"} | settings))
    assert str(error.value) == message


def test_config_refuses_an_unknown_precision() -> None:
    config = small()
    object.__setattr__(config, "precision", "int8")  # the tests' own checker of types would refuse it before
    with pytest.raises(ValueError, match=r"precision is 'int8': it is one of auto, float32, bfloat16\."):
        config.__post_init__()
