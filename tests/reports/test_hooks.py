"""Faults of watching running models that somebody reported, one test for each kind."""

import copy
import math
import pickle
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.optim.swa_utils import AveragedModel

from headscope import HeadWarning, ablate, edit, monitor, record
from headscope.errors import EditError, HeadscopeError, ProofError, UnsupportedAttention
from tests.tiny import ids, llama
from tests.watching.small_models import B, E, L, NanoGPT, Sdpa, Stack, assert_untouched, qkv

# ---------------------------------------------------------------- two threads, one model


def test_two_threads_one_model() -> None:
    """Two recordings at once each had both texts, and an edit in one thread changed another's logits by 5."""
    model, texts = llama(), [ids(1, 5), ids(1, 8)]
    with torch.no_grad():
        alone = [model(text).logits for text in texts]
    opened = threading.Barrier(2, timeout=30)
    outputs: dict[int, Tensor] = {}
    shapes: dict[int, list[tuple[int, ...]]] = {}

    def run(number: int) -> None:
        with torch.no_grad(), record(model) as recording:
            opened.wait()
            outputs[number] = model(texts[number]).logits
            opened.wait()
        shapes[number] = [tuple(call.shape) for call in recording.calls]

    def changed() -> None:
        with torch.no_grad(), edit(model, ablate(0, [0, 1, 2])):
            opened.wait()
            model(texts[0])
            opened.wait()

    for targets in ((lambda: run(0), lambda: run(1)), (changed, lambda: run(1))):
        threads = [threading.Thread(target=target) for target in targets]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert shapes[1] == [(1, 6, 8, 8)] * 2
        assert all(torch.equal(outputs[number], alone[number]) for number in outputs)
    assert shapes[0] == [(1, 6, 5, 5)] * 2


# ---------------------------------------------------------------- copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "averaged": lambda model: AveragedModel(model),
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "copy": lambda model: copy.copy(model),
}


@pytest.mark.parametrize("how", COPIES)
def test_copy_made_inside_record_is_another_model(how: str) -> None:
    """Its forwards counted as the model's, and 66 hooks stayed on it."""
    model, x = nn.Sequential(NanoGPT()), torch.randn(B, L, E)
    with record(model) as recording:
        copied = COPIES[how](model)
        if how != "copy":  # a shallow copy shares the modules
            copied(x + 1)
        model(x)
    assert len(recording.runs) == 1
    assert len(recording.calls) == 1
    assert_untouched(copied)
    assert_untouched(model)


def test_copy_of_a_block_inside_the_model_runs_unedited() -> None:
    model, x = Stack(), torch.randn(B, L, E)
    with torch.no_grad(), edit(model, ablate(0, 0)):
        copied = copy.deepcopy(model)
        plain = copied(x)
        edited = model(x)
    with torch.no_grad():
        assert torch.equal(plain, model(x))
    assert not torch.equal(plain, edited)


# ---------------------------------------------------------------- an error of ours and their run


