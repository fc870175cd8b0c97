"""train() in one process: learning, logging, resuming, refusing."""

import math
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from headscope import HeadWarning
from headscope.commands import app as cli
from headscope.distributed import Processes, joined
from headscope.errors import HeadscopeError
from headscope.training import (
    TASKS,
    Stopped,
    TrainConfig,
    TrainingStep,
    TrainResult,
    make_task,
    signals,
    train,
)
from tests.training.small import OPTIONS, same, small, weights


@pytest.mark.parametrize(("task", "steps", "rows", "rate"), [("copy", 220, 32, 1e-2), ("sort", 300, 64, 8e-3)])
def test_train_solves_held_out_rows(task: str, steps: int, rows: int, rate: float) -> None:
    model = make_task(task, 4).model_config(embed_dim=32, num_heads=4, num_layers=1, ff_dim=64)
    config = TrainConfig(task, steps=steps, batch_size=rows, length=4, model=model, learning_rate=rate, seed=2)
    losses: list[float] = []
    result = train(config, on_progress=lambda step: losses.append(step.loss))
    assert losses[0] > 2.5
    assert result.held_out.exact is not None
    assert result.held_out.exact > 0.99
    assert result.held_out.loss < 0.05
    assert result.held_out.bits == pytest.approx(result.held_out.loss / math.log(2))


def test_train_is_determined_by_its_seed() -> None:
    steps: list[TrainingStep] = []
    torch.manual_seed(1)
    first = train(small(), on_progress=steps.append)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert same(first, train(small()))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.loss != train(small(seed=1)).loss
    assert [(step.done, step.of) for step in steps] == [(i, 6) for i in range(1, 7)]
    assert steps[-1].loss == first.loss


def test_first_weights_do_not_depend_on_the_number_of_heads() -> None:
    configs = [small(model=replace(small().sizes, num_heads=heads), learning_rate=1e-12) for heads in (1, 4)]
    one, four = (train(replace(config, steps=1, weight_decay=0.0)) for config in configs)
    for a, b in zip(weights(one), weights(four), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_log_receives_loss_rate_and_head_statistics() -> None:
    logged: dict[str, list[tuple[float, int]]] = {}
    result = train(small(), watch_every=3, log=lambda n, value, step: logged.setdefault(n, []).append((value, step)))
    assert [step for _, step in logged["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert logged["train/loss"][-1][0] == result.loss
    assert [rate for rate, _ in logged["train/learning_rate"]] == [pytest.approx(small().rate(i)) for i in range(6)]
    assert logged["held_out/loss"] == [(result.held_out.loss, 6)]
    steps = {name: [step for _, step in values] for name, values in logged.items() if name.startswith("heads/0.1/")}
    wanted = {f"heads/0.1/{what}" for what in ("entropy", "largest_logit", "sink_mass", "dead")}
    assert steps == {name: [0, 3] for name in wanted}
    assert same(result, train(small()))  # watching changes nothing


def test_clip_limits_the_gradient() -> None:
    start, small_step, large_step = (
        train(small(steps=1, learning_rate=rate, clip=clip, weight_decay=0.0, warmup=0))
        for rate, clip in ((1e-12, 1.0), (1e-2, 1e-12), (1e-2, 1.0))
    )

    def moved(to: TrainResult) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(weights(to), weights(start), strict=True))

    assert moved(small_step) < 2e-6 < 5e-3 < moved(large_step)


def test_each_process_reads_its_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.training.loop import _TrainingRun
    from headscope.training.signals import StopFlag

    read: list[torch.Tensor] = []
    run = _TrainingRun(small(), Processes(1, 3, torch.device("cpu")), None)
    run.model.register_forward_pre_hook(lambda module, args: read.append(args[1]))
    monkeypatch.setattr(Processes, "total", lambda group, *values: [group.count * value for value in values])
    run._train_step(run.model, 0.1, None, StopFlag())
    whole = make_task("copy").batch(0, 0, 12).source
    assert whole is not None
    assert torch.equal(read[0], whole[4:8])


def test_bfloat16_training_keeps_float32_weights() -> None:
    half, full = train(small(precision="bfloat16")), train(small())
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert half.loss != full.loss
    assert half.model.embedding.weight.dtype == torch.float32


def test_result_names_its_precision() -> None:
    assert train(small(steps=1)).precision == "float32"
    assert train(small(steps=1, precision="bfloat16")).precision == "bfloat16"


def test_learning_rate_curve_and_weight_decay_of_matrices_only() -> None:
    config = TrainConfig("copy", steps=110, learning_rate=0.4, warmup=10)
    assert [config.rate(step) for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.04, 0.2, 0.4, 0.4, 0.22, 0.04])
    plain, decayed = (train(small(steps=1, weight_decay=decay, warmup=0)) for decay in (0.0, 10.0))
    pairs = list(zip(plain.model.named_parameters(), decayed.model.named_parameters(), strict=True))
    assert {a.dim() for (_, a), (_, b) in pairs if torch.equal(a, b)} == {1}
    assert {a.dim() for (_, a), (_, b) in pairs if not torch.equal(a, b)} == {2}


def test_interrupted_run_resumes_to_identical_weights(tmp_path: Path) -> None:
    config = small(steps=9, model=replace(small().sizes, dropout_p=0.2))
    whole = train(config)

    class Interruption(Exception):
        pass

    def cut(step: TrainingStep) -> None:
        if step.done == 7:
            raise Interruption

    with pytest.raises(Interruption):
        train(config, folder=tmp_path, save_every=2, on_progress=cut)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]
    resumed = train(config, folder=tmp_path, save_every=2)
    assert resumed.first_step == 6
    assert resumed.held_out == whole.held_out
    assert same(resumed, whole)
    done = train(config, folder=tmp_path)
    assert (done.first_step, done.loss) == (9, whole.loss)
    assert same(done, whole)


