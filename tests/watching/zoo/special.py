"""Inputs, per model type, that do not follow from the names that a forward accepts."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.watching.zoo.inputs import (
    BATCH,
    FRAMES,
    LENGTH,
    SAMPLES,
    TARGET_LENGTH,
    UNEVEN,
    add_images,
    audio_inputs,
    channels,
    default_inputs,
    floats,
    grid,
    ids,
    image,
    mels,
    padded,
    side,
    text_inputs,
    video,
)
from tests.watching.zoo.shrink import HIDDEN

Inputs = dict[str, Any]
Maker = Callable[[nn.Module], Inputs]


def _each(names: str, maker: Maker) -> dict[str, Maker]:
    return dict.fromkeys(names.split(), maker)


def _text(model: nn.Module) -> Inputs:
    """Text alone, left-padded, for decoders whose images need a processor."""
    return text_inputs(model, "decoder")


def _image_text(model: nn.Module) -> Inputs:
    return text_inputs(model, "encoder") | {"pixel_values": image(model)}


def _video_text(model: Any) -> Inputs:
    return text_inputs(model, "encoder") | {
        model.main_input_name: video(model),
        "pixel_values": video(model),
    }


def _image_list_text(model: nn.Module) -> Inputs:
    """One image a text, in models that take several."""
    inputs = text_inputs(model, "multimodal")
    add_images(model, inputs, pixel_values=image(model).unsqueeze(1))
    return inputs


def _pair(model: nn.Module) -> Inputs:
    """Two images whose points are matched."""
    return {"pixel_values": floats(BATCH, 2, channels(model), 32, 32)}


def _video(model: nn.Module) -> Inputs:
    return {"pixel_values": video(model)}


def _sized(width: int, height: int | None = None) -> Maker:
    """An image of the given size, for models with strides."""
    return lambda model: {"pixel_values": floats(BATCH, 3, height or width, width)}


def _mono(model: nn.Module) -> Inputs:
    return {"input_values": floats(BATCH, 1, SAMPLES)}


_mel_first = partial(audio_inputs, mel_first=True)


def _mel_and_text(model: nn.Module) -> Inputs:
    return _mel_first(model) | {"decoder_input_ids": ids(TARGET_LENGTH)}


def _mel_and_mask(model: nn.Module) -> Inputs:
    return _mel_first(model) | {"input_features_mask": padded(FRAMES, left=False, padding=8)}


def _with(family: str, **makers: Callable[[nn.Module], Any]) -> Maker:
    """The default inputs and more."""
    return lambda model: default_inputs(model, family) | {name: make(model) for name, make in makers.items()}


def _forecast(model: nn.Module) -> Inputs:
    """A series with its time features: the past, with its lags, and what is to be foretold."""
    past = model.config.context_length + max(model.config.lags_sequence)
    future = model.config.prediction_length
    features = model.config.num_time_features
    return {
        "past_values": floats(BATCH, past),
        "past_time_features": floats(BATCH, past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": floats(BATCH, future),
        "future_time_features": floats(BATCH, future, features),
    }


def _trajectory(model: nn.Module) -> Inputs:
    """States, actions and returns of a decision transformer."""
    return {
        "states": floats(BATCH, LENGTH, model.config.state_dim),
        "actions": floats(BATCH, LENGTH, model.config.act_dim),
        "returns_to_go": floats(BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).expand(BATCH, -1),
        "attention_mask": padded(left=True),
    }


def _regions(model: nn.Module) -> Inputs:
    """Text and the features and boxes of five regions of an image."""
    regions = {"visual_feats": floats(BATCH, 5, 20), "visual_pos": floats(BATCH, 5, 4)}
    return text_inputs(model, "encoder") | regions


def _queries(model: nn.Module) -> Inputs:
    return {
        "query_embeds": floats(BATCH, 5, HIDDEN),
        "encoder_hidden_states": floats(BATCH, 7, model.config.encoder_hidden_size),
    }


def _flattened(model: nn.Module) -> Inputs:
    """Flattened patches, each led by its row and its column."""
    width = 2 + 3 * model.config.vision_config.patch_size**2
    values = floats(BATCH, 9, width)
    values[..., :2] = torch.tensor([[row, column] for row in (1, 2, 3) for column in (1, 2, 3)])
    return {"flattened_patches": values, "decoder_input_ids": ids(TARGET_LENGTH)}


def _square_patches(model: nn.Module) -> Inputs:
    patch = model.config.patch_size
    count = int(grid(model, UNEVEN).prod(-1).sum())
    return {"pixel_values": floats(count, 3, patch, patch), "grid_thw": grid(model, UNEVEN)}


def _codebooks(model: nn.Module) -> Inputs:
    """One stream of text and several of audio codes."""
    streams = [ids() for _ in range(model.config.num_codebooks + 1)]
    return {"input_ids": torch.stack(streams, -1), "attention_mask": padded(left=True)}


def _prompted(model: nn.Module) -> Inputs:
    height, width = side(model)
    half = floats(BATCH, 3, height // 2, width)
    return {"pixel_values": half, "prompt_pixel_values": half.flip(0), "prompt_masks": half.abs()}


def _spectrogram(model: nn.Module) -> Inputs:
    return {"input_values": floats(BATCH, FRAMES, mels(model))}


def _double_patches(model: nn.Module) -> Inputs:
    """Packed patches of two frames each."""
    inputs = default_inputs(model, "vision")
    return inputs | {"pixel_values": torch.cat([inputs["pixel_values"]] * 2, dim=-1)}


def _placed_patches(model: nn.Module) -> Inputs:
    """Sixteen patches an image, each with its column and its row."""
    positions = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(BATCH, -1, -1)
    width = 3 * model.config.patch_size**2
    return {"pixel_values": floats(BATCH, 16, width), "pixel_position_ids": positions}


def _grounded(model: nn.Module) -> Inputs:
    """Text whose positions 1 to 4 stand for an image."""
    positions = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    positions[:, 4:8] = 1
    return _image_text(model) | {"image_embeds_position_mask": positions}


INPUTS: dict[str, Maker] = {
    **_each("muse_glimmer_vision muse_spark_vision", _double_patches),
    **_each("grounding-dino mm-grounding-dino", _image_text),
    **_each(
        "granite_speech5_encoder granite_speech5_ctc",
        lambda model: {"input_features": floats(BATCH, FRAMES, 64)},
    ),
    "blt": _with("decoder", use_cache=lambda model: False),
    "gemma4_vision": _placed_patches,
    "idefics": lambda model: _image_list_text(model) | {"image_attention_mask": torch.ones(BATCH, LENGTH, 1)},
    "kosmos-2": _grounded,
    "muse_spark_audio": lambda model: {"input_values": floats(BATCH, 1920)},
    "lw_detr": _sized(48),
    **_each(
        "aimv2 align altclip bridgetower chinese_clip clip clipseg flava groupvit "
        "metaclip_2 owlv2 owlvit siglip tvp vilt vision-text-dual-encoder sam3 "
        "sam3_lite_text",
        _image_text,
    ),
    **_each("xclip videoprism", _video_text),
    **_each("efficientloftr lightglue superglue", _pair),
    **_each("timesformer videomae vivit", _video),
    **_each("idefics idefics2 idefics3 smolvlm", _image_list_text),
    **_each(
        "dac encodec xcodec mimi mimi_encoder pocket_tts_audio_tokenizer pe_audio_encoder xcodec2 neucodec",
        _mono,
    ),
    "pocket_tts_audio_tokenizer_encoder": _mono,
    **_each("qwen2_audio_encoder voxtral_encoder voxtral_realtime_encoder glmasr_encoder", _mel_first),
    "moss_transcribe_diarize_audio": _mel_first,
    "audioflamingo3_encoder": _mel_and_mask,
    "audio-spectrogram-transformer": _spectrogram,
    "whisper": _mel_and_text,
    **_each(
        "video_llama_3 vipllava colpali colqwen2 glm_image aria chameleon "
        "deepseek_vl_hybrid diffusion_gemma dots3_note florence2 fuyu gemma4 gemma4_unified "
        "janus granite_docling llama4 llava_next llava_next_video llava_onevision "
        "minimax_m3_vl mllama molmo2 kimi_k25 muse_glimmer muse_spark paddleocr_vl inkling2 "
        "hyperclovax_vision_v2 shieldgemma2 siglip2 granite4_vision nemotron_h_omni "
        "unlimited_ocr qwen2_5_omni_thinker qwen3_omni_moe_thinker paligemma step3p7 "
        "deepseek_ocr2 emu3",
        _text,
    ),
    **_each(
        "rt_detr rt_detr_v2 d_fine deimv2 pp_doclayout_v2 pp_doclayout_v3 pp_doclayout_v4",
        _sized(64),
    ),
    **_each(
        "segformer pvt glpn levit mobilevit mobilevitv2 sam2 sam2_vision_model sam2_hiera_det_model",
        _sized(64),
    ),
    **_each(
        "pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_rec pp_ocrv6_tiny_rec",
        _sized(96, 48),
    ),
    **_each("autoformer informer time_series_transformer", _forecast),
    "decision_transformer": _trajectory,
    "lxmert": _regions,
    "blip_2_qformer": _queries,
    "pix2struct": _flattened,
    "kimi_k25_vision": _square_patches,
    "kyutai_speech_to_text": _codebooks,
    "seggpt": _prompted,
    "timesfm": lambda model: {
        "past_values": floats(BATCH, 32),
        "past_values_padding": torch.zeros(BATCH, 32),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda model: {"past_values": floats(BATCH, 32)},
    "video_llama_3_vision": _with("vision", merge_sizes=lambda model: torch.ones(2, dtype=torch.long)),
    **_each(
        "minicpm_ocr_vision minicpmv4_7_vision",
        _with("vision", target_sizes=lambda model: torch.tensor([[4, 4]] * 2)),
    ),
    "clap": lambda model: text_inputs(model, "encoder") | {"input_features": floats(BATCH, 1, 64, 64)},
    "perceiver": lambda model: {
        "inputs": floats(BATCH, LENGTH, HIDDEN),
        "attention_mask": padded(left=False),
    },
    "dia": lambda model: (
        text_inputs(model, "encoder") | {"decoder_input_ids": torch.stack([ids(TARGET_LENGTH)] * 9, dim=-1)}
    ),
    "encoder-decoder": lambda model: text_inputs(model, "encoder") | {"decoder_input_ids": ids(TARGET_LENGTH)},
}
