"""MultiHeadAttention against the article's formula, torch's module, other libraries' attention, and its own cache."""

import math
import pickle
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from headscope import (
    AttentionMatrix,
    KVCache,
    MultiHeadAttention,
    SlidingWindowCache,
    attention,
    masks,
    models,
    positions,
)
from tests.options import unchecked

B, L, S, E, H = 2, 7, 11, 12, 3


def by_the_article(module: MultiHeadAttention, query: Tensor, key: Tensor, seen: Tensor | None = None) -> Tensor:
    """Concat(head_1 … head_h) W_O with head_i = softmax(Q W_i K W_i / sqrt d) V W_i, written out a head at a time."""
    weights = module.weights_as("linears")
    q, k, v = (
        x @ weights[f"linears.{i}.weight"].T + weights[f"linears.{i}.bias"] for i, x in enumerate((query, key, key))
    )
    heads, d = [], module.head_dim
    for h in range(module.num_heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(-1, -2) / math.sqrt(d)
        if seen is not None:
            scores = scores.masked_fill(~seen, -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(heads, -1) @ weights["linears.3.weight"].T + weights["linears.3.bias"]


def made(*sizes: int, **options: object) -> MultiHeadAttention:
    torch.manual_seed(0)
    module = MultiHeadAttention(*sizes, **options).double()
    for part in module.parameters():
        nn.init.normal_(part, std=0.4)
    return module


def x_of(length: int = L, width: int = E, seed: int = 1) -> Tensor:
    return torch.randn(B, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the formula


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("heads", [1, 3])
def test_it_is_the_articles_formula(heads: int, across: bool) -> None:
    module, x, key = made(E, heads), x_of(), x_of(S, seed=2) if across else None
    torch.testing.assert_close(module(x, key), by_the_article(module, x, x if key is None else key))


def test_masked_it_is_the_articles_formula() -> None:
    module, x = made(E, H), x_of()
    seen = torch.ones(L, L, dtype=torch.bool).tril()
    torch.testing.assert_close(module(x, mask=masks.causal()), by_the_article(module, x, x, seen))
    torch.testing.assert_close(module(x, mask=seen), by_the_article(module, x, x, seen))


def test_hand_worked_two_positions_one_head() -> None:
    """Query and key maps are one, so position 1 meets scores 0 and ln 3 · √1: weights 1/4 and 3/4."""
    module = MultiHeadAttention(1, 1, bias=False)
    for part in module.parameters():
        nn.init.ones_(part)
    root = math.sqrt(math.log(3))
    out = module(torch.tensor([[[0.0], [root]]]))
    torch.testing.assert_close(out[0, :, 0], torch.tensor([root / 2, root * 3 / 4]))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 1}, {"head_dim": 6}, {"qk_norm": True}, {"position": positions.rotary()}, {"bias": False}],
    ids=str,
)
def test_its_matrix_gives_its_output(options: dict[str, object]) -> None:
    module, x = made(E, H, **options), x_of()
    matrix = module.matrix(x, mask=masks.causal())
    assert isinstance(matrix, AttentionMatrix)
    values = module._values(x).repeat_interleave(module.num_heads // module.num_kv_heads, 1)
    out = module.out_proj((matrix.dense() @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, mask=masks.causal()), out)
    torch.testing.assert_close(matrix.dense().sum(-1), torch.ones(B, H, L, dtype=torch.float64))


def test_the_matrix_across_two_texts() -> None:
    module, x, key = made(E, H, kdim=5, vdim=4), x_of(), x_of(S, 5)
    value = x_of(S, 4)
    dense = module.matrix(x, key).dense()
    assert dense.shape == (B, H, L, S)
    out = module.out_proj((dense @ module._values(value)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x, key, value), out)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"qk_norm": True, "position": positions.rotary()}], ids=str
)
def test_gradients(options: dict[str, object]) -> None:
    module, x = made(E, H, **options), x_of(4).requires_grad_()
    names, held = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (x,), {"mask": masks.causal()})

    assert torch.autograd.gradcheck(run, (x, *held))


