"""The catalogue accounts for every model type and builds the same model and inputs each time."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from tests.watching.zoo.catalog import ZOO, class_name, first_tensors
from tests.watching.zoo.excluded import NO_ATTENTION, NOT_BUILT
from tests.watching.zoo.overrides import OVERRIDES
from tests.watching.zoo.reference import eager_calls, eager_maps
from tests.watching.zoo.special import INPUTS


def test_every_type_is_accounted_for_once() -> None:
    known = [*ZOO, *NO_ATTENTION, *NOT_BUILT]
    assert len(known) == len(set(known))
    assert {name for name in CONFIG_MAPPING if class_name(name)} == set(known)


def test_tables_speak_of_known_types() -> None:
    known = {*ZOO, *NO_ATTENTION, *NOT_BUILT}
    assert set(OVERRIDES) <= known
    assert set(INPUTS) <= known


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "whisper", "qwen2_5_vl"])
def test_build_and_inputs_are_repeatable(name: str) -> None:
    outputs = []
    for _ in range(2):
        model = ZOO[name].build()
        with torch.no_grad():
            outputs.append(first_tensors(model(**ZOO[name].inputs(model))))
    assert outputs[0]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_attention_is_far_from_uniform() -> None:
    model = ZOO["llama"].build()
    maps = eager_maps(model, ZOO["llama"].inputs(model))
    assert [tuple(m.shape) for m in maps] == [(2, 6, 11, 11)] * 2
    for weights in maps:
        last = weights[1, :, -1]
        assert last.amax(-1).mean() > 2 / 11


def test_eager_calls_leave_the_model_as_it_was() -> None:
    model = ZOO["llama"].build()
    calls = eager_calls(model, ZOO["llama"].inputs(model))
    assert model.config._attn_implementation == "sdpa"
    assert [call.name for call in calls] == ["layers.0.self_attn", "layers.1.self_attn"]
