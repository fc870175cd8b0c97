"""Config fields, per model type, that the general rules of `shrink` do not make tiny or consistent.

A path with dots goes into sub-configs and dictionaries; `*.name` sets every field called `name`.
"""

from collections.abc import Iterable
from typing import Any

from transformers import ResNetConfig

from tests.watching.zoo.shrink import HEADS

Fields = dict[str, Any]


def _each(names: str, fields: Fields) -> dict[str, Fields]:
    return dict.fromkeys(names.split(), fields)


def _inside(owner: str, fields: Fields) -> Fields:
    return {f"{owner}.{name}": value for name, value in fields.items()}


def _resnet(stages: Iterable[int] = (1, 2, 3, 4)) -> ResNetConfig:
    """A backbone that needs neither timm nor a download."""
    return ResNetConfig(  # type: ignore[call-arg]  # its annotations lack them
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        out_features=[f"stage{stage}" for stage in stages],
    )


_MROPE = {"rope_parameters.mrope_section": [2, 1, 1], "rope_parameters.partial_rotary_factor": 1.0}
_MAMBA2 = {"mamba_n_heads": 12, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}
_DETR = {"use_timm_backbone": False, "backbone": None, "backbone_config": _resnet}
_MHA = {"*.num_key_value_heads": HEADS}
_SOFTCAP = {"*.attn_logit_softcapping": 2.0}
_QFORMER = {"image_token_id": 90, "image_token_index": 90, "num_query_tokens": 5}
_MEL_64 = {"*.max_source_positions": 20}
_RT_DETR = {
    "encoder_hidden_dim": 48,
    "decoder_in_channels": [48, 48, 48],
    "num_queries": 9,
    "num_denoising": 0,
}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SWIN = {
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [3, 6],
    "num_layers": 2,
    "hidden_size": 48,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    **_LINEAR,
}
_SAM = {
    "vision_config.output_channels": 48,
    "vision_config.num_pos_feats": 24,
    "vision_config.global_attn_indexes": [1],
    "vision_config.window_size": 3,
    "prompt_encoder_config.image_embedding_size": 4,
}
_FORECAST = {
    "prediction_length": 5,
    "context_length": 12,
    "num_time_features": 2,
    "lags_sequence": [1, 2, 3],
}