def test_grouped_heads_share_their_keys_in_order() -> None:
    """H 6, G 3: heads 0 and 1 read key head 0. Written out with keys repeated."""
    module, x = made(E, 6, num_kv_heads=3), x_of()
    full = made(E, 6)
    weights = module.weights_as("linears")
    for i in (1, 2):
        for kind in ("weight", "bias"):
            part = weights[f"linears.{i}.{kind}"].unflatten(0, (3, 2))
            weights[f"linears.{i}.{kind}"] = part.repeat_interleave(2, 0).flatten(0, 1)
    full.load_weights(weights)
    torch.testing.assert_close(module(x), full(x))


def test_dropout_drops_in_training_only_and_leaves_the_mean() -> None:
    module, x = made(E, H, dropout_p=0.5), x_of()
    module.eval()
    still = module(x)
    torch.testing.assert_close(still, module(x))
    module.train()
    torch.manual_seed(0)
    drawn = module(x.repeat(3000, 1, 1)).detach().view(3000, B, L, E)  # each text is drawn for by itself
    assert drawn.std(0).min() > 0.01
    torch.testing.assert_close(drawn.mean(0), still, atol=0.12, rtol=0)


# --- what nn.MultiheadAttention gets wrong


def test_a_fully_masked_row_gives_zeros_and_finite_gradients_alone() -> None:
    module, x = made(E, H), x_of().requires_grad_()
    nothing = masks.dense(torch.zeros(L, L, dtype=torch.bool))
    out = module(x, mask=nothing)
    torch.testing.assert_close(out, module.out_proj.bias.expand(B, L, E))
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_fully_masked_row_inside_a_batch_spoils_nothing(training: bool) -> None:
    module, x = made(E, H).train(training), x_of().requires_grad_()
    out = module(x, mask=masks.padding([0, 5]))
    torch.testing.assert_close(out[0], module.out_proj.bias.expand(L, E))
    torch.testing.assert_close(out[1], module(x[1:, :], x[1:, :5])[0])
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(x.grad[0], torch.zeros(L, E, dtype=torch.float64))


def test_causal_with_weights_needs_no_second_mask() -> None:
    module, x = made(E, H), x_of()
    weights = module.matrix(x, mask=masks.causal()).dense()
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    torch.testing.assert_close(module(x, mask=masks.causal())[:, :1], module(x[:, :1]))


def test_causal_is_aligned_to_the_last_query() -> None:
    module, x = made(E, H), x_of()
    whole = module(x, mask=masks.causal())
    torch.testing.assert_close(module(x[:, -3:], x, mask=masks.causal()), whole[:, -3:])


@pytest.mark.parametrize("shape", [(L, L), (1, 1, L, L), (B, 1, L, L), (1, H, L, L), (B, H, L, L)])
def test_the_same_mask_shapes_in_training_and_evaluation(shape: tuple[int, ...]) -> None:
    module, x = made(E, H), x_of()
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.3
    trained = module.train()(x, mask=seen)
    torch.testing.assert_close(module.eval()(x, mask=seen), trained)


def test_weights_are_before_dropout_and_sum_to_one() -> None:
    module, x = made(E, H, dropout_p=0.9).train(), x_of()
    torch.testing.assert_close(module.matrix(x).dense().sum(-1), torch.ones(B, H, L, dtype=torch.float64))


def test_weights_are_per_head() -> None:
    weights = made(E, H).matrix(x_of()).dense()
    assert weights.shape == (B, H, L, L)
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 0.01


def test_positions_do_not_mix_with_heads() -> None:
    """A view without a transpose lets one position's numbers into another's: change one, see who changes."""
    module, x = made(E, H), x_of()
    other = x.clone()
    other[:, 4] += 1
    changed = (module(x, mask=masks.causal()) != module(other, mask=masks.causal())).any(-1)
    assert changed.tolist() == [[False] * 4 + [True] * 3] * B


