"""Training in other processes: two give the result of one, and a killed one loses the steps since its checkpoint."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from headscope.training import TrainConfig, TrainingStep, checkpoint, make_task, train
from tests.options import one_thread  # noqa: F401
from tests.training.forks import exit_code, fork, fork_group, wait_for
from tests.training.small import OPTIONS, command, same, small

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")


def test_killed_process_loses_only_the_steps_since_its_checkpoint(tmp_path: Path) -> None:
    config, folder = small(steps=9), tmp_path / "run"

    def pause(step: TrainingStep) -> None:
        if step.done == 5:
            (tmp_path / "paused").touch()
            time.sleep(60)

    pid = fork(lambda: train(config, folder=folder, save_every=2, on_progress=pause), tmp_path / "log")
    wait_for(tmp_path / "paused")
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    resumed = train(config, folder=folder)
    assert resumed.first_step == 4
    whole = train(config)
    assert same(resumed, whole)
    assert resumed.held_out == whole.held_out


def test_killed_process_of_two_ends_the_run_which_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    config, folder = small(steps=9), tmp_path / "run"

    def pause(step: TrainingStep) -> None:
        if step.done == 5:
            (tmp_path / "paused").touch()
            wait_for(tmp_path / "killed")

    def run(rank: int) -> None:
        result = train(config, folder=folder, save_every=2, on_progress=pause, device="cpu")
        if rank == 0:
            (tmp_path / "result").write_text(json.dumps([result.first_step, result.held_out.loss]))

    main, other = fork_group(run, tmp_path / "first")
    wait_for(tmp_path / "paused")
    os.kill(other, signal.SIGKILL)
    assert exit_code(other) == -signal.SIGKILL
    (tmp_path / "killed").touch()
    assert exit_code(main) == 1  # it does not wait for ever
    assert [exit_code(pid) for pid in fork_group(run, tmp_path / "second")] == [0, 0]
    first_step, loss = json.loads((tmp_path / "result").read_text())
    assert first_step == 4
    assert loss == pytest.approx(train(config).held_out.loss, rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    """The first run has no torchrun; the second resumes it with the command under torchrun."""
    model = make_task("copy", 5).model_config(embed_dim=16, num_heads=2, num_layers=1, ff_dim=64)
    config = TrainConfig("copy", steps=8, batch_size=12, length=5, model=model, precision="float32")
    folder = tmp_path / "run"

    def run(rank: int) -> None:
        result = train(config, folder=folder, save_every=4, device="cpu")
        answer = [result.loss, result.held_out.loss, result.held_out.rows]
        (tmp_path / f"result-{rank}").write_text(json.dumps(answer))

    assert [exit_code(pid) for pid in fork_group(run, tmp_path / "group")] == [0, 0]
    answers = [json.loads((tmp_path / f"result-{rank}").read_text()) for rank in range(2)]
    assert answers[0] == answers[1]
    loss, held_out_loss, rows = answers[0]
    one = train(config)
    assert (loss, held_out_loss) == (pytest.approx(one.loss, rel=1e-5), pytest.approx(one.held_out.loss, rel=1e-5))
    assert rows == 256
    last = checkpoint.latest(folder)
    assert last is not None
    matrices = {name: weight for name, weight in one.model.state_dict().items() if weight.dim() > 1}
    for name, weight in matrices.items():  # a key's bias changes no softmax, so its gradient is mere rounding
        torch.testing.assert_close(last.tensors[f"model.{name}"], weight, rtol=1e-4, atol=1e-5)

    (folder / "step-00000008.safetensors").unlink()
    words = ["copy", *OPTIONS, "--steps", "8", "--precision", "float32", "--json", "--out", str(folder)]
    out, error = command(*words, processes=2).communicate(timeout=120)
    resumed = json.loads(out)  # one process prints
    assert (resumed["first_step"], resumed["loss"]) == (4, pytest.approx(loss, rel=1e-6)), error
    assert resumed["held_out"]["loss"] == pytest.approx(held_out_loss, rel=1e-6)
