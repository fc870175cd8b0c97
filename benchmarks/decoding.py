"""One token at a time with a cache, beside transformers' Llama attention with its DynamicCache on the same weights."""

from __future__ import annotations

import torch
from measure import side_by_side, write
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from headscope import KVCache, MultiHeadAttention, masks, positions

EMBED, HEADS, GROUPS, PAST, STEPS = 512, 8, 2, 4096, 32


def main() -> None:
    """Time STEPS tokens after PAST."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=EMBED, num_attention_heads=HEADS, num_key_value_heads=GROUPS)
    config._attn_implementation = "sdpa"
    theirs, rotary = LlamaAttention(config, 0).eval(), LlamaRotaryEmbedding(config)
    ours = MultiHeadAttention(EMBED, HEADS, num_kv_heads=GROUPS, bias=False, position=positions.rotary()).eval()
    ours.load_weights(theirs.state_dict())
    past, steps = torch.randn(1, PAST, EMBED), torch.randn(STEPS, 1, 1, EMBED)
    cache = KVCache(PAST + STEPS)
    ours(past, mask=masks.causal(), cache=cache)

    def with_ours() -> torch.Tensor:
        cache.truncate(PAST)
        return torch.cat([ours(token, mask=masks.causal(), cache=cache) for token in steps], 1)

    # Keys before the first step; each round begins there.
    held = DynamicCache(config=config)
    theirs(past, position_embeddings=rotary(past, torch.arange(PAST)[None]), attention_mask=None, past_key_values=held)

    tables = [rotary(token, torch.tensor([[PAST + i]])) for i, token in enumerate(steps)]

    def with_theirs() -> torch.Tensor:
        if held.get_seq_length() > PAST:
            held.crop(PAST - held.get_seq_length())  # it wants to be told how many to remove
        out = []
        for at, token in zip(tables, steps, strict=True):
            out.append(theirs(token, position_embeddings=at, attention_mask=None, past_key_values=held)[0])
        return torch.cat(out, 1)

    torch.testing.assert_close(with_ours(), with_theirs(), atol=1e-4, rtol=1e-4)
    times = side_by_side({"headscope": with_ours, "transformers, DynamicCache": with_theirs}, 15)
    ours_time = times["headscope"]
    rows = [[n, f"{t.median / STEPS * 1e3:.3f} ms", f"{ours_time.over(t):.2f}"] for n, t in times.items()]
    write(
        "decoding",
        f"One token at a time after {PAST} tokens: embed_dim {EMBED}, {HEADS} heads, {GROUPS} key/value heads, float32",
        ("whose", "time a token", "headscope ÷ it"),
        rows,
        f"{STEPS} tokens a round, medians of 15 rounds. Same weights, same outputs (checked to 1e-4). transformers' "
        "rotary tables are made before, as a model of many layers makes them once for all.",
    )


if __name__ == "__main__":
    with torch.no_grad():
        main()