# --- parity


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 4}])
@pytest.mark.parametrize("bias", [True, False])
def test_torchs_module_and_back(bias: bool, widths: dict[str, int]) -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, bias=bias, batch_first=True, **widths).double().eval()
    for part in theirs.parameters():
        nn.init.normal_(part, std=0.4)
    ours = MultiHeadAttention.from_torch(theirs)
    x, key, value = x_of(), x_of(S, widths.get("kdim", E), 2), x_of(S, widths.get("vdim", E), 3)
    hidden = torch.rand(L, S, generator=torch.Generator().manual_seed(5)) > 0.7
    for theirs_mask, mask in ((None, None), (hidden, ~hidden)):
        wanted, weights = theirs(x, key, value, attn_mask=theirs_mask, average_attn_weights=False)
        torch.testing.assert_close(ours(x, key, value, mask=mask), wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.matrix(x, key, mask=mask).dense(), weights, atol=1e-6, rtol=0)
        back = ours.to_torch()
        torch.testing.assert_close(back(x, key, value, attn_mask=theirs_mask)[0], wanted)
    assert not ours.training


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_torchs_extra_keys_are_refused(option: str) -> None:
    theirs = nn.MultiheadAttention(E, H, **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True adds a key without a position"):
        MultiHeadAttention.from_torch(theirs)
    if option == "add_bias_kv":
        with pytest.raises(ValueError, match=r"bias_k \(add_bias_kv\)"):
            MultiHeadAttention(E, H).load_weights(theirs.state_dict())


def test_norms_come_and_go_with_the_weights() -> None:
    module, other, x = made(E, H, qk_norm=True), made(E, H, qk_norm=True), x_of()
    assert module.q_norm is not None
    module.q_norm.weight.data.mul_(3)
    assert (module(x) - other(x)).abs().max() > 0.01
    other.load_weights(module.weights_as("huggingface"))
    assert torch.equal(module(x), other(x))
    with pytest.raises(ValueError, match="'linears' has no names for the norms"):
        module.weights_as("linears")
    with pytest.raises(ValueError, match=r"lack q_norm weight"):
        module.load_weights(made(E, H).weights_as("huggingface"))
    with pytest.raises(ValueError, match=r"k_norm\.weight, q_norm\.weight, which this module has no place for"):
        made(E, H).load_weights(module.weights_as("huggingface"))


@pytest.mark.parametrize("layout", ["torch", "linears", "huggingface"])
def test_weights_come_and_go_under_other_names(layout: str) -> None:
    module, other, x = made(E, H), MultiHeadAttention(E, H).double(), x_of()
    assert (module(x) - other(x)).abs().max() > 0.01
    other.load_weights(module.weights_as(layout))
    assert torch.equal(module(x), other(x))
    unpacked = made(E, H, kdim=5, vdim=4)
    copy = MultiHeadAttention(E, H, kdim=5, vdim=4).double()
    copy.load_weights(unpacked.weights_as(layout))
    assert torch.equal(unpacked(x, x_of(S, 5), x_of(S, 4)), copy(x, x_of(S, 5), x_of(S, 4)))


def test_llama() -> None:
    config = transformers.LlamaConfig(  # type: ignore[call-arg]  # its annotations lack them
        hidden_size=24, num_attention_heads=6, num_key_value_heads=3, attention_bias=False, rope_theta=500.0
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = LlamaAttention(config, 0).eval()
    ours = MultiHeadAttention(24, 6, num_kv_heads=3, bias=False, position=positions.rotary(500.0))
    ours.load_weights(theirs.state_dict())
    x = torch.randn(B, L, 24)
    at = torch.arange(L)[None]
    hidden = torch.full((L, L), -torch.inf).triu(1)[None, None]
    wanted = theirs(x, position_embeddings=LlamaRotaryEmbedding(config)(x, at), attention_mask=hidden)[0]
    torch.testing.assert_close(ours(x, mask=masks.causal()), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_scaled_rotary_is_that_of_other_libraries(kind: str) -> None:
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 10_000.0}
    ours = positions.linear_scaling(4.0)
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        ours = positions.llama3_scaling(4.0, original=64)
    config = transformers.LlamaConfig(  # its annotations lack them
        hidden_size=32, num_attention_heads=2, max_position_embeddings=256, rope_parameters=scaling
    )
    theirs = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(positions.rotary(scaling=ours).frequencies(16).float(), theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scaling", [None, positions.linear_scaling(3.0), positions.llama3_scaling(4.0, original=64)])
def test_a_module_with_positions_can_be_pickled(scaling: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
    ours = MultiHeadAttention(12, 3, position=positions.rotary(scaling=scaling))
    x = torch.randn(B, L, 12)
    assert torch.equal(pickle.loads(pickle.dumps(ours))(x), ours(x))


def test_frequencies_that_old_files_hold_are_passed_over() -> None:
    ours, theirs = MultiHeadAttention(12, 3), MultiHeadAttention(12, 3)
    ours.load_weights(theirs.weights_as("huggingface") | {"rotary_emb.inv_freq": torch.ones(2)})
    x = torch.randn(B, L, 12)
    assert torch.equal(ours(x), theirs(x))


def test_gpt2() -> None:
    config = transformers.GPT2Config(n_embd=24, n_head=4, attn_pdrop=0, resid_pdrop=0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = GPT2Attention(config, layer_idx=0).eval()
    for part in theirs.parameters():
        nn.init.normal_(part, std=0.3)
    ours = MultiHeadAttention(24, 4)
    own = {f"in_proj_{k}": p.T if k == "weight" else p for k, p in theirs.c_attn.named_parameters()}
    own |= {f"out_proj.{k}": p.T if k == "weight" else p for k, p in theirs.c_proj.named_parameters()}
    ours.load_weights(own)
    x = torch.randn(B, L, 24)
    hidden = torch.full((L, L), -torch.inf).triu(1)[None, None]
    torch.testing.assert_close(ours(x, mask=masks.causal()), theirs(x, attention_mask=hidden)[0], atol=1e-6, rtol=1e-6)


def test_bert() -> None:
    config = transformers.BertConfig(vocab_size=30, hidden_size=24, num_attention_heads=4, num_hidden_layers=1)
    torch.manual_seed(0)
    theirs = transformers.BertModel(config).double().eval()
    for part in theirs.parameters():
        nn.init.normal_(part, std=0.3)
    inside = theirs.encoder.layer[0].attention
    names = {"linears.0": inside.self.query, "linears.1": inside.self.key, "linears.2": inside.self.value}
    names["linears.3"] = inside.output.dense
    ours = MultiHeadAttention(24, 4).double()
    ours.load_weights({f"{n}.{k}": p for n, m in names.items() for k, p in m.named_parameters()})
    x = x_of(width=24)
    wanted = inside.output.dense(inside.self(x)[0])
    torch.testing.assert_close(ours(x), wanted, atol=1e-6, rtol=0)


def test_t5_by_its_bias() -> None:
    """T5 scales by 1 and adds a learnt bias to the scores: attention() of our maps, with both."""
    config = transformers.T5Config(d_model=24, d_kv=6, num_heads=4, num_layers=1, d_ff=8, vocab_size=30)
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(
        config,
    ).eval()
    theirs = model.encoder.block[0].layer[0].SelfAttention
    ours = MultiHeadAttention(24, 4, bias=False)
    ours.load_weights({f"{n}_proj.weight": getattr(theirs, n).weight for n in "qkvo"})
    x = torch.randn(B, L, 24)
    bias = theirs.compute_bias(L, L)
    operands = ours.matrix(x).operands
    value = theirs.v(x).unflatten(-1, (4, 6)).transpose(1, 2)
    heads = attention(operands.query, operands.key, value, bias=bias.detach(), scale=1.0)
    wanted = theirs(x)[0]
    torch.testing.assert_close(ours.out_proj(heads.transpose(1, 2).flatten(2)), wanted, atol=1e-6, rtol=1e-6)


def test_the_default_models_first_layer(smollm2: models.Loaded) -> None:
    """Its attention by our module, the rest its own: the hidden states that it makes itself."""
    model, config = smollm2.model, smollm2.model.config
    layer = model.model.layers[0]
    theta = layer_theta(config)
    ours = MultiHeadAttention(
        config.hidden_size,
        config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        bias=False,
        position=positions.rotary(theta),
    )
    ours.load_weights(layer.self_attn.state_dict())
    text = torch.tensor([[smollm2.start_token_id, *smollm2.tokenizer("The animal was too tired.")["input_ids"]]])
    with torch.no_grad():
        wanted = model.model(text, output_hidden_states=True).hidden_states[1]
        x = model.model.embed_tokens(text)
        x = x + ours(layer.input_layernorm(x), mask=masks.causal())
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    torch.testing.assert_close(x, wanted, atol=1e-4, rtol=1e-5)
    assert (wanted - model.model.embed_tokens(text)).abs().max() > 0.1


def layer_theta(config: transformers.PretrainedConfig) -> float:
    """The base of its rotary positions."""
    return float(config.rope_parameters["rope_theta"])


# --- positions


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    turn = positions.rotary(interleaved=interleaved).rotate
    q, k = torch.randn(1, 1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 1, 8, dtype=torch.float64)
    scores = [(turn(q, i + 5) * turn(k, i)).sum() for i in (0, 3, 900)]
    torch.testing.assert_close(scores[1], scores[0])
    torch.testing.assert_close(scores[2], scores[0])
    assert abs(float((turn(q, 6) * turn(k, 0)).sum() - scores[0])) > 1e-4


def test_rotary_by_hand() -> None:
    """Head size 2: one pair, one radian a position, whatever the base; interleaved and half-split are the same."""
    x = torch.tensor([[[[1.0, 0.0]] * 3]])
    wanted = torch.tensor([[math.cos(t), math.sin(t)] for t in range(3)])
    for interleaved in (False, True):
        torch.testing.assert_close(positions.rotary(7.0, interleaved=interleaved).rotate(x)[0, 0], wanted)
    pair = positions.rotary(100.0).rotate(torch.tensor([[[[0.0, 1.0, 0.0, 0.0]] * 2]]))[0, 0, 1]
    torch.testing.assert_close(pair, torch.tensor([0.0, math.cos(0.1), 0.0, math.sin(0.1)]))
    pair = positions.rotary(100.0, interleaved=True).rotate(torch.tensor([[[[0.0, 0.0, 1.0, 0.0]] * 2]]))[0, 0, 1]
    torch.testing.assert_close(pair, torch.tensor([0.0, 0.0, math.cos(0.1), math.sin(0.1)]))


def test_alibi_in_the_module_is_its_bias() -> None:
    slopes = [0.5, 0.25, 0.125]
    module, plain, x = made(E, H, position=positions.alibi(slopes)), made(E, H), x_of()
    distance = (torch.arange(L)[:, None] - torch.arange(L)).abs()
    bias = -torch.tensor(slopes).double()[:, None, None] * distance
    scores = plain.matrix(x).dense().log() + bias
    torch.testing.assert_close(module.matrix(x).dense(), scores.softmax(-1), atol=1e-6, rtol=1e-6)
    assert (module(x) - plain(x)).abs().max() > 1e-3


# --- the cache


POSITIONS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "rotary": positions.rotary,
    "alibi": lambda: positions.alibi([0.5, 0.25, 0.125]),
}


@pytest.mark.parametrize("chunks", [[1] * L, [3, 4], [1, 5, 1], [L]], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_chunks_of_any_size_give_one_forward_pass(position: str, chunks: list[int]) -> None:
    module, x = made(E, H, num_kv_heads=1, position=POSITIONS[position]()), x_of()
    cache = KVCache(L)
    with torch.no_grad():
        parts = [module(part, mask=masks.causal(), cache=cache) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x, mask=masks.causal()))
    assert cache.length == L
    assert cache.nbytes == 2 * B * L * 4 * 8


@pytest.mark.parametrize("window", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("chunks", [[1] * 23, [3, 9, 1, 1, 9], [23], [2] * 11 + [1]], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_a_sliding_window_holds_only_the_window(position: str, chunks: list[int], window: int) -> None:
    module, x = made(E, H, position=POSITIONS[position]()), x_of(23)
    cache = SlidingWindowCache(window)
    with torch.no_grad():
        parts = [module(part, mask=masks.causal(), cache=cache) for part in x.split(chunks, 1)]
        whole = module(x, mask=masks.sliding_window(window - 1))
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.nbytes == 2 * B * H * 2 * window * 4 * 8


HIDING: dict[str, masks.Mask] = {
    "the first": ~masks.prefix(1),
    "some": ~masks.keys([0, 4, 5, 12]),
    "a prefix": masks.causal() & masks.prefix(5),
    "in one head": ~(masks.heads([1]) & masks.keys([8])),
}


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("chunks", [[1] * 23, [3, 9, 1, 1, 9]], ids=str)
def test_a_mask_counts_from_the_first_key_though_a_window_has_dropped_it(hiding: str, chunks: list[int]) -> None:
    module, x, cache = made(E, H), x_of(23), SlidingWindowCache(4)
    with torch.no_grad():
        mask = masks.causal() & HIDING[hiding]
        parts = [module(part, mask=mask, cache=cache) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x, mask=masks.sliding_window(3) & HIDING[hiding]))


def test_a_source_is_mapped_once() -> None:
    module, x, source = made(E, H), x_of(), x_of(S, seed=2)
    cache = KVCache(1)
    with torch.no_grad():
        wanted = module(x, source)
        first = module(x[:, :2], source, cache=cache)
        rest = module(x[:, 2:], torch.full_like(source, torch.nan), cache=cache)
    torch.testing.assert_close(torch.cat((first, rest), 1), wanted)


def test_forgetting_the_last_positions() -> None:
    module, x = made(E, H), x_of()
    for cache in (KVCache(20), SlidingWindowCache(20)):
        with torch.no_grad():
            wanted = module(x, mask=masks.causal(), cache=cache)[:, 4:]
            cache.truncate(4)
            torch.testing.assert_close(module(x[:, 4:], mask=masks.causal(), cache=cache), wanted)
    cache.reset()
    assert (cache.length, cache.nbytes) == (0, 0)


def _full(module: MultiHeadAttention) -> None:
    module(x_of(), cache=KVCache(5))


def _other_batch(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), cache=cache)
    module(x_of()[:1], cache=cache)


def _other_layer(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), cache=cache)
    made(E, H)(x_of(), cache=cache)


def _other_source(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), x_of(S), cache=cache)
    module(x_of(), x_of(4), cache=cache)


def _other_source_batch(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), x_of(S), cache=cache)
    module(x_of()[:1], x_of(S)[:1], cache=cache)


def _text_into_a_source(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), x_of(S), cache=cache)
    module(x_of(), cache=cache)


