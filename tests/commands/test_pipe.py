"""Text that comes through a pipe."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headscope.commands.pipe import read_pipe
from headscope.errors import TextError


def test_is_piped_is_true_for_a_pipe_and_a_file_and_false_for_the_null_device(tmp_path: Path) -> None:
    def piped(**options: Any) -> str:
        program = "from headscope.commands.pipe import is_piped; print(is_piped())"
        run = [sys.executable, "-c", program]
        return str(subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True, **options).stdout)

    (tmp_path / "text").write_text("A dog.")
    with open(tmp_path / "text") as file:
        assert piped(stdin=file) == "True\n"
    assert piped(input="A dog.") == "True\n"
    assert piped(stdin=subprocess.DEVNULL) == "False\n"


def test_read_pipe_reads_utf_8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    give("\ufeffgrün".encode())
    assert read_pipe() == "grün"
    give("grün".encode("latin-1"))
    with pytest.raises(TextError, match="not UTF-8 text: byte 2"):
        read_pipe()
