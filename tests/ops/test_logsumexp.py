"""The log-sum-exp that a watched kernel returns: used where it is right, and computed here otherwise."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope import AttentionMatrix, MultiHeadAttention, Recording, edit, knock_out, masks, record
from headscope.ops import matrix
from headscope.ops.kernels import indexing
from headscope.ops.kernels.fused import LogsumexpCapture
from headscope.watching.hooks import AttentionCall
from headscope.watching.hooks.proof import choose_rows
from tests.reference import FINFO_MIN
from tests.tiny import bart, ids, llama, mistral

B, H, L, S, D = 2, 3, 7, 11, 4


class Sdpa(nn.Module):
    """Passes its inputs to torch's function."""

    def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(*tensors, **options)


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, n, D, dtype=dtype) for n in (L, S, S)]


def has_logsumexp(P: AttentionMatrix) -> bool:
    P._check()
    return P._normalizer is not None


def recomputed(P: AttentionMatrix) -> AttentionMatrix:
    """The same matrix in float64, without a known log-sum-exp."""
    own = P.operands
    bias = own.bias.double() if isinstance(own.bias, Tensor) else own.bias
    return AttentionMatrix(own.query.double(), own.key.double(), mask=own.mask, bias=bias, scale=own.scale)


def assert_right(P: AttentionMatrix) -> None:
    expected = recomputed(P)
    torch.testing.assert_close(P.logsumexp, expected.logsumexp.float(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(P.dense(), expected.dense().float(), atol=3e-6, rtol=0)
    torch.testing.assert_close(P.entropy(), expected.entropy().float(), atol=1e-5, rtol=0)


@pytest.fixture
def no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that sums rows is an error."""

    def summed(*_: Any, **__: Any) -> None:
        raise AssertionError("rows were summed although their kernel returned the log-sum-exp")

    monkeypatch.setattr(indexing, "stream", summed)
    monkeypatch.setattr(matrix, "stream", summed)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("way", ["sdpa", "huggingface", "headscope"])
def test_recorded_matrix_uses_the_logsumexp_of_the_model_kernel(way: str, grad: Any, no_pass: None) -> None:
    torch.manual_seed(0)
    model, inputs = {
        "sdpa": lambda: (Sdpa(), dict(zip(("query", "key", "value"), qkv(), strict=True))),
        "huggingface": lambda: (llama(), {"input_ids": ids(2, 9)}),
        "headscope": lambda: (MultiHeadAttention(12, 3), {"query": torch.randn(2, 7, 12), "mask": masks.causal()}),
    }[way]()
    with grad(), record(model) as recording:
        model(**inputs)
    assert recording.sites[0].way == way
    P, expected = recording[0], recomputed(recording[0])
    own = P.operands
    scores = (own.query @ own.key.repeat_interleave(own.per_group, 1).mT) * own.scale
    if own.mask is not None:
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    assert has_logsumexp(P)
    assert expected.shape == P.shape
    torch.testing.assert_close(P[:, :, 2:5, 1:6], scores.softmax(-1)[:, :, 2:5, 1:6], atol=5e-6, rtol=0)
    torch.testing.assert_close(P.logsumexp, scores.logsumexp(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "options"),
    [(llama, {}), (llama, {"cache_implementation": "static"}), (lambda: mistral(4), {}), (bart, {})],
)
def test_generation_joins_the_logsumexp_of_its_steps(make: Any, options: dict[str, Any]) -> None:
    model = make()
    with torch.no_grad(), record(model) as recording:
        model.generate(ids(2, 7), max_new_tokens=5, pad_token_id=0, do_sample=False, **options)
    assert all(has_logsumexp(P) for P in recording)
    for P in recording:
        assert_right(P)
    for call in recording.calls:
        assert_right(call.matrix())


def test_logsumexp_of_fully_masked_rows_is_computed_here() -> None:
    query, key, value = qkv()
    mask = torch.ones(B, 1, L, S, dtype=torch.bool)
    mask[0, 0, 3] = False
    mask[1, 0, :, 8:] = False
    for attn_mask, empty in ((mask, True), (torch.where(mask, 0.0, FINFO_MIN), False)):
        with record(model := Sdpa()) as recording:
            model(query, key, value, attn_mask=attn_mask)
        P = recording[0]
        assert not has_logsumexp(P)
        masses = P.dense().sum(-1)
        assert float(masses[0, 0, 3]) == pytest.approx(0.0 if empty else 1.0, abs=1e-6)
        assert_right(recording[0])
        assert bool((P.logsumexp[0, :, 3] == -torch.inf).all()) is empty


def test_logsumexp_that_contradicts_the_output_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LogsumexpCapture.for_shape
    monkeypatch.setattr(LogsumexpCapture, "for_shape", lambda *args: original(*args) + 0.01)
    with record(model := Sdpa()) as recording:
        model(*qkv())
    assert not has_logsumexp(recording[0])
    assert_right(recording[0])


def test_logsumexp_without_a_compared_row_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 1 is not compared, so its wrong log-sum-exp is not noticed; without any compared row none is used."""

    def wrong(self: LogsumexpCapture, shape: Any) -> Tensor:
        return torch.full((B, H, L), torch.nan).index_fill(2, torch.tensor([1]), 3.0)

    monkeypatch.setattr(LogsumexpCapture, "for_shape", wrong)
    calls: list[AttentionCall] = []
    with record(model := Sdpa(), reduce=calls.append):
        model(*qkv())
    assert 1 not in choose_rows(calls[0].scores, None)[1].tolist()
    assert calls[0].logsumexp is None


def test_logsumexp_of_half_precision_is_computed_here() -> None:
    with record(model := Sdpa()) as recording:
        model(*qkv(torch.bfloat16))
    assert not has_logsumexp(recording[0])
    assert_right(recording[0])


def test_logsumexp_of_an_edited_row_is_computed_here() -> None:
    model = llama()
    with torch.no_grad(), edit(model, knock_out(query=5, key=2)), record(model) as recording:
        model(ids(2, 9))
    assert not has_logsumexp(recording[0])
    assert_right(recording[0])


def test_cropped_cache_drops_the_logsumexp_of_its_rows() -> None:
    model, tokens = llama(), ids(1, 12)
    with torch.no_grad(), record(model) as recording:
        cache = model(tokens[:, :9], use_cache=True).past_key_values
        cache.crop(-3)
        model(tokens[:, 6:], past_key_values=cache)
    assert recording[0].shape[2:] == (12, 12)
    for P in recording:
        assert has_logsumexp(P)
        assert_right(P)


def test_recording_file_keeps_the_logsumexp_unless_queries_are_rounded(tmp_path: Path, no_pass: None) -> None:
    model = llama()
    with torch.no_grad(), record(model) as recording:
        model(ids(2, 9))
    recording.save(tmp_path / "whole")
    recording.save(tmp_path / "half", dtype=torch.float16)
    whole, half = (Recording.load(tmp_path / name) for name in ("whole", "half"))
    assert torch.equal(whole[0][0, 1], recording[0][0, 1])
    assert not has_logsumexp(half[0])


def test_recording_file_with_a_wrong_logsumexp_is_refused(tmp_path: Path) -> None:
    from headscope.errors import RecordingError

    with torch.no_grad(), record(model := llama()) as recording:
        model(ids(2, 9))
    call = recording.sites[0].calls[0]
    assert call.logsumexp is not None
    for wrong in (call.logsumexp[:, :, 1:], call.logsumexp.double(), call.logsumexp + torch.inf):
        object.__setattr__(call, "logsumexp", wrong)
        recording.save(tmp_path / "wrong")
        with pytest.raises(RecordingError, match="logsumexp"):
            Recording.load(tmp_path / "wrong")


def test_matrix_computes_only_the_rows_whose_logsumexp_is_nan() -> None:
    query, key, _ = qkv()
    P = AttentionMatrix(query, key)
    logsumexp = P.logsumexp.clone()
    logsumexp[:, :, 2] = torch.nan
    other = AttentionMatrix._from_scores(P.operands, logsumexp)
    torch.testing.assert_close(other[:], P.dense())
    torch.testing.assert_close(other.logsumexp, P.logsumexp)


def test_matrix_of_some_rows_applies_the_mask_at_their_own_positions() -> None:
    query, key, value = qkv()
    P = AttentionMatrix(query, key, mask=masks.window(3, 1))
    batch, rows = slice(1, 2), slice(2, 5)
    part = AttentionMatrix._from_scores(P.operands.narrow(batch, slice(0, H), rows))
    torch.testing.assert_close(part[:], P[batch, :, rows])
    torch.testing.assert_close(part.entropy(), P.entropy()[batch, :, rows])
    torch.testing.assert_close(part @ value[batch], (P @ value)[batch, :, rows])