def test_ctrl_c_stops_between_two_steps() -> None:
    def stop(step: TrainingStep) -> None:
        if step.done == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        train(small(), on_progress=stop)
    assert (stopped.value.step, stopped.value.path) == (3, None)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_interrupts_at_once_unless_torchrun_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])
    with signals.stop_signals() as flag:
        assert not flag.is_set
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.5  # torchrun passes on the Ctrl-C that the process has had from the terminal
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert flag.is_set
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_damaged_checkpoint_is_skipped_with_a_note(tmp_path: Path) -> None:
    whole = train(small(), folder=tmp_path, save_every=4)
    last = tmp_path / "step-00000006.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    notes: list[str] = []
    again = train(small(), folder=tmp_path, on_note=notes.append)
    assert (again.first_step, len(notes)) == (4, 1)
    assert str(last) in notes[0]
    assert same(again, whole)


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(small(steps=2), folder=tmp_path)
    path = tmp_path / "step-00000002.safetensors"
    with pytest.raises(HeadscopeError) as error:
        train(small(steps=5, seed=3), folder=tmp_path)
    assert str(error.value) == (
        f"{path} is of another run (steps 2, now 5; seed 0, now 3). Give the same settings to resume it, or "
        "choose another folder."
    )
    with pytest.raises(HeadscopeError, match=r"of another run \(task copy, now sort"):
        train(small("sort", steps=2), folder=tmp_path)


def test_checkpoint_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(steps=2), folder=tmp_path)
    monkeypatch.setattr(TASKS["copy"], "identity", "copy 2")
    with pytest.raises(HeadscopeError, match=r"is of another run \(data copy 1, now copy 2\)\. Give the same settings"):
        train(small(steps=2), folder=tmp_path)


def test_batch_size_must_be_a_multiple_of_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    @contextmanager
    def five(device: str) -> Any:
        yield Processes(0, 5, torch.device("cpu"))

    from headscope.training import loop

    monkeypatch.setattr(loop, "joined", five)
    with pytest.raises(ValueError, match=r"A batch of 12 rows cannot be shared evenly by 5 processes: make batch_size"):
        train(small())
    with joined("cpu") as alone:
        assert (alone.rank, alone.count, alone.total(2.5, 3.0)) == (0, 1, [2.5, 3.0])


def test_folder_that_is_a_file_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done: list[TrainingStep] = []
    with pytest.raises(HeadscopeError, match=r"file is a file: checkpoints need a folder of their own"):
        train(small(), folder=tmp_path / "file", on_progress=done.append)
    assert not done
    run = CliRunner().invoke(cli.app, ["train", "copy", *OPTIONS, "--steps", "2", "--out", str(tmp_path / "file")])
    assert run.exit_code == 1
    assert run.stderr.startswith("Error: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_missing_cuda_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA device here"):
        train(small(), device="cuda")


def test_loss_that_is_not_finite_ends_the_run() -> None:
    with pytest.raises(HeadscopeError, match=r"The loss is (nan|inf) at step \d: .* below 1e\+30, or a longer warm-up"):
        train(small(learning_rate=1e30, warmup=0, clip=1e30))
    with pytest.raises(ValueError, match=r"save_every 0, watch_every 50: both are at least 1\."):
        train(small(), save_every=0)


def test_train_warns_of_heads_without_on_note() -> None:
    with pytest.warns(HeadWarning) as warned:
        result = train(small(steps=4, learning_rate=5.0, warmup=0), watch_every=3)
    assert any(re.search("its largest logit is .* above 100", str(warning.message)) for warning in warned)
    assert result.heads is not None
    assert result.heads.step == 3


def test_tensorboard_files_hold_the_logged_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    from headscope.training.logs import tensorboard

    for first, value in ((1, 5.0), (3, 7.0)):  # the second run goes on after step 2
        with tensorboard(tmp_path) as log:
            for step in range(first, 5):
                log("train/loss", value + step, step)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 6.0), (2, 7.0), (3, 10.0), (4, 11.0)]
