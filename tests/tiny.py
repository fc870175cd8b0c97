"""Tiny random models that tests share, made from their configs: no axis equals another."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 99


def llama(**options: Any) -> Any:
    """A decoder: 2 layers, 6 query heads, 2 key/value heads of size 4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(_decoder() | options))
    return LlamaForCausalLM(config).eval()


def mistral(window: int) -> Any:
    """The same with a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**_decoder(), sliding_window=window)).eval()


def bart(encoder_layers: int = 2, decoder_layers: int = 2) -> Any:
    """An encoder–decoder with 6 heads of size 4."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=24,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        init_std=0.5,
        dropout=0.0,
        forced_eos_token_id=None,
    )
    return BartForConditionalGeneration(config).eval()


def _decoder() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "initializer_range": 0.5,
    }


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] that are no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)
