"""What every head of SmolLM2 is worth on one sentence: all heads in growing batches, and one edit at a time.

The peer is the plain way with our own edits: a forward a head inside edit(model, ablate(layer, head)). It is timed
for 15 heads spread over the layers, and its time for all 270 is 18 times that.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from measure import peak_memory, side_by_side, write

import headscope
from headscope.effects import HeadEffects, agreement, head_effects, next_token_loss
from headscope.models import load

SENTENCE = "The animal didn't cross the street because it was too tired."
SAMPLE = [(layer, layer * 7 % 9) for layer in range(0, 30, 2)]


def main(rounds: int) -> None:
    """Time the ways in turn, compare what they give, and write the table."""
    loaded = load("smollm2")
    model = loaded.model
    tokens = headscope.tokenize(SENTENCE, loaded.tokenizer, start_token_id=loaded.start_token_id)
    ids = torch.tensor([tokens.ids])
    text = torch.ones_like(ids)
    found: dict[str, HeadEffects] = {}
    single: dict[tuple[int, int], float] = {}

    def batched() -> None:
        found["ablate"] = head_effects(model, ids)

    def gradient() -> None:
        found["gradient"] = head_effects(model, ids, method="gradient")

    def one_at_a_time() -> None:
        with torch.no_grad():
            clean = next_token_loss(model(ids, use_cache=False).logits, ids, text)
            for layer, head in SAMPLE:
                with headscope.edit(model, headscope.ablate(layer, head)):
                    logits = model(ids, use_cache=False).logits
                single[layer, head] = float(next_token_loss(logits, ids, text) - clean)

    def plain() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    work = {"plain": plain, "one": one_at_a_time, "batched": batched, "gradient": gradient}
    times = side_by_side(work, rounds)
    heads = found["ablate"].values.numel()
    scale = heads / len(SAMPLE)
    gap = max(abs(value - float(found["ablate"].values[at])) for at, value in single.items())
    unsigned = replace(found["ablate"], values=found["ablate"].values.abs())
    rank = agreement(unsigned, found["gradient"])
    one, forward = times["one"], times["plain"]
    whole = f"{one.over(forward) * scale:.0f}"
    rows = [
        ["plain forward", f"{forward.median:.3f} s", "–", "1", f"{forward.spread:.0%}", "–"],
        ["one edit at a time", f"{one.median * scale:.1f} s", "1", whole, f"{one.spread:.0%}", "–"],
    ]
    for name, label, note in (
        ("batched", "all heads, batches that grow by layer", f"differs by at most {gap:.1g} nats a token"),
        (
            "gradient",
            "gradient importance",
            f"Spearman {rank:.2f} with the size of the ablation effect",
        ),
    ):
        ratio = times[name].over(one) / scale
        plainly = f"{times[name].over(forward):.1f}"
        rows.append([label, f"{times[name].median:.2f} s", f"{ratio:.3f}", plainly, f"{times[name].spread:.0%}", note])
    notes = found["ablate"].notes
    write(
        "effects",
        f"What each of SmolLM2-135M's {heads} heads is worth on a sentence of {ids.shape[1]} tokens",
        ("work", "time", "÷ one at a time", "÷ plain forward", "spread", "result"),
        rows,
        f"“{SENTENCE}” with its start token, float32. One at a time: {len(SAMPLE)} heads, every second layer, and the "
        f"clean forward were timed; the time for {heads} is {scale:.0f} times that. The ratio is the median of "
        f"{rounds} rounds in turn. Wanted: at most 0.12. Peak memory of the process {peak_memory():.0f} MB. "
        + (f"Notes: {'; '.join(notes)}." if notes else "All heads went in growing batches."),
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
