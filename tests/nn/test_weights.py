"""Weights of other libraries: read, written, and the same outputs as their modules."""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from headscope import (
    MultiHeadAttention,
    attention,
    masks,
    models,
    positions,
)
from tests.nn.modules import B, E, H, L, S, module_of, x_of


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 4}])
@pytest.mark.parametrize("bias", [True, False])
def test_from_torch_and_to_torch_give_the_same_output(bias: bool, widths: dict[str, int]) -> None:
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
def test_from_torch_refuses_keys_without_a_position(option: str) -> None:
    theirs = nn.MultiheadAttention(E, H, **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True adds a key without a position"):
        MultiHeadAttention.from_torch(theirs)
    if option == "add_bias_kv":
        with pytest.raises(ValueError, match=r"bias_k \(add_bias_kv\)"):
            MultiHeadAttention(E, H).load_weights(theirs.state_dict())


def test_load_weights_copies_norms() -> None:
    module, other, x = module_of(E, H, qk_norm=True), module_of(E, H, qk_norm=True), x_of()
    assert module.q_norm is not None
    module.q_norm.weight.data.mul_(3)
    assert (module(x) - other(x)).abs().max() > 0.01
    other.load_weights(module.weights_as("huggingface"))
    assert torch.equal(module(x), other(x))
    with pytest.raises(ValueError, match="'linears' has no names for the norms"):
        module.weights_as("linears")
    with pytest.raises(ValueError, match=r"lack q_norm weight"):
        module.load_weights(module_of(E, H).weights_as("huggingface"))
    with pytest.raises(ValueError, match=r"k_norm\.weight, q_norm\.weight, which this module has no place for"):
        module_of(E, H).load_weights(module.weights_as("huggingface"))


@pytest.mark.parametrize("layout", ["torch", "linears", "huggingface"])
def test_load_weights_reads_what_weights_as_gives(layout: str) -> None:
    module, other, x = module_of(E, H), MultiHeadAttention(E, H).double(), x_of()
    assert (module(x) - other(x)).abs().max() > 0.01
    other.load_weights(module.weights_as(layout))
    assert torch.equal(module(x), other(x))
    unpacked = module_of(E, H, kdim=5, vdim=4)
    copy = MultiHeadAttention(E, H, kdim=5, vdim=4).double()
    copy.load_weights(unpacked.weights_as(layout))
    assert torch.equal(unpacked(x, x_of(S, 5), x_of(S, 4)), copy(x, x_of(S, 5), x_of(S, 4)))


def test_load_weights_ignores_rotary_frequencies() -> None:
    ours, theirs = MultiHeadAttention(12, 3), MultiHeadAttention(12, 3)
    ours.load_weights(theirs.weights_as("huggingface") | {"rotary_emb.inv_freq": torch.ones(2)})
    x = torch.randn(B, L, 12)
    assert torch.equal(ours(x), theirs(x))


def test_load_weights_changes_nothing_if_a_shape_is_wrong() -> None:
    module = module_of(E, H)
    before = {name: part.clone() for name, part in module.state_dict().items()}
    wrong = module.weights_as("linears")
    wrong["linears.3.weight"] = torch.ones(3, 3)
    wrong["linears.0.weight"] = wrong["linears.0.weight"] + 1
    with pytest.raises(ValueError, match=r"o weight has shape \(3, 3\)"):
        module.load_weights(wrong)
    assert all(torch.equal(part, before[name]) for name, part in module.state_dict().items())


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
def test_rotary_scaling_is_that_of_llama(kind: str) -> None:
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


def test_t5_with_its_bias() -> None:
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


def test_first_layer_of_smollm2(smollm2: models.Loaded) -> None:
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


@pytest.mark.parametrize("widths", [{}, {"kdim": 5, "vdim": 4}], ids=str)
@pytest.mark.parametrize("frozen", [r".*", r"out_proj.*", r".*bias", r"in_proj_weight|[qk]_proj_weight"])
def test_frozen_parameters_stay_frozen(frozen: str, widths: dict[str, int]) -> None:
    theirs = nn.MultiheadAttention(E, H, **widths)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(re.fullmatch(frozen, name) is None)
    back = MultiHeadAttention.from_torch(theirs).to_torch()
    expected = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in back.named_parameters()} == expected
    ours = MultiHeadAttention.from_torch(theirs)
    assert ours.out_proj.weight.requires_grad == theirs.out_proj.weight.requires_grad
    if frozen == ".*":
        assert not any(parameter.requires_grad for parameter in ours.parameters())
