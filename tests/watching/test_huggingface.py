"""The hook for transformers: recorded weights are those of its attention functions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from headscope.errors import ProofError
from headscope.watching.recording import record
from tests.reference import FINFO_MIN
from tests.watching.small_models import assert_close, assert_untouched, llama
from tests.watching.zoo.catalog import first_tensors


@contextmanager
def registered(name: str, function: Callable[..., Any]) -> Iterator[None]:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def test_registered_attention_function_is_recorded() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    calls = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    model, inputs = llama()
    with record(model) as wanted:
        model(**inputs)
    with registered("own", own):
        model.set_attn_implementation("own")
        with record(model) as recording:
            model(**inputs)
    assert len(calls) == len(recording) == 2
    assert {site.way for site in recording.sites} == {"huggingface"}
    assert_close(recording[1].dense(), wanted[1].dense())


@pytest.mark.parametrize("lie", ["scale", "softcap"])
def test_proof_refuses_an_attention_with_another_scale_or_softcap(lie: str) -> None:
    def lying(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        s = q @ k.mT * kwargs["scaling"]
        s = s * 1.3 if lie == "scale" else 0.5 * torch.tanh(s / 0.5)
        s = s.masked_fill(~mask, FINFO_MIN) if mask is not None else s + torch.full_like(s, -torch.inf).triu(1)
        return (s.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    model, inputs = llama()
    with registered("lying", lying):
        model.set_attn_implementation("lying")
        with pytest.raises(ProofError) as refused, record(model) as recording:
            model(**inputs)
    assert "layers.0.self_attn" in str(refused.value)
    assert "(tolerance 1e-0" in str(refused.value)
    assert recording.runs == []
    assert recording.calls == []
    assert_untouched(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # on purpose
def test_flex_attention_gives_the_weights_of_sdpa() -> None:
    model, inputs = llama()
    with record(model) as wanted, torch.no_grad():
        model(**inputs)
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"), torch.no_grad():  # compiling its kernel takes half a minute
        plain = first_tensors(model(**inputs))
        with record(model) as recording:
            watched = first_tensors(model(**inputs))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    valid = inputs["attention_mask"].bool()
    for got, of_sdpa in zip(recording, wanted, strict=True):
        difference = (got.dense() - of_sdpa.dense()).abs().amax((1, 3))
        assert difference[valid].max() < 1e-5


def test_gradient_checkpointing_is_recorded_once_per_layer() -> None:
    model, inputs = llama()
    model.train()
    model.gradient_checkpointing_enable()
    with record(model) as recording:
        first_tensors(model(**inputs))[0].sum().backward()
    assert len(recording.calls) == 2
