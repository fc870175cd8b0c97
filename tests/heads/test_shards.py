"""Shards of an atlas: stored once, shared by processes, safe from kills."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from headscope.errors import AtlasError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import profile
from headscope.heads.corpus import Document
from headscope.models.loading import Loaded
from tests import tiny
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import (
    PLAN,
    assert_same_atlas,
    documents,
    few_sentences,
    heads_command,
    run_command,
    word_tokenizer,
    write_folder,
)


def test_finished_shards_are_not_computed_again(tiny_decoder: Loaded, tiny_atlas: HeadAtlas, tmp_path: Path) -> None:
    kinds: list[str] = []
    shards = tmp_path / "shards"
    assert_same_atlas(
        profile(
            tiny_decoder,
            texts=documents(),
            relations=few_sentences(),
            plan=PLAN,
            shards=shards,
            on_progress=lambda d, o, w: kinds.append(w),
        ),
        tiny_atlas,
    )
    assert kinds == ["relations", "repeats", "texts", "texts", "worth", "worth", "worth"]
    times = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    (shards / "texts-00000004.safetensors").unlink()
    assert_same_atlas(
        profile(tiny_decoder, texts=documents(), relations=few_sentences(), plan=PLAN, shards=shards), tiny_atlas
    )
    changed = {path.name for path in shards.iterdir() if times[path.name] != path.stat().st_mtime_ns}
    assert changed == {"texts-00000004.safetensors"}
    with pytest.raises(AtlasError, match="holds finished shards of other work"):
        profile(tiny_decoder, texts=documents("owl"), relations=few_sentences(), plan=PLAN, shards=shards)
    (shards / "texts-00000000.safetensors").write_bytes(b"cut")
    with pytest.raises(AtlasError, match=r"texts-00000000.safetensors is damaged .*remove it"):
        profile(tiny_decoder, texts=documents(), relations=few_sentences(), plan=PLAN, shards=shards)


def test_profile_by_several_processes_needs_a_folder(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AtlasError, match="3 processes share work through a folder"):
        profile(tiny_decoder, texts=documents(), plan=PLAN)


def test_a_text_that_changed_since_its_shard_was_stored_is_refused(tiny_decoder: Loaded, tmp_path: Path) -> None:
    plan = replace(PLAN, repeats=0, worth=0)
    profile(tiny_decoder, texts=documents(), plan=plan, shards=tmp_path / "shards")
    changed = [*documents()[:4], Document("cat", lambda: "Another text stands under this name now.")]
    with pytest.raises(AtlasError, match="was measured on another text named 'cat': remove it"):
        profile(tiny_decoder, texts=changed, plan=plan, shards=tmp_path / "shards")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def start(loaded: Loaded, shards: Path, process: int, out: Path, *, pauses: bool = False) -> int:
    """Fork process 0 or 1 of two, which profiles the model and saves the atlas; it may pause in the middle."""

    def on_progress(done: int, total: int, kind: str) -> None:
        if pauses and done == 3:
            time.sleep(600)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside the threads of pytest-xdist
        pid = os.fork()
    if pid == 0:
        signal.alarm(120)  # seconds, then it ends
        os.environ |= {"WORLD_SIZE": "2", "RANK": str(process)}
        try:
            profile(
                loaded, texts=documents(), relations=few_sentences(), plan=PLAN, shards=shards, on_progress=on_progress
            ).save(out)
        finally:
            os._exit(0)
    return pid


@needs_fork
@pytest.mark.parametrize("killed", [(0, 1), (1,)], ids=["both", "one"])
def test_two_processes_killed_and_started_again_give_the_atlas_of_one(
    killed: tuple[int, ...], tiny_decoder: Loaded, tiny_atlas: HeadAtlas, tmp_path: Path
) -> None:
    shards, outs = tmp_path / "shards", [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    pids = [start(tiny_decoder, shards, process, outs[process], pauses=process in killed) for process in (0, 1)]
    deadline = time.monotonic() + 60
    while len(list(shards.glob("[!.]*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in pids:  # the one that did not pause waits for the other's shards
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    stored = {path.name: path.stat().st_mtime_ns for path in shards.glob("[!.]*.safetensors")}
    assert 3 <= len(stored) < 7
    assert not any(out.exists() for out in outs)
    for pid in [start(tiny_decoder, shards, process, outs[process]) for process in (0, 1)]:
        os.waitpid(pid, 0)
    for out in outs:
        assert_same_atlas(HeadAtlas.load(out), tiny_atlas)
    times = {path.name: path.stat().st_mtime_ns for path in shards.glob("[!.]*.safetensors")}
    assert len(times) == 7
    assert {name: times[name] for name in stored} == stored  # none was computed twice


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the children of a process cannot be read here")
def test_torchrun_with_a_killed_worker_started_again_gives_the_atlas_of_one(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()  # of letters, 3,800 sentences would be long
    folder = write_folder(tmp_path, tiny.llama(vocab_size=len(tokenizer)), tokenizer)
    alone = run_command(heads_command(folder, "--out", str(tmp_path / "alone.parquet")))
    assert alone.returncode == 0, alone.stderr
    shared = tmp_path / "shared.parquet"
    args = heads_command(folder, "--out", str(shared), processes=2)
    threads, quiet = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.DEVNULL
    launcher = subprocess.Popen(args, env=threads, stdout=quiet, stderr=quiet, start_new_session=True)
    shards = tmp_path / "shared.parquet.shards"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("[!.]*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    kill_one_worker(launcher.pid)
    launcher.wait(timeout=60)
    assert list(shards.glob("[!.]*.safetensors"))
    assert not shared.exists()
    again = run_command(args)
    assert again.returncode == 0, again.stderr
    assert_same_atlas(HeadAtlas.load(shared), HeadAtlas.load(tmp_path / "alone.parquet"))
    assert not shards.exists()
    assert again.stdout.count("One head for reference") == 1  # one of the two prints


def kill_one_worker(launcher: int) -> None:
    """Kill one of torchrun's workers; it then ends the others, and itself."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    workers = sorted(int(n) for n in children if b"headscope" in Path(f"/proc/{n}/cmdline").read_bytes())
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)
