"""Watching changes nothing of a model, leaves nothing behind, and keeps threads and models apart."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import AttentionInterface

from headscope.errors import NothingSeen, UnsupportedAttention
from headscope.watching.hooks import AttentionCall, watch, watches
from headscope.watching.recording import record
from tests.watching.small_models import (
    ORIGINALS,
    B,
    D,
    E,
    H,
    L,
    NanoGPT,
    Stack,
    assert_close,
    assert_untouched,
    llama,
    recorded_weights,
    self_attending,
)
from tests.watching.zoo.catalog import first_tensors


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first, self.error = NanoGPT(), error

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("it broke"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_watch_leaves_nothing_behind_after_an_error_in_the_model(error: BaseException) -> None:
    model = Failing(error)
    with pytest.raises(type(error)), record(model) as recording:
        model(torch.randn(B, L, E))
    assert_untouched(model)
    assert recording.runs == []
    model.error = None
    with record(model) as recording:
        model(torch.randn(B, L, E))
    assert len(recording) == 1


def test_failed_forward_is_no_run() -> None:
    model = Failing(RuntimeError("it broke"))
    with record(model) as recording:
        with pytest.raises(RuntimeError, match="it broke"):
            model(torch.randn(B, L, E))
        model.error = None
        try:
            raise KeyError("elsewhere")
        except KeyError:  # a forward inside a handler has not failed
            model(torch.randn(B, L, E))
    assert len(recording.runs) == 1


def test_watch_leaves_nothing_behind_after_an_error_in_the_block() -> None:
    model, inputs = llama()
    with pytest.raises(ZeroDivisionError), record(model):
        print(first_tensors(model(**inputs))[0].shape[0] / 0)
    assert_untouched(model)


def test_watch_leaves_nothing_behind_if_it_could_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("no AttentionInterface")

    model, inputs = llama()
    with monkeypatch.context() as patched:
        patched.setattr("headscope.watching.hooks.huggingface.install", fail)
        with pytest.raises(ImportError, match="no AttentionInterface"), record(model):
            model(**inputs)
    assert_untouched(model)
    assert watches._WATCHES == []


def test_watch_restores_functions_when_the_last_one_ends() -> None:
    model, _ = llama()
    with watch(model):
        with watch(model):
            pass
        assert AttentionInterface.get_interface is not ORIGINALS[0]
    assert_untouched(model)


class Names(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Names, Ops])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["sdpa", "torch.nn", "encoder", "huggingface"])
def test_users_mode_gets_the_same_functions_with_and_without_record(mode: type[Any], training: bool, kind: str) -> None:
    x = torch.randn(B, L, E)
    model, inputs = {
        "sdpa": lambda: (Stack(), {"x": x}),
        "torch.nn": lambda: (self_attending(), {"x": x}),
        "encoder": lambda: (nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True), {"src": x}),
        "huggingface": llama,
    }[kind]()
    model.train(training)
    with torch.no_grad(), mode() as alone:
        plain = first_tensors(model(**inputs))
    with torch.no_grad(), record(model), mode() as inner:
        watched = first_tensors(model(**inputs))
    with torch.no_grad(), mode() as outer, record(model) as recording:
        again = first_tensors(model(**inputs))
    assert inner.seen == alone.seen
    assert [n for n in outer.seen if n != "__get__"] == [n for n in alone.seen if n != "__get__"]
    assert len(recording) >= 1
    for a, b, c in zip(plain, watched, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_compiled_model_is_refused_with_what_to_do() -> None:
    model = Stack()
    with pytest.raises(UnsupportedAttention) as refused, record(torch.compile(model, backend="eager")):
        raise AssertionError("not reached")
    assert str(refused.value).startswith("the model is compiled (torch.compile)")
    assert "._orig_mod" in str(refused.value)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.raises(UnsupportedAttention, match=r"module 'blocks\.1' of the model is compiled"), record(model):
        raise AssertionError("not reached")
    in_place = NanoGPT()
    in_place.compile(backend="eager")
    with pytest.raises(UnsupportedAttention, match="the model is compiled"), record(in_place):
        raise AssertionError("not reached")
    assert_untouched(model)


def test_another_model_is_compiled_and_runs_inside_record() -> None:
    model, other, x = Stack(), Stack(), torch.randn(B, L, E)
    compiled = torch.compile(other, backend="eager")
    with torch.no_grad(), record(model) as recording:
        assert torch.allclose(compiled(x), other(x))
        model(x)
    with torch.no_grad():
        assert torch.allclose(compiled(x), other(x))
    assert len(recording.calls) == 2
    assert_untouched(other)


def test_record_in_two_threads_gives_a_run_per_forward() -> None:
    model = llama()[0]
    texts = [torch.randint(3, 90, (1, n)) for n in (5, 8)]
    wanted = []
    for text in texts:
        with record(model) as alone:
            model(text)
        wanted.append(alone[1].dense())
    ready = threading.Barrier(2)

    def forwards(text: Tensor) -> None:
        ready.wait()
        for _ in range(3):
            model(text)

    with record(model, threads="all") as recording:
        threads = [threading.Thread(target=forwards, args=(text,)) for text in texts]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert len(recording.runs) == 6
    for run in recording.runs:
        assert_close(run[1].dense(), wanted[0] if run[1].shape[2] == 5 else wanted[1])
    assert sorted(run[0].shape[2] for run in recording.runs) == [5, 5, 5, 8, 8, 8]
    assert_untouched(model)


def test_record_of_a_model_and_of_its_module_agree() -> None:
    model, x = Stack(), torch.randn(B, L, E)
    with record(model) as whole, record(model.blocks[1]) as part:
        model(x)
    with record(model.blocks[1]) as part_first, record(model) as whole_second:
        model(x)
    for recording in (whole, whole_second):
        assert [site.name for site in recording.sites] == ["blocks.0", "blocks.1"]
    for recording in (part, part_first):
        assert [site.name for site in recording.sites] == [""]
        assert_close(recording[0].dense(), whole[1].dense())


def test_record_leaves_out_calls_of_another_model() -> None:
    model, other = NanoGPT(), NanoGPT()
    with record(model) as recording:
        other(torch.randn(B, L, E))
        model(torch.randn(B, L, E))
        other(torch.randn(B, L, E))
    assert len(recording.calls) == 1


def test_module_used_twice_has_two_occurrences() -> None:
    model = Stack()
    model.blocks[1] = model.blocks[0]
    with record(model) as recording:
        model(torch.randn(B, L, E))
    assert [(site.name, site.occurrence) for site in recording.sites] == [("blocks.0", 0), ("blocks.0", 1)]


def test_inference_mode_gives_the_same_weights() -> None:
    model, x = NanoGPT(), torch.randn(B, L, E)
    with torch.inference_mode():
        got, _ = recorded_weights(model, x)
    assert_close(got, recorded_weights(model, x)[0].detach())


def gradients(model: nn.Module, x: Tensor, *, how: str) -> list[Tensor]:
    model.zero_grad()
    if how == "alone":
        model(x).square().sum().backward()
    else:
        with record(model) as recording:
            loss = model(x).square().sum()
            if how == "inside":
                loss.backward()
        if how == "outside":
            loss.backward()
        assert len(recording.calls) == 2
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [NanoGPT, self_attending])
@pytest.mark.parametrize("how", ["inside", "outside"])
def test_gradients_are_the_same_under_record(make: Callable[[], nn.Module], how: str) -> None:
    model, x = Stack(make), torch.randn(B, L, E)
    alone = gradients(model, x, how="alone")
    watched = gradients(model, x, how=how)
    assert len(alone) == len(watched) == 8
    assert all(torch.equal(a, b) for a, b in zip(alone, watched, strict=True))


@pytest.mark.parametrize("make", [NanoGPT, self_attending])
def test_entropy_without_detach_gives_gradients_to_the_parameters(make: Callable[[], nn.Module]) -> None:
    model, x = Stack(make), torch.randn(B, L, E)
    with record(model, detach=False) as recording:
        model(x)
    recording[1].entropy().sum().backward()
    first = next(model.blocks[0].parameters()).grad
    assert first is not None
    assert first.abs().max() > 0
    with record(model) as recording:
        model(x)
    assert not recording[1].entropy().requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputation_is_not_a_second_call(reentrant: bool) -> None:
    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = Checkpointed()
    x = torch.randn(B, L, E, requires_grad=True)
    with record(model) as recording:
        model(x).sum().backward()
    assert [site.name for site in recording.sites] == ["blocks.0", "blocks.1"]
    assert len(recording.calls) == 2
    assert x.grad is not None
    assert_untouched(model)


def test_on_call_gets_operands_and_outputs() -> None:
    model, x = NanoGPT(), torch.randn(B, L, E)
    calls: list[tuple[AttentionCall, list[str]]] = []
    with watch(model, lambda call, forward: calls.append((call, list(forward.stack)))):
        model(x)
    ((call, running),) = calls
    assert running == [call.name] == [""]
    assert call.value.shape == (B, H, L, D)
    assert_close(call.matrix() @ call.value, call.head_outputs())


def test_nothing_seen_names_the_modules() -> None:
    class OwnAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    model = Stack(OwnAttention)
    with pytest.raises(NothingSeen) as nothing, record(model):
        model(torch.randn(B, L, E))
    assert "Stack ran 1 times" in str(nothing.value)
    assert "blocks.0 (OwnAttention), blocks.1 (OwnAttention)" in str(nothing.value)
    assert_untouched(model)


def test_record_of_an_empty_block_is_empty() -> None:
    with record(NanoGPT()) as recording:
        pass
    assert len(recording) == 0