class Odd(nn.Module):
    """Attention with a rule that cannot be read: it halves the query behind torch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.odd = NanoGPT(), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        q = x.unsqueeze(1)
        if not self.odd:
            return F.scaled_dot_product_attention(q, q, q).squeeze(1)
        return F.scaled_dot_product_attention(q.as_subclass(Halving), q, q).squeeze(1)


class Halving(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        query, *rest = args
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return func(query.as_subclass(Tensor) / 2, *rest, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def test_call_that_cannot_be_read_does_not_end_the_forward() -> None:
    model, x = Odd(), torch.randn(B, L, E)
    model.odd = True
    plain = model(x)
    with pytest.raises(ProofError, match="differs by"), record(model) as recording:
        outputs = [model(x) for _ in range(3)]
    assert len(outputs) == 3
    assert all(torch.equal(output, plain) for output in outputs)
    assert recording.runs == []
    assert_untouched(model)


def test_error_in_the_block_names_the_call_that_could_not_be_read() -> None:
    model, x = Odd(), torch.randn(B, L, E)
    model.odd = True
    with pytest.raises(HeadscopeError, match="no attention matrices") as raised, record(model) as recording:
        print(model(x).shape, recording[0])
    assert any("was not watched to the end: the model" in note for note in raised.value.__notes__)


def test_edit_that_fails_does_not_end_the_forward() -> None:
    model, x = Stack(), torch.randn(B, L, E)
    with pytest.raises(EditError, match="there is no head 7"), edit(model, ablate(1, 7)), record(model) as recording:
        output = model(x)
    assert torch.equal(output, model(x))
    assert [site.edited for site in recording.sites] == [False, False]


def test_exception_of_the_users_callback_ends_the_forward() -> None:
    model, calls = Stack(), []

    class Enough(Exception):
        pass

    def stop(call: Any) -> None:
        calls.append(call.name)
        raise Enough

    for options in ({"on_call": stop}, {"reduce": stop}):
        with pytest.raises(Enough), record(model, **options):
            model(torch.randn(B, L, E))
    assert calls == ["blocks.0"] * 2
    assert_untouched(model)


def test_monitor_warns_of_a_step_that_it_cannot_measure() -> None:
    model, x = Odd(), torch.randn(B, L, E)
    watch = monitor(model, every=1)
    for step, odd in enumerate([False, True, True, False]):
        model.odd = odd
        warning = pytest.warns(HeadWarning, match="step 1 was not measured: .*differs by")
        with warning if step == 1 else nullcontext(), watch:
            model(x)
    assert [stats.step for stats in watch.history] == [0, 3]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("how", ["trace", "export"])
def test_graph_made_inside_record_is_the_models(how: str) -> None:
    model, x = Stack(), torch.randn(B, L, E)
    with pytest.raises(UnsupportedAttention, match="was traced inside the block"), record(model):
        graph = torch.jit.trace(model, x) if how == "trace" else torch.export.export(model, (x,)).module()
    assert torch.equal(graph(x), model(x))
    assert_untouched(model)


def continuous(model: Any) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)
    batching = ContinuousBatchingConfig(num_blocks=8, page_size=16, max_batch_tokens=32)
    outputs = model.generate_batch([[5, 6, 7], [8, 9, 10, 11]], generation, batching)
    return [output.generated_tokens for output in outputs.values()]


def test_continuous_batching_runs_to_its_end_and_is_refused_when_record_closes() -> None:
    """It stopped after 1 of 4 tokens, without an exception to the caller."""
    model = llama()
    alone = continuous(model)
    with (
        pytest.raises(UnsupportedAttention, match=r"continuous batching .* use model\.generate\(\)"),
        record(model, threads="all"),
    ):
        watched = continuous(model)
    assert [len(tokens) for tokens in watched] == [4, 4]
    assert watched == alone


# ---------------------------------------------------------------- the proof


def altered(change: Any) -> Any:
    """Torch's function behind a change of the query that record cannot see."""

    class Altered(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                if func is F.scaled_dot_product_attention:
                    return func(change(args[0].as_subclass(Tensor)), *args[1:], **(kwargs or {}))
                return func(*args, **(kwargs or {}))

    return lambda q, *others, **options: F.scaled_dot_product_attention(q.as_subclass(Altered), *others, **options)


def other_head(query: Tensor) -> Tensor:
    query = query.clone()
    query[:, 1] *= 1.5
    return query


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("size", "queries"), [(1.0, 20), (3.0, 20), (1.0, 200)])
def test_hidden_temperature_is_refused(dtype: torch.dtype, size: float, queries: int) -> None:
    """In bfloat16 a temperature of 1.1 was proved, with weights that were off by .083."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(B, 3, queries, 16, dtype=torch.float32) * w for w in (size, size, 1.0))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    with record(model := Sdpa()) as recording:
        model(q, k, v)
    assert recording.proof is not None
    for change in (lambda q: q * 1.1, lambda q: q / 1.1):
        with pytest.raises(ProofError, match="differs by"), record(model := Sdpa(altered(change))):
            model(q, k, v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("small", [1e-3, 1e-6])
def test_head_with_small_outputs_is_proved_by_its_own_size(dtype: torch.dtype, small: float) -> None:
    q, k, v = (torch.randn(B, 3, 20, 16) for _ in range(3))
    v[:, 1] *= small
    operands = [x.to(dtype) for x in (q, k, v)]
    with record(model := Sdpa()):
        model(*operands)
    with pytest.raises(ProofError, match="differs by 0"), record(model := Sdpa(altered(other_head))):
        model(*operands)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 6])
def test_eager_attention_in_half_precision_is_proved_with_both_errors(dtype: torch.dtype, size: float) -> None:
    """It rounds its scores: the applied map and the exact one differed by .06 at logits of 97."""
    model, text = llama(), ids(2, 20)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.mul_(size)
    errors = {}
    for implementation in ("eager", "sdpa"):
        model.to(dtype).set_attn_implementation(implementation)
        with torch.no_grad(), record(model) as recording:
            model(text)
        errors[implementation] = recording.proof, recording.rounded_proof
    assert errors["eager"][1] < errors["eager"][0]
    assert errors["sdpa"][0] < errors["sdpa"][1]
    with torch.no_grad(), record(model.float()) as recording:
        model(text)
    assert recording.rounded_proof is None


@pytest.mark.parametrize("offset", [-5e3, 5e3, 5e5])
def test_soft_rows_with_a_common_offset_are_proved(offset: float) -> None:
    q, k, v = (torch.randn(B, 3, 200, 16) for _ in range(3))
    q[..., 0], k[..., 0] = offset / 25, 100
    with record(model := Sdpa()) as recording:
        model(q, k, v)
    assert recording.proof is not None
    assert recording.proof < 5e-6 * max(1, abs(offset) / 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6, 1e8, math.inf])
def test_monitor_measures_the_step_whose_logits_explode(dtype: torch.dtype, size: float) -> None:
    q, k, v = (torch.randn(B, 3, 20, 16).to(dtype) for _ in range(3))
    q[:, 1] *= size
    watch = monitor(model := Sdpa(), every=1)
    with pytest.warns(HeadWarning, match=r"head 0\.1 .*(largest logit|NaN or infinite)"), watch:
        model(q, k, v)
    assert len(watch.history) == 1


# ---------------------------------------------------------------- masks and inputs of other kinds


class Subclass(Tensor):
    """Means what its numbers say."""


MASKS = {
    "lower right": (lambda n, s: causal_lower_right(n, s), lambda n, s: torch.ones(n, s).tril(s - n).bool()),
    "upper left": (lambda n, s: causal_upper_left(n, s), lambda n, s: torch.ones(n, s).tril().bool()),
    "bool": (
        lambda n, s: torch.ones(n, s).tril().bool().as_subclass(Subclass),
        lambda n, s: torch.ones(n, s).tril().bool(),
    ),
    "bias": (lambda n, s: torch.zeros(n, s).as_subclass(Subclass), lambda n, s: torch.ones(n, s).bool()),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (4, 9)])
def test_subclass_of_a_tensor_as_mask_is_read_by_what_it_means(kind: str, queries: int, keys: int) -> None:
    """causal_lower_right: ProofError or a ValueError, from memory that nothing was written to (PyTorch PR 114823)."""
    make, wanted = MASKS[kind]
    q, k, v = qkv(queries=queries, keys=keys)
    with record(model := Sdpa()) as recording:
        model(q, k, v, attn_mask=make(queries, keys))
    (call,) = recording.calls
    assert call.rows.proof is not None
    visible = wanted(queries, keys)
    last = call.shape[3]  # without keys that no query may see
    assert not visible[:, last:].any()
    assert torch.equal(call.matrix().dense() > 0, visible[:, :last].expand(call.shape))


def test_mask_whose_numbers_are_no_mask_is_refused() -> None:
    class Opaque(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                if func is F.scaled_dot_product_attention:
                    return func(*args, is_causal=True)
                return func(*args, **(kwargs or {}))

    q, k, v = qkv(keys=L)
    mask = torch.full((L, L), math.nan).as_subclass(Opaque)
    with pytest.raises(UnsupportedAttention, match="got a Opaque as its mask"), record(model := Sdpa()):
        model(q, k, v, attn_mask=mask)


def test_calls_inside_torch_func_run_on() -> None:
    model = Sdpa()
    q, k, v = qkv(keys=L)
    for transform in (torch.func.vmap(model), lambda *x: torch.func.grad(lambda q: model(q, *x[1:]).sum())(x[0])):
        plain = transform(q, k, v)
        try:
            with record(model) as recording:
                watched = transform(q, k, v)
            assert recording.proof is not None
        except UnsupportedAttention as error:
            assert "inside torch.func" in str(error)  # noqa: PT017 – either is right: read, or left alone
        assert torch.equal(plain, watched)


@pytest.mark.parametrize("hides", [False, True])
def test_finite_float_key_padding_mask_is_proved(hides: bool) -> None:
    """No row was compared where every key has a bias."""
    layers = [
        nn.MultiheadAttention(E, 3, batch_first=True),
        nn.TransformerEncoderLayer(E, 3, 20, dropout=0.0, batch_first=True),
    ]
    x, mask = torch.randn(B, L, E), torch.randn(B, L) - 3
    if hides:
        mask[:, -2:] = -1e9
    calls = [
        lambda: layers[0](x, x, x, key_padding_mask=mask),
        lambda: layers[1](x, src_key_padding_mask=mask),
    ]
    for layer, call in zip(layers, calls, strict=True):
        with record(layer) as recording:
            call()
        assert recording.proof is not None
        assert recording[0].dense()[..., -2:].eq(0).all() == hides


class TakesDict(nn.Module):
    """As sentence-transformers' modules."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def forward(self, features: Any) -> Any:
        return self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])


@pytest.mark.parametrize("how", ["dict", "keyword", "nested"])
def test_root_that_takes_one_dict_says_which_positions_are_text(how: str) -> None:
    from transformers import BatchEncoding

    model = TakesDict()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    features = {"input_ids": ids(2, 5), "attention_mask": mask}
    root = nn.Sequential(model) if how == "nested" else model
    with torch.no_grad(), record(root) as recording:
        if how == "keyword":
            root(features=features)
        else:
            root(BatchEncoding(features) if how == "nested" else features)
    assert recording.valid is not None
    assert recording.valid.tolist() == mask.bool().tolist()
