"""The command itself: its list of commands, `--version`, exit codes, and errors that end in one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from headscope import models
from headscope.commands import app as cli
from headscope.commands import see
from tests.commands.runner import command


def test_version() -> None:
    assert command("--version").stdout.startswith("headscope ")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_no_torch(option: str) -> None:
    program = (
        f"import sys; sys.argv[1:] = [{option!r}]\n"
        "from headscope.commands import main\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n0 False\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_of_commands_has_the_first_line_of_each_help(name: str) -> None:
    summary = cli.COMMANDS[name][1]
    assert summary in " ".join(command("--help").stdout.split())
    if name != "knock-out":
        assert summary in " ".join(command(name, "--help").stdout.split())


def test_knock_out_is_another_name_of_forbid() -> None:
    forbid, knock_out = (command(name, "--help") for name in ("forbid", "knock-out"))
    assert knock_out.exit_code == 0
    assert knock_out.stdout == forbid.stdout.replace("root forbid [OPTIONS]", "root knock-out [OPTIONS]")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_output_that_takes_nothing_is_one_message() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        args = [sys.executable, "-m", "headscope", "models"]
        done = subprocess.run(args, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "Error: The output: No space left on device."


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    args = [sys.executable, "-m", "headscope", "models"]
    done = subprocess.run(args, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words", [["see", "--bogus"], ["see", "a", "--file", "b"], ["see", "--top", "0"], ["nothing"], ["remove"]]
)
def test_wrong_usage_is_exit_code_2(words: list[str]) -> None:
    done = command(*words)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


@pytest.mark.usefixtures("loaded_models")
def test_ctrl_c_ends_in_one_line_and_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(see, "record_text", stop)
    done = command("see")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "Stopped.\n")


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("unable to mmap 9")],
)
def test_too_little_memory_is_one_message(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(models, "load", fails)
    done = command("see")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: There is not enough memory")


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, **options: object) -> None:
        raise RuntimeError("something of ours is wrong")

    monkeypatch.setattr(models, "load", fails)
    assert str(command("see").exception) == "something of ours is wrong"
