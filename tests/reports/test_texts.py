"""Faults in how texts, tokens and words were read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headscope import models
from headscope.errors import TextError
from headscope.heads import corpus
from headscope.models.loading import Loaded
from tests.commands.runner import command


@pytest.fixture
def tiny_model(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A random decoder that reads letters, in place of every model."""
    monkeypatch.setattr(models, "load", lambda name, **options: tiny_decoder)
    return tiny_decoder


@pytest.mark.parametrize(
    "data",
    [b"Red owl.\r\nIt sat.", b"Red owl.\rIt sat.", b"\xef\xbb\xbfRed owl.\nIt sat.", b"Red owl.\r\n\rIt sat.\r\n"],
)
def test_a_file_a_pipe_and_an_argument_are_one_text(data: bytes, tmp_path: Path, tiny_model: Loaded) -> None:
    path, link = tmp_path / "text", ("--from", "It", "--to", "owl", "--json")
    path.write_bytes(data)
    argument = data.decode("utf-8-sig")
    wanted = "\n".join(argument.splitlines()) + "\n" * (argument[-1] == "\n")
    file = json.loads(command("see", "--file", str(path), "--json").stdout)
    assert file["text"] == wanted
    assert json.loads(command("see", "-", "--json", stdin=data).stdout) == file
    assert json.loads(command("see", argument, "--json").stdout) == file
    by_argument = json.loads(command("forbid", argument, *link).stdout)
    assert by_argument["text"] == wanted
    assert json.loads(command("forbid", "-", *link, stdin=data).stdout) == by_argument
    assert corpus.documents_of([path])[0].read() == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_is_not_read_as_single_letters(encoding: str, tmp_path: Path, tiny_model: Loaded) -> None:
    path = tmp_path / "text"
    path.write_bytes("Red owl.".encode(encoding))
    for done in (command("see", "--file", str(path)), command("see", "-", stdin=path.read_bytes())):
        assert (done.exit_code, done.stdout) == (1, "")
        assert "is not UTF-8 text" in done.stderr
    with pytest.raises(TextError, match="UTF-16"):
        corpus.documents_of([path])[0].read()


def test_an_argument_is_utf_8_whatever_the_locale() -> None:
    def run(word: bytes) -> subprocess.CompletedProcess[bytes]:
        program = (
            "import sys; from headscope.commands.pipe import argument_text; print(ascii(argument_text(sys.argv[1])))"
        )
        environment: dict[str, Any] = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        run = [sys.executable, "-c", program, word]
        return subprocess.run(run, capture_output=True, env=environment, check=False)

    assert run("grün 她".encode()).stdout.strip().decode() == ascii("grün 她")
    assert b"neither UTF-8 nor ascii, the encoding of this locale" in run("grün".encode("latin-1")).stderr
