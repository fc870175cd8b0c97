"""Making inputs for one forward of a tiny model, from the names that its `forward` accepts.

Text is 11 tokens long, what an encoder-decoder writes 7, images are 24 pixels wide, batches 2. The
first row of a text is padded: on the left for decoders, on the right for encoders.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.watching.zoo.shrink import HIDDEN, SPECIAL_IDS_FROM, find

BATCH = 2
LENGTH = 11
TARGET_LENGTH = 7
PADDING = 3
SAMPLES = 1600
FRAMES = 40


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(17)


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded())


def ids(length: int = LENGTH, batch: int = BATCH) -> Tensor:
    return torch.randint(3, SPECIAL_IDS_FROM - 1, (batch, length), generator=seeded())


def padded(length: int = LENGTH, *, left: bool, batch: int = BATCH, padding: int = PADDING) -> Tensor:
    """An attention mask whose first row has `padding` padded positions."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if left:
        mask[0, :padding] = 0
    else:
        mask[0, length - padding :] = 0
    return mask


def accepted(model: nn.Module) -> set[str]:
    """The names of the arguments that the model's forward accepts."""
    return set(inspect.signature(model.forward).parameters)


def side(model: nn.Module) -> tuple[int, int]:
    size = find(model.config, "image_size") or 24
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def channels(model: nn.Module) -> int:
    return find(model.config, "num_channels", "in_channels", "in_chans", "channels") or 3


def image(model: nn.Module) -> Tensor:
    return floats(BATCH, channels(model), *side(model))


def video(model: nn.Module) -> Tensor:
    return floats(
        BATCH,
        find(model.config, "num_frames", "frames_per_clip") or 4,
        channels(model),
        *side(model),
    )


def grid(model: nn.Module, sides: tuple[int, int] = (4, 4)) -> Tensor:
    """Time, height and width, in patches, of images that are packed one after the other."""
    return torch.tensor([[1, 4, side] for side in sides])


def patches(model: nn.Module, sides: tuple[int, int] = (4, 4)) -> Tensor:
    """Images of `grid`, flattened into patches and packed."""
    patch = find(model.config, "spatial_patch_size", "patch_size")
    time = find(model.config, "temporal_patch_size") or 1
    return floats(int(grid(model, sides).prod(-1).sum()), channels(model) * time * patch * patch)


def mels(model: nn.Module) -> int:
    return (
        find(
            model.config,
            "num_mel_bins",
            "input_feat_per_channel",
            "n_mels",
            "feature_size",
            "input_dim",
        )
        or 80
    )


def series(model: nn.Module) -> Tensor:
    return floats(
        BATCH,
        find(model.config, "context_length") or 32,
        find(model.config, "num_input_channels") or 1,
    )


UNEVEN = (4, 6)
# What to give for arguments that a forward requires, by name.
ARGUMENTS: dict[str, Callable[[nn.Module], Any]] = {
    "aspect_ratio_ids": lambda model: torch.ones(BATCH, 1, dtype=torch.long),
    "grid_thw": lambda model: grid(model, UNEVEN),
    "hidden_states": lambda model: patches(model, UNEVEN),
    "image_grid_thw": grid,
    "image_sizes": lambda model: torch.tensor([side(model)] * BATCH),
    "input_features_mask": lambda model: padded(FRAMES, left=False, padding=8),
    "inputs_embeds": lambda model: floats(BATCH, LENGTH, HIDDEN),
    "past_values": series,
    "pixel_values": image,
    "prompt_masks": image,
    "prompt_pixel_values": image,
    "qformer_input_ids": lambda model: ids(),
    "spatial_shapes": lambda model: torch.tensor([[4, 4]] * BATCH),
    "target_sizes": lambda model: torch.tensor([[4, 4]] * BATCH),
}


def text_inputs(model: nn.Module, family: str) -> dict[str, Any]:
    names = accepted(model)
    inputs: dict[str, Any] = {"input_ids": ids()}
    if "attention_mask" in names:
        inputs["attention_mask"] = padded(left=family in ("decoder", "multimodal"))
    if "bbox" in names:
        corner = torch.arange(LENGTH)[None, :, None].expand(BATCH, LENGTH, 2)
        inputs["bbox"] = torch.cat([corner, corner + 5], dim=-1)
    return inputs


