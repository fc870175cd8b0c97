"""Training: tasks, the loop on one process and two, checkpoints, interruptions."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from headscope import HeadWarning
from headscope.commands import app as cli
from headscope.commands import train as commands
from headscope.distributed import Processes, joined
from headscope.errors import HeadscopeError
from headscope.training import (
    TASKS,
    Stopped,
    TrainConfig,
    TrainingStep,
    TrainResult,
    checkpoint,
    make_task,
    signals,
    train,
)
from headscope.training.tasks import IGNORED

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--embed-dim", "16", "--heads", "2", "--layers", "1", "--length", "5", "--batch-size", "12"]


def small(task: str = "copy", **settings: Any) -> TrainConfig:
    model = make_task(task, settings.get("length", 0)).model_config(embed_dim=16, num_heads=2, num_layers=1, ff_dim=32)
    return TrainConfig(task, **({"steps": 6, "batch_size": 12, "model": model, "precision": "float32"} | settings))


def weights(result: TrainResult) -> list[torch.Tensor]:
    return list(result.model.state_dict().values())


def same(first: TrainResult, second: TrainResult) -> bool:
    pairs = zip(weights(first), weights(second), strict=True)
    return first.loss == second.loss and all(torch.equal(a, b) for a, b in pairs)


def command(*words: str, processes: int = 1, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run = [*start, "-m", "headscope", "train", *words]
    return subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# Tasks


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_depends_on_seed_and_step_alone(name: str) -> None:
    task = make_task(name)
    torch.manual_seed(1)
    first = task.batch(7, 3, 5)
    torch.manual_seed(2)
    again = make_task(name).batch(7, 3, 5)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    for other in (task.batch(8, 3, 5), task.batch(7, 4, 5)):
        assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", ["copy", "sort", "lookups"])
def test_no_held_out_row_is_ever_trained_on(name: str) -> None:
    task: Any = make_task(name, 16 if name == "lookups" else 4)
    kept = task.held_out(500)
    source = kept.tokens if kept.source is None else kept.source
    held_out = {tuple(sorted(row) if name == "sort" else row) for row in source.tolist()}
    for step in range(40):
        batch = task.batch(0, step, 500)
        rows = (batch.tokens if batch.source is None else batch.source).tolist()
        assert held_out.isdisjoint(tuple(sorted(row) if name == "sort" else row) for row in rows)
    everything = torch.randint(task.symbols, (8000, task.length))
    assert 0.10 < task.is_held_out(everything).float().mean() < 0.15


def test_the_answers_of_the_tasks() -> None:
    copy, sort, lookups = (make_task(name).batch(0, 0, 2) for name in ("copy", "sort", "lookups"))
    assert copy.source is not None
    assert sort.source is not None
    assert torch.equal(copy.targets, copy.source)
    assert copy.tokens[0].tolist() == [16, *copy.source[0, :-1].tolist()]
    assert sort.targets[1].tolist() == sorted(sort.source[1].tolist())
    row, targets = lookups.tokens[0].tolist(), lookups.targets[0].tolist()
    assert targets[:10] == [IGNORED] * 10
    wanted = [3 + 27 * row[i - 1] + 9 * row[i - 3] + 3 * row[i - 6] + row[i - 10] for i in range(10, 40)]
    assert targets[10:] == wanted


def test_bytes_are_those_of_the_library_and_held_out_files_are_not_trained_on() -> None:
    task = make_task("bytes", 64)
    held_out = task.held_out(40)
    assert torch.equal(held_out.tokens[:, 1:], held_out.targets[:, :-1])
    text = bytes(task.batch(0, 0, 200).tokens.flatten().tolist())
    assert text.count(b"self") > 20
    from headscope.training.tasks import _library

    train_text, held_out_text = (bytes(part.tolist()) for part in (_library().train, _library().held_out))
    assert len(train_text) > 5_000_000
    assert set(train_text.split(b"\0")) & set(held_out_text.split(b"\0")) <= {b"", b"\n"}
    rows = [bytes(row) for row in held_out.tokens.tolist()]
    assert all(row in held_out_text for row in rows)
    assert sum(row in train_text for row in rows) <= 2  # a licence may stand in files of both kinds


def test_parts_of_a_batch_are_the_batch() -> None:
    batch = make_task("copy").batch(0, 0, 12)
    parts = [batch.part(which, 3) for which in range(3)]
    assert [len(part.tokens) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert torch.equal(torch.cat([part.source for part in parts if part.source is not None]), batch.source)


# The loop


@pytest.mark.parametrize(("task", "steps", "rows", "rate"), [("copy", 250, 32, 8e-3), ("sort", 400, 64, 5e-3)])
def test_it_learns_what_it_has_never_seen(task: str, steps: int, rows: int, rate: float) -> None:
    model = make_task(task, 5).model_config(embed_dim=32, num_heads=4, num_layers=1, ff_dim=64)
    config = TrainConfig(task, steps=steps, batch_size=rows, length=5, model=model, learning_rate=rate, seed=2)
    losses: list[float] = []
    result = train(config, on_progress=lambda step: losses.append(step.loss))
    assert losses[0] > 2.5
    assert result.held_out.exact is not None
    assert result.held_out.exact > 0.99
    assert result.held_out.loss < 0.05
    assert result.held_out.bits == pytest.approx(result.held_out.loss / math.log(2))


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
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


def test_weights_start_the_same_whatever_the_number_of_heads() -> None:
    configs = [small(model=replace(small().sizes, num_heads=heads), learning_rate=1e-12) for heads in (1, 4)]
    one, four = (train(replace(config, steps=1, weight_decay=0.0)) for config in configs)
    for a, b in zip(weights(one), weights(four), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_what_is_logged() -> None:
    seen: dict[str, list[tuple[float, int]]] = {}
    result = train(small(), watch_every=3, log=lambda n, value, step: seen.setdefault(n, []).append((value, step)))
    assert [step for _, step in seen["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert seen["train/loss"][-1][0] == result.loss
    assert [rate for rate, _ in seen["train/learning_rate"]] == [pytest.approx(small().rate(i)) for i in range(6)]
    assert seen["held_out/loss"] == [(result.held_out.loss, 6)]
    looks = {name: [step for _, step in values] for name, values in seen.items() if name.startswith("heads/0.1/")}
    wanted = {f"heads/0.1/{what}" for what in ("entropy", "largest_logit", "sink_mass", "dead")}
    assert looks == {name: [0, 3] for name in wanted}
    assert same(result, train(small()))  # watching changes nothing


def test_a_clipped_gradient_moves_little() -> None:
    start, small_step, large_step = (
        train(small(steps=1, learning_rate=rate, clip=clip, weight_decay=0.0, warmup=0))
        for rate, clip in ((1e-12, 1.0), (1e-2, 1e-12), (1e-2, 1.0))
    )

    def moved(to: TrainResult) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(weights(to), weights(start), strict=True))

    assert moved(small_step) < 2e-6 < 5e-3 < moved(large_step)


def test_a_process_takes_its_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.training.loop import _TrainingRun
    from headscope.training.signals import StopFlag

    read: list[torch.Tensor] = []
    run = _TrainingRun(small(), Processes(1, 3, torch.device("cpu")), None)
    run.model.register_forward_pre_hook(lambda module, given: read.append(given[1]))
    monkeypatch.setattr(Processes, "total", lambda me, *values: [me.count * value for value in values])
    run._one(run.model, 0.1, None, StopFlag())
    whole = make_task("copy").batch(0, 0, 12).source
    assert whole is not None
    assert torch.equal(read[0], whole[4:8])


def test_bfloat16_trains_too() -> None:
    half, full = train(small(precision="bfloat16")), train(small())
    assert half.loss == pytest.approx(full.loss, rel=0.05)
    assert half.loss != full.loss
    assert half.model.embedding.weight.dtype == torch.float32


def test_auto_takes_bfloat16_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_run_says_what_it_was_made_in() -> None:
    assert train(small(steps=1)).precision == "float32"
    assert train(small(steps=1, precision="bfloat16")).precision == "bfloat16"


def test_only_matrices_decay_and_the_rate_follows_its_curve() -> None:
    config = TrainConfig("copy", steps=110, learning_rate=0.4, warmup=10)
    assert [config.rate(step) for step in (0, 4, 9, 10, 60, 110)] == pytest.approx([0.04, 0.2, 0.4, 0.4, 0.22, 0.04])
    plain, decayed = (train(small(steps=1, weight_decay=decay, warmup=0)) for decay in (0.0, 10.0))
    pairs = list(zip(plain.model.named_parameters(), decayed.model.named_parameters(), strict=True))
    assert {a.dim() for (_, a), (_, b) in pairs if torch.equal(a, b)} == {1}
    assert {a.dim() for (_, a), (_, b) in pairs if not torch.equal(a, b)} == {2}


# Going on


def test_a_run_goes_on_to_the_same_bit(tmp_path: Path) -> None:
    config = small(steps=9, model=replace(small().sizes, dropout_p=0.2))
    whole = train(config)

    class PowerCut(Exception):
        pass

    def cut(step: TrainingStep) -> None:
        if step.done == 7:
            raise PowerCut

    with pytest.raises(PowerCut):
        train(config, folder=tmp_path, save_every=2, on_progress=cut)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]
    went_on = train(config, folder=tmp_path, save_every=2)
    assert went_on.first_step == 6
    assert went_on.held_out == whole.held_out
    assert same(went_on, whole)
    done = train(config, folder=tmp_path)
    assert (done.first_step, done.loss) == (9, whole.loss)
    assert same(done, whole)


def test_a_worker_that_is_killed_loses_only_the_steps_since_its_checkpoint(tmp_path: Path) -> None:
    words = ["copy", *SMALL, "--steps", "120", "--save-every", "20", "--precision", "float32", "--json"]
    folder = tmp_path / "killed"
    run = command(*words, "--out", str(folder))
    ready = time.monotonic() + 60
    while not list(folder.glob("step-*.safetensors")) and time.monotonic() < ready:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL
    out, _ = command(*words, "--out", str(folder)).communicate(timeout=120)
    answer = json.loads(out)
    assert 20 <= answer["first_step"] < 120
    model = make_task("copy", 5).model_config(embed_dim=16, num_heads=2, num_layers=1, ff_dim=64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = train(TrainConfig("copy", steps=120, batch_size=12, length=5, model=model, precision="float32"))
    torch.set_num_threads(threads)
    assert answer["loss"] == whole.loss
    assert answer["held_out"]["loss"] == whole.held_out.loss


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    words = ["copy", *SMALL, "--steps", "8", "--precision", "float32", "--json", "--save-every", "4"]
    out, error = command(*words, "--out", str(tmp_path / "two"), processes=2).communicate(timeout=120)
    two = json.loads(out)
    model = make_task("copy", 5).model_config(embed_dim=16, num_heads=2, num_layers=1, ff_dim=64)
    config = TrainConfig("copy", steps=8, batch_size=12, length=5, model=model, precision="float32")
    one = train(config)
    assert two["loss"] == pytest.approx(one.loss, rel=1e-5)
    assert two["held_out"]["loss"] == pytest.approx(one.held_out.loss, rel=1e-5)
    assert two["held_out"]["rows"] == 256
    found = checkpoint.latest(tmp_path / "two")
    assert found is not None
    matrices = {name: weight for name, weight in one.model.state_dict().items() if weight.dim() > 1}
    for name, weight in matrices.items():  # a key's bias changes no softmax, so its gradient is mere rounding
        torch.testing.assert_close(found.tensors[f"model.{name}"], weight, rtol=1e-4, atol=1e-5)
    (tmp_path / "two" / "step-00000008.safetensors").unlink()
    out, error = command(*words, "--out", str(tmp_path / "two"), processes=2).communicate(timeout=120)
    went_on = json.loads(out)
    assert (went_on["first_step"], went_on["loss"]) == (4, pytest.approx(two["loss"], rel=1e-6)), error


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="a process's children are read from /proc")
def test_one_killed_worker_of_two_loses_only_the_steps_since_the_checkpoint(tmp_path: Path) -> None:
    words = ["copy", *SMALL, "--steps", "400", "--save-every", "20", "--precision", "float32", "--json"]
    folder = tmp_path / "run"
    run = command(*words, "--out", str(folder), processes=2)
    ready = time.monotonic() + 60
    while not list(folder.glob("step-*.safetensors")) and time.monotonic() < ready:
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = sorted(int(n) for n in children if b"headscope" in Path(f"/proc/{n}/cmdline").read_bytes())
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)  # its neighbour waits for it; torchrun ends both
    run.communicate(timeout=120)
    assert run.returncode != 0
    out, error = command(*words, "--out", str(folder), processes=2).communicate(timeout=120)
    went_on = json.loads(out)
    assert 20 <= went_on["first_step"] < 400, error
    model = make_task("copy", 5).model_config(embed_dim=16, num_heads=2, num_layers=1, ff_dim=64)
    config = TrainConfig("copy", steps=400, batch_size=12, length=5, model=model, precision="float32")
    assert went_on["held_out"]["loss"] == pytest.approx(train(config).held_out.loss, rel=1e-3)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = command("copy", *SMALL, "--steps", "100000", "--save-every", "5", "--out", str(folder))
    ready = time.monotonic() + 60
    while not list(folder.glob("step-*.safetensors")) and time.monotonic() < ready:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 130
    match = re.search(r"Stopped after step (\d+) of 100000; its state is in (\S+)\. To go on, give the same", error)
    assert match is not None, error
    found = checkpoint.latest(folder)
    assert found is not None
    assert (found.step, str(found.path)) == (int(match[1]), match[2])
    assert out == ""


def test_stopping_between_two_steps() -> None:
    def stop(step: TrainingStep) -> None:
        if step.done == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        train(small(), on_progress=stop)
    assert (stopped.value.step, stopped.value.path) == (3, None)
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once_unless_torchrun_sent_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(signals, "monotonic", lambda: now[0])
    with signals.stop_signals() as flag:
        assert not flag.asked
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.5  # torchrun passes on the Ctrl-C that the process has had from the terminal
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert flag.asked
        now[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


# Checkpoints


def kept(folder: Path, step: int, value: float = 1.0) -> Path:
    tensors = {"model.a": torch.full((40, 30), value), "model.b": torch.tensor(value)}
    return checkpoint.save(folder, step, {"config": {}, "loss": 0.5}, tensors)


def test_the_last_two_checkpoints_stay_and_come_back_as_they_were(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.123.part.safetensors").write_bytes(b"left by a killed process")
    (tmp_path / "notes.txt").write_text("mine")
    for step in (9, 10, 11):
        kept(tmp_path, step, value=step / 3)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["notes.txt", "step-00000010.safetensors", "step-00000011.safetensors"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, found.run) == (11, {"config": {}, "loss": 0.5})
    assert torch.equal(found.tensors["model.a"], torch.full((40, 30), 11 / 3))
    assert found.tensors["model.b"].shape == ()
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: done.append(name) or real(*given))
    kept(tmp_path, 10)
    assert done == ["fsync", "replace", "fsync"]  # the file, its name, the folder


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.5, 0.999])
def test_a_cut_checkpoint_is_never_loaded(share: float, tmp_path: Path) -> None:
    kept(tmp_path, 10)
    last = kept(tmp_path, 20)
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    notes: list[str] = []
    found = checkpoint.latest(tmp_path, notes.append)
    assert found is not None
    assert found.step == 10
    (note,) = notes
    assert note.startswith(f"{last} is not whole and is passed over: ")


def test_a_damaged_checkpoint_is_never_loaded(tmp_path: Path) -> None:
    path = kept(tmp_path, 10)
    good = path.read_bytes()
    for damaged in (good[:-8] + bytes(8), good.replace(b'\\"step\\": 10', b'\\"step\\": 11'), b"\xff" * 2000):
        assert damaged != good
        path.write_bytes(damaged)
        notes: list[str] = []
        assert checkpoint.latest(tmp_path, notes.append) is None
        assert len(notes) == 1
    save_file({"a": torch.ones(3)}, path)
    assert checkpoint.latest(tmp_path, notes.append) is None
    assert "its format is 'None', not 'headscope-checkpoint'" in notes[-1]


def test_a_run_falls_back_to_the_checkpoint_before_and_says_so(tmp_path: Path) -> None:
    whole = train(small(), folder=tmp_path, save_every=4)
    last = tmp_path / "step-00000006.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    notes: list[str] = []
    again = train(small(), folder=tmp_path, on_note=notes.append)
    assert (again.first_step, len(notes)) == (4, 1)
    assert str(last) in notes[0]
    assert same(again, whole)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    path = kept(tmp_path, 10)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | {"version": "7"})
    with pytest.raises(HeadscopeError, match=r"checkpoint of version '7', this Headscope reads version 1: use the"):
        checkpoint.latest(tmp_path)


def test_a_checkpoint_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HeadscopeError, match=r"Cannot write the checkpoint .*step-00000003.*: (File exists|Not a dir)"):
        kept(tmp_path / "file", 3)


def test_nothing_is_pickled() -> None:
    for path in (ROOT / "src" / "headscope" / "training").glob("*.py"):
        assert not re.search(r"pickle|torch\.(save|load)\b|_object", path.read_text("utf-8")), path


# Errors


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
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(**({"task": "copy"} | settings))
    assert str(error.value) == message


def test_a_precision_that_cannot_be() -> None:
    config = small()
    object.__setattr__(config, "precision", "int8")  # the tests' own checker of types would refuse it before
    with pytest.raises(ValueError, match=r"precision is 'int8': it is one of auto, float32, bfloat16\."):
        config.__post_init__()


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    train(small(steps=2), folder=tmp_path)
    path = tmp_path / "step-00000002.safetensors"
    with pytest.raises(HeadscopeError) as error:
        train(small(steps=5, seed=3), folder=tmp_path)
    assert str(error.value) == (
        f"{path} is of another run (steps 2, now 5; seed 0, now 3). Give the same settings to go on with it, or "
        "choose another folder."
    )
    with pytest.raises(HeadscopeError, match=r"of another run \(task copy, now sort"):
        train(small("sort", steps=2), folder=tmp_path)


def test_a_run_on_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(small(steps=2), folder=tmp_path)
    monkeypatch.setattr(TASKS["copy"], "identity", "copy 2")
    with pytest.raises(HeadscopeError, match=r"is of another run \(data copy 1, now copy 2\)\. Give the same settings"):
        train(small(steps=2), folder=tmp_path)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_under_torchrun_an_error_is_told_once(tmp_path: Path) -> None:
    words = ["copy", *SMALL, "--batch-size", "7", "--out", str(tmp_path / "run")]
    _, error = command(*words, processes=2).communicate(timeout=120)
    assert error.count("Error: A batch of 7 rows cannot be shared evenly by 2 processes") == 1


def test_a_folder_that_is_a_file_is_told_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done: list[TrainingStep] = []
    with pytest.raises(HeadscopeError, match=r"file is a file: checkpoints need a folder of their own"):
        train(small(), folder=tmp_path / "file", on_progress=done.append)
    assert not done
    run = CliRunner().invoke(cli.app, ["train", "copy", *SMALL, "--steps", "2", "--out", str(tmp_path / "file")])
    assert run.exit_code == 1
    assert run.stderr.startswith("Error: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match="device is 'cuda', but torch sees no CUDA device here"):
        train(small(), device="cuda")


def test_rows_longer_than_the_library_are_told() -> None:
    with pytest.raises(ValueError, match=r"bytes with rows of length 100000000: the held-out files have \d+ bytes"):
        make_task("bytes", 100_000_000).batch(0, 0, 1)


def test_numbers_that_get_too_large_are_told() -> None:
    with pytest.raises(HeadscopeError, match=r"The loss is (nan|inf) at step \d: .* below 1e\+30, or a longer warm-up"):
        train(small(learning_rate=1e30, warmup=0, clip=1e30))
    with pytest.raises(ValueError, match=r"save_every 0, watch_every 50: both are at least 1\."):
        train(small(), save_every=0)


# The command


def test_the_command_trains_and_tells_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["train", "copy", *SMALL, "--steps", "20"])
    assert done.exit_code == 0, done.output
    assert "On 256 held-out rows, none of which it was trained on: " in done.stdout
    assert "Written without a mistake, token after token: 0.0% of them." in done.stdout
    assert "Checkpoint: runs/copy/step-00000020.safetensors" in done.stdout
    assert re.search(r"Heads at step 0 .*decoder\.layers\.0\.cross_attention +\d+% +\d+% ", done.stdout, re.DOTALL)
    assert re.search(r"training copy: 20/20 loss \d\.\d{4}", done.stderr)
    assert list(Path("runs/copy/tensorboard").glob("events.out.tfevents.*"))
    again = CliRunner().invoke(cli.app, ["train", "copy", *SMALL, "--steps", "20"])
    assert "All 20 steps were done before; another --out or --seed begins anew." in again.stdout


def test_heads_are_watched_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "has_tensorboard", lambda: False)
    words = ["train", "copy", *SMALL, "--steps", "60", "--seed", "1", "--out", str(tmp_path / "run"), "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--learning-rate", "3", "--warmup", "0"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "tensorboard").exists()
    heads = json.loads(done.stdout)["heads"]
    assert heads["step"] == 50
    assert [(row["layer"], row["head"]) for row in heads["table"]] == [(i, h) for i in range(3) for h in range(2)]
    assert {"entropy", "entropy_share", "largest_logit", "sink_mass", "dead", "finite", "site"} < set(heads["table"][0])
    assert re.search(r"^head \d\.\d \(.*attention\) at step 50: its largest logit is \S+, above 100", done.stderr, re.M)
    assert "loop.py" not in done.stderr


def test_a_library_run_warns_of_its_heads() -> None:
    with pytest.warns(HeadWarning, match="its largest logit is .* above 100"):
        result = train(small(steps=4, learning_rate=5.0, warmup=0), watch_every=3)
    assert result.heads is not None
    assert result.heads.step == 3


def test_tensorboard_holds_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    from headscope.training.logs import tensorboard

    for first, value in ((1, 5.0), (3, 7.0)):  # the second run goes on after step 2
        with tensorboard(tmp_path) as log:
            for step in range(first, 5):
                log("train/loss", value + step, step)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 6.0), (2, 7.0), (3, 10.0), (4, 11.0)]


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["train", "juggle"])
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: There is no task 'juggle'. The tasks are: copy, sort, lookups, bytes.\n",
    )


def test_the_help_teaches_each_task() -> None:
    text = CliRunner().invoke(cli.app, ["train", "--help"]).stdout
    for name, task in TASKS.items():
        assert re.search(rf"^\s+{name} +{re.escape(task.about)}$", text, re.MULTILINE)
    assert "torchrun --nproc-per-node 2 -m headscope train copy" in text


def test_each_option_is_in_the_page_and_no_other() -> None:
    page = (ROOT / "docs" / "train.md").read_text("utf-8")
    listed = re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)
    params = typer.main.get_command(cli.app).commands["train"].params  # type: ignore[attr-defined]
    options = [max(p.opts, key=len) for p in params if p.opts[0].startswith("-")]
    assert sorted(listed) == sorted([*options, "--help"])
    assert [name for name in TASKS if f"| `{name}` |" not in page] == []
