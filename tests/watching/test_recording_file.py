"""Recordings are saved and loaded unchanged; other files are refused; no file is half-written."""

from __future__ import annotations

import json
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from headscope import Recording, record, tokenize
from headscope.errors import RecordingError
from tests.tiny import bart, ids, llama, mistral


def generated(model: Any) -> Recording:
    with torch.no_grad(), record(model, keep=("query", "key", "value", "output")) as recording:
        model.generate(ids(2, 7), max_new_tokens=6, pad_token_id=0, do_sample=False)
    return recording


@cache
def plain() -> Recording:
    model = llama()
    with torch.no_grad(), record(model) as recording:
        model(ids(2, 7), attention_mask=torch.tensor([[1] * 5 + [0] * 2, [1] * 7]))
    return recording


@cache
def sliding() -> Recording:
    return generated(mistral(4))


@cache
def encoder_decoder() -> Recording:
    return generated(bart())


@pytest.mark.parametrize("make", [plain, sliding, encoder_decoder])
def test_load_gives_what_was_saved(tmp_path: Path, make: Any) -> None:
    recording = make()
    recording.save(tmp_path / "text.recording")
    again = Recording.load(tmp_path / "text.recording")
    assert len(again) == len(recording)
    for old, new in zip(recording, again, strict=True):
        assert torch.equal(old.dense(), new.dense())
    for old_call, new_call in zip(recording.calls, again.calls, strict=True):
        assert torch.equal(old_call.matrix().dense(), new_call.matrix().dense())
    for old_site, new_site in zip(recording.sites, again.sites, strict=True):
        for name in ("name", "occurrence", "way", "proof", "rounded_proof", "shape", "edited"):
            assert getattr(old_site, name) == getattr(new_site, name)
        for one, other in ((old_site.value(), new_site.value()), (old_site.output(), new_site.output())):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    if recording.valid is not None:
        assert torch.equal(again.valid, recording.valid)
    assert os.listdir(tmp_path) == ["text.recording"]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_save_in_half_precision_is_close_and_unproved(tmp_path: Path, dtype: torch.dtype, close: float) -> None:
    recording = encoder_decoder()
    recording.save(tmp_path / "whole")
    recording.save(tmp_path / "half", dtype=dtype)
    whole, half = Recording.load(tmp_path / "whole"), Recording.load(tmp_path / "half")
    assert whole.proof is not None
    assert half.proof is None
    for old, new in zip(whole, half, strict=True):
        torch.testing.assert_close(new.dense(), old.dense(), atol=close, rtol=0)
    tensors = [[site.scores().key, site.value(), site.output()] for site in half.sites]
    assert {tensor.dtype for site in tensors for tensor in site if tensor is not None} == {dtype}


