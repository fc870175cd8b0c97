"""The command `headscope train`."""

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from headscope.commands import app as cli
from headscope.commands import train as commands
from headscope.training import (
    TASKS,
    checkpoint,
)
from tests.training.forks import exit_code, fork
from tests.training.small import OPTIONS, command

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = command("copy", *OPTIONS, "--steps", "100000", "--save-every", "5", "--out", str(folder))
    ready = time.monotonic() + 60
    while not list(folder.glob("step-*.safetensors")) and time.monotonic() < ready:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert run.returncode == 130
    match = re.search(r"Stopped after step (\d+) of 100000; its state is in (\S+)\. To go on, give the same", error)
    assert match is not None, error
    last = checkpoint.latest(folder)
    assert last is not None
    assert (last.step, str(last.path)) == (int(match[1]), match[2])
    assert out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_torchrun_prints_an_error_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them: each of two processes runs the command, and only the first prints what is wrong."""
    monkeypatch.setattr(commands, "_PATIENCE", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = ["train", "copy", *OPTIONS, "--batch-size", "7", "--out", str(tmp_path / "run")]
        done = CliRunner().invoke(cli.app, words)
        (tmp_path / f"{rank}.json").write_text(json.dumps([done.exit_code, done.output]))

    pids = [fork(lambda rank=rank: run(rank), tmp_path / f"{rank}.log") for rank in range(2)]
    assert [exit_code(pid) for pid in pids] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == 1
    assert first[1].startswith("Error: A batch of 7 rows cannot be shared evenly by 2 processes")
    assert second == [1, ""]


def test_command_trains_and_prints_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["train", "copy", *OPTIONS, "--steps", "20"])
    assert done.exit_code == 0, done.output
    assert "On 256 held-out rows, none of them in the training data: " in done.stdout
    assert "Predicted without a mistake, token after token: 0.0\N{NO-BREAK SPACE}% of them." in done.stdout
    assert "Checkpoint: runs/copy/step-00000020.safetensors" in done.stdout
    assert re.search(r"Heads at step 0 .*decoder\.layers\.0\.cross_attention +\d+\s% +\d+\s% ", done.stdout, re.DOTALL)
    assert re.search(r"training copy: 20/20 loss \d\.\d{4}", done.stderr)
    assert list(Path("runs/copy/tensorboard").glob("events.out.tfevents.*"))
    again = CliRunner().invoke(cli.app, ["train", "copy", *OPTIONS, "--steps", "20"])
    assert "All 20 steps were done before; another --out or --seed begins anew." in again.stdout


def test_command_reports_heads_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "has_tensorboard", lambda: False)
    words = ["train", "copy", *OPTIONS, "--steps", "60", "--seed", "1", "--out", str(tmp_path / "run"), "--json"]
    done = CliRunner().invoke(cli.app, [*words, "--learning-rate", "3", "--warmup", "0"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "tensorboard").exists()
    heads = json.loads(done.stdout)["heads"]
    assert heads["step"] == 50
    assert [(row["layer"], row["head"]) for row in heads["table"]] == [(i, h) for i in range(3) for h in range(2)]
    assert {"entropy", "entropy_share", "largest_logit", "sink_mass", "dead", "finite", "site"} < set(heads["table"][0])
    assert re.search(r"^head \d\.\d \(.*attention\) at step 50: its largest logit is \S+, above 100", done.stderr, re.M)
    assert "loop.py" not in done.stderr


def test_command_prints_what_is_wrong(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["train", "juggle"])
    assert (done.exit_code, done.stderr) == (
        1,
        "Error: There is no task 'juggle'. The tasks are: copy, sort, lookups, bytes.\n",
    )


def test_help_describes_each_task() -> None:
    text = CliRunner().invoke(cli.app, ["train", "--help"]).stdout
    for name, task in TASKS.items():
        assert re.search(rf"^\s+{name} +{re.escape(task.about)}$", text, re.MULTILINE)
    assert "torchrun --nproc-per-node 2 -m headscope train copy" in text


def test_docs_list_exactly_the_options() -> None:
    page = (ROOT / "docs" / "train.md").read_text("utf-8")
    listed = re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)
    params = typer.main.get_command(cli.app).commands["train"].params  # type: ignore[attr-defined]
    options = [max(p.opts, key=len) for p in params if p.opts[0].startswith("-")]
    assert sorted(listed) == sorted([*options, "--help"])
    assert [name for name in TASKS if f"| `{name}` |" not in page] == []
