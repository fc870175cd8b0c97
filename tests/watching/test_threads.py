"""Watches of one model in several threads: each sees and alters the forwards of its own thread."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from headscope import ablate, edit, monitor, record
from headscope.errors import EditError, NothingSeen
from tests.watching.small_models import B, E, L, Stack, assert_close, assert_untouched


class Turns:
    """Lets two threads go on one at a time, in a given order."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.running = deque(order), {0, 1}
        self.turn = threading.Condition()
        self.local = threading.local()

    def wait(self) -> None:
        if not hasattr(self.local, "number"):
            return
        with self.turn:
            self.turn.wait_for(self._is_mine, timeout=30)
            if self.order:
                self.order.popleft()
            self.turn.notify_all()

    def _is_mine(self) -> bool:
        while self.order and self.order[0] not in self.running:
            self.order.popleft()
        return not self.order or self.order[0] == self.local.number

    def run(self, number: int, work: Callable[[], None], errors: list[BaseException]) -> None:
        self.local.number = number
        try:
            work()
        except BaseException as error:
            errors.append(error)
        with self.turn:
            self.running.discard(number)
            self.turn.notify_all()


class Interrupted(Stack):
    """Another thread may go on before, between and after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pause: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            self.pause()
            x = x + block(x)
        self.pause()
        return x


torch.manual_seed(0)
MODEL = Interrupted().eval()
TEXTS = [torch.randn(1, 5, E), torch.randn(1, 5, E), torch.randn(1, 8, E)]
KINDS = ["record", "edit", "monitor", "plain"]


def alone(text: Tensor, edited: bool) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad(), ExitStack() as watches:
        if edited:
            watches.enter_context(edit(MODEL, ablate(0, 1)))
        recording = watches.enter_context(record(MODEL))
        output = MODEL(text)
    return output, [matrix.dense() for matrix in recording]


ALONE = {(i, edited): alone(text, edited) for i, text in enumerate(TEXTS) for edited in (False, True)}


def work(program: list[tuple[str, int]], turns: Turns) -> None:
    for kind, text in program:
        turns.wait()
        with torch.no_grad(), ExitStack() as watches:
            if kind == "edit":
                watches.enter_context(edit(MODEL, ablate(0, 1)))
            measured = watches.enter_context(monitor(MODEL, every=1)) if kind == "monitor" else None
            recording = watches.enter_context(record(MODEL)) if kind in ("record", "edit") else None
            turns.wait()
            output = MODEL(TEXTS[text])
            turns.wait()
        wanted, maps = ALONE[text, kind == "edit"]
        assert torch.equal(output, wanted), kind
        if recording is not None:
            assert len(recording) == len(recording.calls) == len(maps)
            assert all(torch.equal(a.dense(), b) for a, b in zip(recording, maps, strict=True))
        if measured is not None:
            assert len(measured.history) == 1
            assert measured.history[0].sites == ("blocks.0", "blocks.1")


programs = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, len(TEXTS) - 1)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(programs, programs, st.lists(st.integers(0, 1), max_size=40))
def test_two_threads_with_any_interleaving_see_only_their_own(
    first: list[tuple[str, int]], second: list[tuple[str, int]], order: list[int]
) -> None:
    turns = Turns(order)
    errors: list[BaseException] = []
    MODEL.pause = turns.wait
    both = [
        threading.Thread(target=turns.run, args=(i, lambda p=p: work(p, turns), errors))
        for i, p in enumerate((first, second))
    ]
    [thread.start() for thread in both]
    [thread.join() for thread in both]
    MODEL.pause = lambda: None
    assert errors == []
    assert_untouched(MODEL)


@contextmanager
def replicas(model: nn.Module, count: int) -> Iterator[list[nn.Module]]:
    """Copies as nn.DataParallel makes them, which share parameters, and hooks if there are any."""

    def replica(module: nn.Module) -> nn.Module:
        new = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            new._modules[name] = replica(child)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(new, name, parameter.view_as(parameter))
        return new

    yield [replica(model) for _ in range(count)]


class DataParallel(nn.Module):
    """A batch in parts, each in a thread of its own, as nn.DataParallel runs it on several devices."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = list(x.split(1))
        with replicas(self.module, len(parts)) as modules:
            outputs: list[Any] = [None] * len(parts)

            def run(i: int) -> None:
                with torch.no_grad():
                    outputs[i] = modules[i](parts[i])

            threads = [threading.Thread(target=run, args=(i,)) for i in range(len(parts))]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
        return torch.cat(outputs)


def test_all_threads_of_data_parallel_code_are_recorded_edited_and_measured() -> None:
    model, x = Stack(), torch.randn(3, L, E)
    parallel = DataParallel(model)
    for watched in (model, parallel):
        with record(watched, threads="all") as recording:
            parallel(x)
        assert len(recording.runs) == 3
        with torch.no_grad(), record(model) as whole:
            model(x)
        first = {run[0].dense().flatten()[L].item(): run for run in recording.runs}
        for i in range(3):
            run = first[whole[0].dense()[i].flatten()[L].item()]
            assert_close(run[1].dense(), whole[1].dense()[i : i + 1])
        with edit(watched, ablate(1, 0), threads="all"):
            edited = parallel(x)
        with torch.no_grad(), edit(model, ablate(1, 0)):
            assert_close(edited, model(x))
        measured = monitor(watched, every=1, threads="all")
        with measured:
            parallel(x)
        assert len(measured.history) == 1
        assert len(measured.history[0].sites) == 2


def test_own_thread_of_data_parallel_code_says_how_to_see_the_others() -> None:
    model, x = Stack(), torch.randn(B, L, E)
    parallel = DataParallel(model)
    for watched in (model, parallel):
        with (
            pytest.raises(NothingSeen, match=r'in other threads only.*record\(model, threads="all"\)'),
            record(watched),
        ):
            parallel(x)
        with pytest.raises(EditError, match=r'in other threads only.*threads="all"'), edit(watched, ablate(0, 0)):
            parallel(x)
        with pytest.raises(NothingSeen, match=r'monitor\(model, threads="all"\)'), monitor(watched, every=1):
            parallel(x)


def test_threads_is_own_or_all() -> None:
    with pytest.raises(ValueError, match=r"threads is 'both': wanted \"own\""), record(Stack(), threads="both"):
        raise AssertionError("not reached")


def test_thread_that_reuses_an_identity_is_another_thread() -> None:
    model, x = Stack(), torch.randn(B, L, E)
    opened: list[Any] = []

    def open_and_end() -> None:
        watch = record(model)
        watch.__enter__()
        opened.append((watch, threading.get_ident()))

    for target in (open_and_end, lambda: model(x)):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    with pytest.raises(NothingSeen, match="in other threads only"):
        opened[0][0].__exit__(None, None, None)
    assert_untouched(model)
