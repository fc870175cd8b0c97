"""Making a Hugging Face config tiny: the same architecture with no two axes of the same length.

`shrink` sets every well-known field that a config has, in place and in its sub-configs, and leaves
the others alone. The numbers differ from one another (heads, key/value heads, head size, widths),
so that a transposed axis cannot pass unnoticed.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

HEADS = 6
KV_HEADS = 3
HEAD_DIM = 8
HIDDEN = HEADS * HEAD_DIM
VOCAB = 99
WINDOW = 4
MIN_LAYERS = 2
MAX_LAYERS = 5
SPECIAL_IDS_FROM = 80  # ids of image, audio, ... placeholders; text uses 3..79

_VALUES: dict[int, str] = {
    HIDDEN: """
        hidden_size d_model n_embd embed_dim dim embedding_size word_embed_proj_dim emb_dim
        encoder_hidden_size cross_attention_hidden_size decoder_hidden_size n_embed embedding_dim
        proj_hidden_size hidden_dim model_dim encoder_dim d_embed hidden_channels out_hidden_size
        vision_output_dim text_hidden_size
    """,
    HEADS: """
        num_attention_heads n_head num_heads encoder_attention_heads decoder_attention_heads
        n_heads attention_heads encoder_num_attention_heads decoder_num_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads
        sliding_num_attention_heads encoder_num_heads decoder_num_heads cross_num_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads speech_encoder_attention_heads
        num_decoder_heads
    """,
    KV_HEADS: """
        num_key_value_heads num_kv_heads n_kv_heads encoder_num_key_value_heads
        decoder_num_key_value_heads swa_num_key_value_heads num_global_key_value_heads
    """,
    HEAD_DIM: """
        head_dim d_kv kv_channels attention_head_dim global_head_dim swa_head_dim
        attention_head_size qkv_channels
    """,
    56: """
        intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim dim_feedforward
        ffn_hidden_size inner_dim d_inner encoder_ffn_embed_dim feed_forward_proj_dim
        intermediate_dim mlp_dim dense_intermediate_size ffn_intermediate_size
        intermediate_size_mlp prefix_dense_intermediate_size encoder_intermediate_size
        decoder_intermediate_size speech_encoder_intermediate_size projector_hidden_size
        t2u_encoder_ffn_dim t2u_decoder_ffn_dim
    """,
    40: """
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        expert_ffn_hidden_size expert_dim moe_shared_expert_intermediate_size
        expert_intermediate_size
    """,
    32: """
        projection_dim proj_dim output_dim encoder_out_channels adapter_dim out_hidden_size_text
        codebook_dim classifier_proj_size
    """,
    2: """
        num_layers num_hidden_layers n_layer n_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers depth encoder_num_hidden_layers
        decoder_num_hidden_layers num_hidden_layers_text num_experts_per_tok num_experts_per_token
        moe_k moe_topk top_k_experts experts_per_token num_selected_experts
        moe_num_experts_per_tok encoder_depth decoder_depth speech_encoder_layers
        t2u_encoder_layers t2u_decoder_layers l_layers x_layers r_layers
    """,
    4: """
        num_experts n_routed_experts num_local_experts moe_num_experts n_experts expert_num
        local_attn_window sliding_window sliding_window_size attention_chunk_size window_size_left
        moe_num_routed_experts
    """,
    1: """
        n_group topk_group first_k_dense_replace n_shared_experts num_shared_experts
        moe_num_shared_experts num_nextn_predict_layers interpolate_layers
    """,
    VOCAB: """
        vocab_size src_vocab_size tgt_vocab_size text_vocab_size vocab_size_per_layer_input
        entity_vocab_size t2u_vocab_size char_vocab_size
    """,
    64: """
        max_position_embeddings n_positions max_source_positions max_target_positions block_size
        max_seq_len max_seq_length
    """,
    20: "q_lora_rank",
    16: "hidden_size_per_layer_input num_mel_bins input_feat_per_channel n_mels",
    12: "kv_lora_rank",
    10: "qk_head_dim",
    5: "v_head_dim",
    24: "image_size",
}
_FIELDS = {name: value for value, names in _VALUES.items() for name in names.split()}
_FIELDS |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "patch_size": 6}


def sub_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config and every config inside it, outermost first."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from sub_configs(value)


def find(config: PreTrainedConfig, *names: str) -> Any:
    """The first field called one of `names`, in the config or in a config inside it."""
    for name in names:
        for part in sub_configs(config):
            value = getattr(part, name, None)
            if value is not None:
                return value
    return None


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make `config` tiny, in place."""
    taken: dict[str, int] = {}
    for part in sub_configs(config):
        layers = _shrink_layers(part)
        for name, value in list(vars(part).items()):
            if name in layers:
                continue
            if name in _FIELDS and type(value) in (int, float):
                setattr(part, name, _FIELDS[name])
            elif name in ("image_size", "patch_size") and isinstance(value, list | tuple):
                setattr(part, name, [_FIELDS[name]] * len(value))
            elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= VOCAB:
                setattr(part, name, taken.setdefault(name, SPECIAL_IDS_FROM + len(taken)))
        _agree(part)
    return config


def _shrink_layers(config: PreTrainedConfig) -> set[str]:
    """Keep one layer of every kind, and at least two, in all lists that have one entry a layer.

    Returns the names of the fields that are thereby settled.
    """
    for count in ("num_hidden_layers", "num_layers", "n_layer"):
        total = vars(config).get(count)
        if not isinstance(total, int):
            continue
        lists = {
            name: value
            for name, value in vars(config).items()
            if isinstance(value, list | tuple) and len(value) == total > MIN_LAYERS
        }
        if not lists:
            continue
        kinds = [str([value[i] for value in lists.values()]) for i in range(total)]
        chosen = sorted({kinds.index(kind) for kind in kinds})[:MAX_LAYERS]
        chosen = (chosen + [i for i in range(total) if i not in chosen])[: max(MIN_LAYERS, len(chosen))]
        for name, value in lists.items():
            setattr(config, name, [value[i] for i in sorted(chosen)])
        setattr(config, count, len(chosen))
        return {count, *lists}
    return set()


def _agree(config: PreTrainedConfig) -> None:
    """Fields that follow from others: the head sizes of latent attention, rotary sections."""
    fields = vars(config)
    if fields.get("kv_lora_rank") is not None:
        if fields.get("num_key_value_heads") is not None:
            config.num_key_value_heads = HEADS
        if fields.get("head_dim") is not None:
            config.head_dim = _FIELDS["qk_rope_head_dim"]
    for name in ("head_dim", "num_key_value_heads"):
        if name in fields and fields[name] is None:
            setattr(config, name, _FIELDS[name])
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(fields.get(name), dict):
            _shrink_rope(fields[name])


def _shrink_rope(rope: dict[str, Any]) -> None:
    """Sections of rotary positions (time, height, width) that add up to half a head."""
    if "mrope_section" in rope:
        rope["mrope_section"] = [2, 1, 1]
        if "partial_rotary_factor" in rope:
            rope["partial_rotary_factor"] = 1.0
    for value in rope.values():
        if isinstance(value, dict):
            _shrink_rope(value)