def audio_inputs(model: nn.Module, *, mel_first: bool = False) -> dict[str, Any]:
    names = accepted(model)
    if "input_values" in names:
        inputs: dict[str, Any] = {"input_values": floats(BATCH, SAMPLES)}
        length = SAMPLES
    else:
        inputs = {"input_features": floats(BATCH, FRAMES, mels(model))}
        length = FRAMES
    if mel_first:
        inputs = {"input_features": floats(BATCH, mels(model), FRAMES)}
    elif "attention_mask" in names:
        inputs["attention_mask"] = padded(length, left=False, padding=length // 4)
    return inputs


def vision_inputs(model: nn.Module) -> dict[str, Any]:
    names = accepted(model)
    if "pixel_values_videos" in names and model.main_input_name == "pixel_values_videos":
        return {"pixel_values_videos": video(model)}
    if "hidden_states" in names:
        return {}
    if "grid_thw" in names:
        return {"pixel_values": patches(model, UNEVEN)}
    if "spatial_shapes" in names:
        return {
            "pixel_values": patches(model).view(BATCH, 16, -1),
            "pixel_attention_mask": padded(16, left=False),
        }
    return {"pixel_values": image(model)}


def default_inputs(model: nn.Module, family: str) -> dict[str, Any]:
    """Inputs for one forward of `model`, chosen by the names that it accepts."""
    names = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    if family == "audio":
        inputs |= audio_inputs(model)
    elif family == "vision":
        inputs |= vision_inputs(model)
    if "input_ids" in names and family not in ("audio", "vision"):
        inputs |= text_inputs(model, family)
    if "decoder_input_ids" in names and (family == "encoder-decoder" or model.config.is_encoder_decoder):
        inputs["decoder_input_ids"] = ids(TARGET_LENGTH)
        if "decoder_attention_mask" in names:
            inputs["decoder_attention_mask"] = padded(TARGET_LENGTH, left=False, padding=2)
    for name, parameter in names.items():
        if parameter.default is inspect.Parameter.empty and name not in inputs and name in ARGUMENTS:
            inputs[name] = ARGUMENTS[name](model)
    if family == "multimodal" and "pixel_values" in names:
        add_images(model, inputs)
    return inputs


def add_images(model: nn.Module, inputs: dict[str, Any], pixel_values: Tensor | None = None) -> None:
    """Images, and in the text as many placeholders as the model makes features of them."""
    make = getattr(model, "get_image_features", None)
    wanted = inspect.signature(make).parameters if make else {}
    if pixel_values is None:
        pixel_values = patches(model) if "image_grid_thw" in wanted else image(model)
    inputs["pixel_values"] = pixel_values
    if "image_grid_thw" in wanted:
        inputs["image_grid_thw"] = grid(model)
    if "image_sizes" in wanted and wanted["image_sizes"].default is inspect.Parameter.empty:
        inputs["image_sizes"] = ARGUMENTS["image_sizes"](model)
    if "spatial_shapes" in wanted:
        inputs |= {
            "pixel_values": patches(model).view(BATCH, 16, -1),
            "spatial_shapes": ARGUMENTS["spatial_shapes"](model),
            "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        }
    placeholder = find(model.config, "image_token_id", "image_token_index")
    if placeholder is None or make is None:
        return
    with torch.no_grad():
        features = make(**{key: value for key, value in inputs.items() if key in wanted})
    features = getattr(features, "pooler_output", features)
    count = sum(part.numel() // part.shape[-1] for part in first_tensors(features)) // BATCH
    middle = torch.full((BATCH, count), placeholder)
    inputs["input_ids"] = torch.cat([ids(8), middle, ids(3)], dim=1)
    inputs["attention_mask"] = padded(count + 11, left=True)
    if "mm_token_type_ids" in accepted(model):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == placeholder).long()


def first_tensors(output: Any) -> list[Tensor]:
    """All float tensors of a model's output, flattened in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for part in output for tensor in first_tensors(part)]
    return []