def _source_into_a_text(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), cache=cache)
    module(x_of(), x_of(S), cache=cache)


def _gone(module: MultiHeadAttention) -> None:
    cache = SlidingWindowCache(3)
    module(x_of(), mask=masks.causal(), cache=cache)
    cache.truncate(1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (_full, "room for 5 positions; 0 are used and 7 come"),
        (_other_batch, "holds batch 2, 3 heads of 4, torch.float64; what comes is batch 1"),
        (_other_layer, "belongs to another attention module"),
        (_other_source, "holds 11 positions of a source, batch 2, but the source has 4, batch 2"),
        (_other_source_batch, "holds 11 positions of a source, batch 2, but the source has 11, batch 1"),
        (_text_into_a_source, r"holds a source \(cross-attention\)"),
        (_source_into_a_text, "holds the text itself, but the source has 11"),
        (_gone, r"truncate\(1\): of 7 positions only the last"),
        (lambda m: KVCache(0), "KVCache got room for 0 positions: at least 1"),
        (lambda m: KVCache(5).truncate(3), r"truncate\(3\): the cache has 0 positions"),
    ],
)
def test_a_cache_used_wrongly(wrong: Callable[[MultiHeadAttention], object], text: str) -> None:
    module = made(E, H)
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        wrong(module)


