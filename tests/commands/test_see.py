"""The command `headscope see`, as a person types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headscope.commands import pipe
from headscope.commands.words import command_for
from headscope.watching.recording import Recording
from tests.commands.runner import command

pytestmark = pytest.mark.usefixtures("loaded_models")

TEXT = "The animal didn't cross the street because it was too tired."


def outside(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | dict(options.pop("env", {}))
    run = [sys.executable, "-m", "headscope", *words]
    return subprocess.run(run, capture_output=True, env=environment, check=False, **options)


def test_see_shows_the_default_text() -> None:
    done = command("see")
    assert done.exit_code == 0
    starts = [line.split()[:2] for line in done.stdout.splitlines() if line[:2].strip() or "back" in line]
    for word in ("it", "tired", "cross", "street"):
        assert any(start[0] == word for start in starts)
    assert done.stderr == ""


def test_json_is_the_whole_standard_output() -> None:
    done = command("see", TEXT, "--from", "it", "--to", "animal", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    first = answer["links"][0]
    assert (first["layer"], first["head"]) == (3, 8)
    assert first["weight"] == pytest.approx(0.746, abs=0.002)
    assert first["from"] == {"text": "it", "word": 7, "name": "it"}
    assert first["to"] == {"text": "animal", "word": 1, "name": "animal"}
    assert first["distance"] == {"words": -6, "tokens": -7}
    assert answer["tokens"][0] == {"id": 0, "piece": "<|endoftext|>", "special": True, "start": 0, "end": 0}
    assert answer["words"][2] == {"text": "didn't", "start": 11, "end": 17, "tokens": [3, 4]}
    assert len(answer["unlisted"][0]["special"]) == 30
    assert all(0 <= share <= 1 for row in answer["unlisted"][0]["special"] for share in row)
    assert answer["proof"] < 1e-4
    assert answer["text"] == TEXT


@pytest.mark.slow
def test_json_is_utf_8_whatever_the_encoding_of_the_terminal() -> None:
    options = {"env": {"PYTHONIOENCODING": "ascii"}, "stdin": subprocess.DEVNULL}
    done = outside("see", "她饿了 now", "--json", "--model", "minilm", **options)
    assert json.loads(done.stdout.decode("utf-8"))["words"][0]["text"] == "她"
    assert "饿".encode() in done.stdout


def test_head_shows_where_one_head_looks() -> None:
    done = command("see", TEXT, "--head", "13.8", "--json", "--model", "smollm2")
    answer = json.loads(done.stdout)
    assert {(link["layer"], link["head"]) for link in answer["links"]} == {(13, 8)}
    best: dict[str, Any] = {}
    for link in answer["links"]:
        best.setdefault(link["from"]["text"], link["to"]["text"])
    assert (best["it"], best["cross"], best["tired"]) == ("animal", "animal", "it")
    assert answer["unlisted"][0]["special"][0][0] is None  # heads that were not read
    assert answer["selection"]["head"] == "13.8"


def test_figure_and_save_write_files_and_print_their_paths(tmp_path: Path) -> None:
    figure, saved = tmp_path / "a b.svg", tmp_path / "one.headscope"
    done = command("see", "--figure", str(figure), "--save", str(saved), "--model", "minilm", "--", "- it was")
    assert done.exit_code == 0, done.output
    assert f"Figure: {figure}" in done.stdout
    assert figure.read_bytes().startswith(b"<?xml")
    assert len(Recording.load(saved)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.svg", "one.headscope"]


def test_see_reads_a_file_and_a_pipe_to_the_same_links(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffThe cup fell.".encode())
    from_file = json.loads(command("see", "--file", str(path), "--json").stdout)
    piped = json.loads(command("see", "-", "--json", stdin="The cup fell.").stdout)
    assert from_file["text"] == piped["text"] == "The cup fell."
    assert from_file["links"] == piped["links"]


@pytest.mark.parametrize(("piped", "text"), [(True, "A dog."), (False, TEXT)])
def test_see_reads_a_pipe_without_a_dash(piped: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "is_piped", lambda: piped)
    done = command("see", "--json", "--model", "minilm", stdin="A dog.")
    assert json.loads(done.stdout)["text"] == text


def test_verbose_prints_times_on_the_error_stream() -> None:
    done = command("see", "--json", "-v")
    json.loads(done.stdout)
    assert "14 tokens, 12 words" in done.stderr
    assert "running it" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["  "], "The text is blank"),
        (["a " * 600, "--model", "minilm"], "The text has 602 tokens, and the model reads at most 512"),
        (["--from", "dog"], "'dog' is not a word of the text"),
        (["a cat, a dog", "--from", "a#3"], "There is no occurrence 3 of 'a'"),
        (["--start-token", "owl!"], "'owl!' is no token of this model"),
        (["--model", "smolm2"], "Did you mean 'smollm2'?"),
        (["--head", "13,8"], "'13,8' is not a head. Write layer.head"),
        (["--head", "99.0"], "the model has 30 attention layers"),
        (["--figure", "heads.jpg"], "a figure is .png, .svg or .pdf"),
        (["--figure", "/nowhere/heads.png"], "there is no folder /nowhere"),
        (["--save", "/"], "it is a folder"),
        (["--file", "/nowhere.txt"], "Cannot read /nowhere.txt: No such file or directory"),
    ],
)
def test_see_reports_an_error_in_one_message(words: list[str], message: str) -> None:
    done = command("see", *words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_see_refuses_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes(b"caf\xe9")
    done = command("see", "--file", str(path))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is not UTF-8 text: byte 3" in done.stderr


@pytest.mark.parametrize(
    ("text", "file", "model", "wanted"),
    [
        (None, None, "smollm2", "headscope see --head 3.8"),
        ("it didn't", None, "smollm2", 'headscope see --head 3.8 "it didn\'t"'),
        ("it didn't cost $5", None, "smollm2", """headscope see --head 3.8 'it didn'"'"'t cost $5'"""),
        ("- a", None, "minilm", "headscope see --model minilm --head 3.8 -- '- a'"),
        (None, Path("my text"), "smollm2", "headscope see --file 'my text' --head 3.8"),
    ],
)
def test_hints_are_whole_commands(text: str | None, file: Path | None, model: str, wanted: str) -> None:
    assert command_for("see", text, file, model)("--head 3.8") == wanted