OVERRIDES: dict[str, Fields] = {
    # decoders
    "bailing_hybrid": {"num_expert_group": 1, "linear_head_dim": 8, "linear_num_heads": 6},
    "bamba": {"attn_layer_indices": [1], **_MAMBA2},
    "codegen": {"n_embd": 64, "n_head": 8, "rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters.full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "csm": {"codec_config.upsample_groups": 48},
    "dbrx": {
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
        "attn_config.kv_n_heads": 3,
        "ffn_config.moe_top_k": 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "diffllama": {"num_key_value_heads": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 99,
        "hidden_size_per_layer_input": 8,
        "intermediate_size": [56] * 4,
        "laurel_rank": 8,
    },
    "falcon_h1": {"mamba_chunk_size": 8, "mamba_d_state": 16},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], **_MAMBA2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 16},
    "hunyuan_vl_text": _MROPE,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "neomme": {"head_dim": 16},
    "qwen4_exp": _inside("text_config", _INDEXER),
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 48, "attention_window_size": 4},
    "reformer": {
        "axial_pos_embds_dim": (16, 32),
        "axial_pos_shape": (4, 4),
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
        "num_buckets": 2,
        "attention_head_size": 8,
    },
    "zamba2": {"mamba_headdim": 8, "n_mamba_heads": 12, "use_mem_rope": True},
    **_each("axk1 hy_v4 minicpm3", {"head_dim": 4}),
    **_each("gemma2 t5gemma vaultgemma", _SOFTCAP),
    **_each(
        "glm4v_moe_text glm4v_text glm_image_text glm_ocr_text qwen2_vl_text qwen2_5_vl_text",
        _MROPE,
    ),
    **_each("big_bird bigbird_pegasus", {"block_size": 2, "num_random_blocks": 1}),
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    # encoders
    "bros": {
        "dim_bbox_projection": 8,
        "dim_bbox_sinusoid_emb_2d": 96,
        "dim_bbox_sinusoid_emb_1d": 12,
    },
    "esm": {
        "vocab_size": 99,
        "position_embedding_type": "rotary",
        "pad_token_id": 1,
        "mask_token_id": 98,
    },
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 8},
    "mobilebert": {"embedding_size": 24, "intra_bottleneck_size": 48, "true_hidden_size": 48},
    "xmod": {"default_language": "en_XX"},
    **_each("autoformer informer", {**_FORECAST, "feature_size": 7}),
    "time_series_transformer": _FORECAST,
    # vision
    **_each("conditional_detr dab-detr deformable_detr detr table-transformer", _DETR),
    **_each("rt_detr rt_detr_v2 d_fine deimv2 pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4", _RT_DETR),
    **_each("swin swinv2 donut-swin maskformer-swin", _SWIN),
    "swin2sr": {
        "window_size": 4,
        "image_size": 32,
        "embed_dim": 48,
        "depths": [2],
        "num_heads": [6],
    },
    **_each("sam sam_hq", _SAM),
    **_each("segformer pvt glpn", {"image_size": 64}),
    "levit": {"image_size": 64, "patch_size": 16},
    "yolos": {"image_size": [24, 36]},
    "vitpose": {"backbone_config.out_features": ["stage2"], "backbone_config.image_size": [24, 36]},
    "sapiens2": {"num_key_value_heads_per_layer": [6, 3]},
    "grounding-dino": {"d_model": 96},
    "mm-grounding-dino": {"d_model": 96},
    "mask2former": {"hidden_dim": 96, "feature_size": 96, "mask_feature_size": 96},
    "lightglue": {"descriptor_dim": 48, "keypoint_detector_config.descriptor_decoder_dim": 48},
    "mobilevitv2": {"patch_size": 2},
    "vjepa2": {"crop_size": 24, "frames_per_clip": 4},
    "hiera": {"image_size": [64, 64]},
    "seggpt": {"image_size": [48, 24]},
    # audio
    "mimi": {"upsample_groups": 48, "codebook_dim": 256},
    "pocket_tts_audio_tokenizer": {"upsample_groups": 48},
    **_each("nemotron3_diarization nemotron3_diarization_audio nemotron3_5_transcribe_asr_audio", _MHA),
    "moonshine": {"encoder_num_key_value_heads": 6, "decoder_num_key_value_heads": 6},
    **_each(
        "whisper qwen2_audio_encoder voxtral_encoder moss_transcribe_diarize_audio audioflamingo3_encoder",
        _MEL_64,
    ),
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "audio-spectrogram-transformer": {"max_length": 40},
    "dia": {"*.cross_hidden_size": 48, "*.cross_head_dim": 8, "*.cross_num_key_value_heads": 3},
    # several kinds of input
    "align": {"vision_config.image_size": 64},
    "cohere_compass": {"text_config.rope_parameters.full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    "kosmos-2": {"latent_query_num": 4},
    **_each("blip-2 instructblip instructblipvideo", _QFORMER),
    "bridgetower": {"vision_config.hidden_size": 128},
    "colqwen2": {"vlm_config.text_config.rope_parameters.mrope_section": [2, 1, 1]},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [1, 1, 2]},
    **_each("gemma3 shieldgemma2", {"mm_tokens_per_image": 4}),
    "t5gemma2": {"encoder.mm_tokens_per_image": 4},
    **_each("siglip siglip2", {"*.projection_size": 48}),
    **_each(
        "glm4v_moe glm4v glm46v glm_image glm_ocr glmga paddleocr_vl qwen2_vl qwen2_5_vl "
        "qwen2_5_omni_thinker hunyuan_vl",
        _inside("text_config", _MROPE),
    ),
    "florence2": _inside(
        "vision_config",
        {"embed_dim": (16, 32, 48, 64), "num_heads": (2, 4, 6, 8), "num_groups": (2, 4, 6, 8)},
    ),
    "perceiver": {
        "num_latents": 7,
        "d_latents": 64,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
    },
    "clap": {"*.num_mel_bins": 64, "*.projection_hidden_size": 48},
    "janus": {"vision_config.projection_dim": 48},
    "idefics": {"use_resampler": False},
    "lxmert": {"visual_feat_dim": 20},
}