def test_a_cache_keeps_no_gradients() -> None:
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        made(E, H)(x_of(), cache=KVCache(20))


def test_a_full_cache_is_as_it_was() -> None:
    module, cache = made(E, H), KVCache(8)
    with torch.no_grad():
        module(x_of(), mask=masks.causal(), cache=cache)
        with pytest.raises(ValueError, match="room for 8 positions; 7 are used and 7 come"):
            module(x_of(), cache=cache)
    assert cache.length == 7


@pytest.mark.parametrize("cache", [KVCache(20), SlidingWindowCache(4)], ids=["all", "window"])
def test_a_call_that_failed_leaves_the_cache_as_it_was(cache: KVCache) -> None:
    module, x = made(E, H), x_of()
    with torch.no_grad():
        module(x[:, :3], mask=masks.causal(), cache=cache)
        with pytest.raises(ValueError, match=r"padding"):
            module(x[:, 3:], mask=masks.causal() & masks.padding([4, 4, 4]), cache=cache)
        assert cache.length == 3
        last = module(x[:, 3:], mask=masks.causal(), cache=cache)
        mask = masks.causal() if cache.window is None else masks.sliding_window(cache.window - 1)
        torch.testing.assert_close(last, module(x, mask=mask)[:, 3:])


def test_a_cache_that_was_refused_belongs_to_nobody() -> None:
    cache, x = KVCache(20), x_of()
    with pytest.raises(ValueError, match="keeps no gradients"):
        made(E, H)(x, cache=cache)
    with torch.no_grad():
        made(E, H)(x, mask=masks.causal(), cache=cache)
    assert cache.length == L