def test_save_refuses_numbers_too_large_for_half_precision(tmp_path: Path) -> None:
    layer = torch.nn.MultiheadAttention(8, 2)
    with torch.no_grad(), record(layer) as recording:
        layer(*[1e6 * torch.ones(5, 1, 8)] * 3)
    with pytest.raises(RecordingError, match=r"more than torch.float16 can: save it as torch.bfloat16"):
        recording.save(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype is torch.int8"):
        recording.save(tmp_path / "half", dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_load_gives_tokens_and_several_runs(tmp_path: Path, minilm: Any) -> None:
    tokens = tokenize("It didn't rain.", minilm.tokenizer)
    model = llama()
    with torch.no_grad(), record(model, tokens=tokens) as recording:
        model(ids(1, 5))
        model(ids(1, 8, seed=1))
    recording.save(tmp_path / "two")
    again = Recording.load(tmp_path / "two")
    assert again.tokens == tokens
    assert [run[0].shape for run in again.runs] == [(1, 6, 5, 5), (1, 6, 8, 8)]


def test_load_leaves_tensors_on_disk(tmp_path: Path) -> None:
    """Loading 200 MB must not take 200 MB: the file is mapped."""
    from headscope.watching.recording.run import Run
    from headscope.watching.recording.site import CallRows, Site

    query, key = torch.zeros(1, 4, 100_000, 64), torch.zeros(1, 4, 100_000, 64)
    call = CallRows(query, 0, 0, 100_000, proof=0.0)
    site = Site("attention", 0, "sdpa", 0.125, None, None, key, None, [call])
    Recording([Run([site])]).save(tmp_path / "large")
    del query, key, call, site
    before = _private_memory()
    again = Recording.load(tmp_path / "large")
    assert again[0].shape == (1, 4, 100_000, 100_000)
    assert _private_memory() - before < 50_000


def _private_memory() -> int:
    """Memory of this process that is not a mapped file, in KiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        pytest.skip("this system has no /proc/self/status to read memory from")
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def saved(tmp_path: Path) -> Path:
    path = tmp_path / "good"
    plain().save(path)
    return path


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict[str, Any], body: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def altered(tmp_path: Path, change: Any) -> Path:
    """A good file whose description of itself was changed."""
    header, body = split(saved(tmp_path))
    data = json.loads(header["__metadata__"]["recording"])
    change(data)
    for name in ("value.99", "output.99", "valid.99"):  # of no shape that fits anything
        header[name] = {"dtype": "F32", "shape": [1, 2, 3], "data_offsets": [len(body), len(body) + 24]}
        body += bytes(24)
    header["__metadata__"]["recording"] = json.dumps(data)
    return join(tmp_path / "bad", header, body)


def test_load_refuses_truncated_files(tmp_path: Path) -> None:
    data = saved(tmp_path).read_bytes()
    for size in (0, 5, 8, 9, 700, len(data) // 2, len(data) - 1):
        path = tmp_path / f"cut-{size}"
        path.write_bytes(data[:size])
        with pytest.raises(RecordingError, match=r"cut short|damaged"):
            Recording.load(path)


def test_load_refuses_another_version_and_another_format(tmp_path: Path) -> None:
    header, body = split(saved(tmp_path))
    header["__metadata__"]["version"] = "97"
    with pytest.raises(RecordingError, match=r"version '97'.*reads version 4"):
        Recording.load(join(tmp_path / "newer", header, body))
    save_file({"query.0": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(RecordingError, match="not a recording"):
        Recording.load(tmp_path / "other")


def test_load_refuses_a_header_of_a_gigabyte_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 100)  # a sparse file: no gigabyte is written
    with pytest.raises(RecordingError, match="header of 1073741824 bytes"):
        Recording.load(path)


def test_load_refuses_overlapping_tensors(tmp_path: Path) -> None:
    header, body = split(saved(tmp_path))
    names = [name for name in header if name.startswith(("query", "key"))]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    header[names[0]]["shape"] = header[names[1]]["shape"]
    with pytest.raises(RecordingError, match="damaged"):
        Recording.load(join(tmp_path / "overlap", header, body))


def test_load_refuses_hostile_names(tmp_path: Path) -> None:
    header, body = split(saved(tmp_path))
    name = next(name for name in header if name.startswith("query"))
    header["../../etc/passwd"] = header.pop(name)
    with pytest.raises(RecordingError, match="name that no recording has"):
        Recording.load(join(tmp_path / "path", header, body))

    def escape(data: Any) -> None:
        data["runs"][0]["sites"][0]["name"] = "layer\x1b[2J"

    with pytest.raises(RecordingError, match="control characters"):
        Recording.load(altered(tmp_path, escape))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["runs"][0]["sites"][0].update(query="key.1"),
        lambda d: d["runs"][0]["sites"][0].update(key=None),
        lambda d: d["runs"][0]["sites"][0].update(scale="nan"),
        lambda d: d["runs"][0]["sites"][0].update(scale=float("nan")),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(proof=float("nan")),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(mask={"window": [float("inf"), 0]}),
        lambda d: d["runs"][0]["sites"][0].update(value="value.99"),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(output="output.99"),
        lambda d: d["runs"][0].update(valid="valid.99"),
        lambda d: d["runs"].append({"valid": None, "sites": []}),
        lambda d: d["runs"][0]["sites"][0].update(calls=[]),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(rows=[0, 6]),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(keys=[1, 7]),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(mask={"eval": "1"}),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(mask={"padding": [9, 9], "side": "right", "num_keys": 1}),
        lambda d: d["runs"][0].pop("sites"),
        lambda d: d.update(runs=3),
        lambda d: d["runs"][0]["sites"][0]["calls"][0].update(mask=nested(100)),
    ],
)
def test_load_refuses_files_that_contradict_themselves(tmp_path: Path, change: Any) -> None:
    with pytest.raises(RecordingError, match="contradicts itself"):
        Recording.load(altered(tmp_path, change))


def nested(depth: int) -> Any:
    mask: Any = {"prefix": 1}
    for _ in range(depth):
        mask = {"not": mask}
    return mask


def test_errors_name_a_missing_file_and_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="is not there"):
        Recording.load(tmp_path / "nothing")
    with pytest.raises(RecordingError, match=r"Cannot write .*: there is no folder"):
        plain().save(tmp_path / "no" / "such" / "folder")


def test_save_to_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = plain()
    old = saved(tmp_path)
    before = old.read_bytes()

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headscope.watching.recording.file.save_file", full)
    with pytest.raises(RecordingError, match="No space left"):
        recording.save(old)
    assert old.read_bytes() == before
    assert os.listdir(tmp_path) == ["good"]


def test_save_refuses_a_mask_that_is_code() -> None:
    from headscope import masks
    from headscope.ops.masks.codec import encode

    with pytest.raises(ValueError, match="is code"):
        encode(masks.function(lambda b, h, q, k: q >= k), str)