@pytest.mark.parametrize("make", [lambda: KVCache(20), lambda: SlidingWindowCache(4)], ids=["all", "window"])
def test_training_and_caches_go_on_after_inference_mode(make: Callable[[], KVCache]) -> None:
    module, x, cache = made(E, 2, position=positions.rotary()), x_of(), make()
    with torch.inference_mode():
        module(x[:, :3], mask=masks.causal(), cache=cache)
    with torch.no_grad():
        last = module(x[:, 3:], mask=masks.causal(), cache=cache)
        mask = masks.causal() if cache.window is None else masks.sliding_window(cache.window - 1)
        torch.testing.assert_close(last, module(x, mask=mask)[:, 3:])
    module(x).sum().backward()
    assert module.in_proj.weight.grad is not None


# --- errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MultiHeadAttention(13, 3), "embed_dim 13 cannot be cut into 3 heads"),
        (lambda: MultiHeadAttention(12, 6, num_kv_heads=4), "6 query heads cannot share 4 key/value heads"),
        (lambda: MultiHeadAttention(12, 0), "embed_dim 12 and num_heads 0 leave no head"),
        (lambda: MultiHeadAttention(12, 3, dropout_p=1.0), "dropout_p is 1.0"),
        (lambda: MultiHeadAttention(9, 3, position=positions.rotary()), "head size is 3: it must be even"),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.alibi([1.0, 2.0])),
            "alibi has 2 slopes, but there are 3",
        ),
        (lambda: MultiHeadAttention(12, 3, position="rotary"), "position is 'rotary'"),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.rotary())(x_of().float(), x_of().float()),
            "rotary positions are of one sequence",
        ),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.alibi([1.0, 2.0, 3.0]))(
                x_of().float(), x_of().float()
            ),
            "alibi positions are of one sequence",
        ),
        (
            lambda: MultiHeadAttention(12, 3, position=positions.rotary()).matrix(x_of().float(), x_of().float()),
            "rotary positions are of one sequence",
        ),
        (lambda: MultiHeadAttention(12, 3)(torch.randn(7, 12)), r"query has shape \(7, 12\), wanted \[batch"),
        (lambda: MultiHeadAttention(12, 3)(torch.randn(2, 0, 12)), r"query has shape \(2, 0, 12\): it is empty"),
        (lambda: MultiHeadAttention(12, 3)(torch.randn(2, 7, 11)), r"\(2, 7, 11\), wanted \[batch, length, 12\]"),
        (
            lambda: MultiHeadAttention(12, 3)(torch.randn(2, 7, 12), torch.randn(3, 7, 12)),
            "key has batch 3, query has 2",
        ),
        (lambda: MultiHeadAttention(12, 3, kdim=5)(torch.randn(2, 7, 12)), "needs a key of its own"),
        (lambda: MultiHeadAttention(12, 3, kdim=5)(torch.randn(2, 7, 12), torch.randn(2, 7, 5)), "give a value too"),
        (
            lambda: MultiHeadAttention(12, 3).load_weights({"wq": torch.ones(3)}),
            "weights named wq are of no known layout",
        ),
        (
            lambda: MultiHeadAttention(12, 3).load_weights(MultiHeadAttention(6, 3).weights_as("torch")),
            r"\(6, 6\), this",
        ),
        (
            lambda: MultiHeadAttention(12, 3).load_weights(MultiHeadAttention(12, 3).state_dict()),
            r"use module\.load_state_dict\(weights\)",
        ),
        (
            lambda: MultiHeadAttention(12, 3).load_weights(
                nn.MultiheadAttention(12, 3).state_dict() | {"rel_bias": torch.ones(3)}
            ),
            "the weights hold rel_bias besides the four projections",
        ),
        (lambda: MultiHeadAttention.from_torch(nn.Linear(3, 3)), "got Linear: give it an nn.MultiheadAttention"),
        (lambda: MultiHeadAttention(12, 3).weights_as("jax"), "layout is 'jax'"),
        (lambda: MultiHeadAttention(12, 3, num_kv_heads=1).to_torch(), "has no shared key/value heads"),
        (
            lambda: MultiHeadAttention(12, 3, bias=False).load_weights(made(12, 3).weights_as("linears")),
            "which this module has no place for",
        ),
        (
            lambda: MultiHeadAttention(12, 3)(torch.randn(2, 7, 12), mask=[[True]]),
            "mask is a list; wanted a headscope mask",
        ),
        (lambda: positions.rotary(0.5), "base=0.5: it must be above 1"),
        (lambda: positions.rotary(scaling=4.0), r"scaling=4\.0: it is a function, such as linear_scaling\(4\.0\)"),
        (lambda: positions.linear_scaling(0.0), "factor=0.0: it must be above 0"),
        (lambda: positions.llama3_scaling(0.0), "factor=0.0, low=1.0, high=4.0, original=8192: all must be above 0"),
        (lambda: positions.llama3_scaling(8.0, low=4.0), "low=4.0, high=4.0, original=8192: all must be above 0"),
        (lambda: positions.sinusoidal(3, 5), "embed_dim=5"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(make: Callable[[], object], text: str) -> None:
    with unchecked(), pytest.raises(ValueError, match=text):
        make()


def test_weights_that_do_not_fit_change_nothing() -> None:
    module = made(E, H)
    before = {name: part.clone() for name, part in module.state_dict().items()}
    wrong = module.weights_as("linears")
    wrong["linears.3.weight"] = torch.ones(3, 3)
    wrong["linears.0.weight"] = wrong["linears.0.weight"] + 1
    with pytest.raises(ValueError, match=r"o weight has shape \(3, 3\)"):
        module.load_weights(wrong)
    assert all(torch.equal(part, before[name]) for name, part in module.state_dict().items())


@pytest.mark.parametrize("position", [None, positions.rotary()])
def test_torchs_way_to_write_self_attention_is_self_attention(position: positions.Rotary | None) -> None:
    """layer(x, x, x) once kept the first token's keys as a source, and decoded from them for ever."""
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(16, 4, position=position).eval(), torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = layer(x, mask=masks.causal())
        torch.testing.assert_close(layer(x, x, x, mask=masks.causal()), plain, atol=0, rtol=0)
        torch.testing.assert_close(layer.matrix(x, x).dense(), layer.matrix(x).dense(), atol=0, rtol=0)
    apart = [x[:, i : i + 1] for i in range(7)]
    with torch.no_grad():
        cache = KVCache(7)
        wanted = [layer(part, cache=cache) for part in apart]
        cache = KVCache(7)
        found = [layer(part, part, part, cache=cache) for part in apart]
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(wanted, 1), atol=0, rtol=0)
    torch.testing.assert_close(torch.cat(found, 1), plain, atol=1e-5, rtol=1e-5)
    assert cache.length == 7


def test_a_window_is_of_a_text_and_leaves_a_source_whole() -> None:
    torch.manual_seed(0)
    layer, x, source = MultiHeadAttention(16, 4).eval(), torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    cache = SlidingWindowCache(3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, source, cache=cache), layer(x, source))


def test_a_module_that_was_exported_computes_afterwards() -> None:
    layer, x = MultiHeadAttention(16, 4, position=positions.rotary()).eval(), torch.randn(2, 7, 16)
    torch.export.export(layer, (x,))
    assert type(layer(x).detach()) is Tensor
