"""What profiling every head of SmolLM2 costs, ÷ its plain forward over the same text.

All pattern measures, entropy to norm-weighted mass, as ``headscope heads`` takes them. Peer: the eager way, with
output_attentions=True and the same measures from the maps. Relations: counting hits on sentences, ÷ their forwards.
Effects of all heads on a sentence: by one backward pass, by batches that grow from layer to layer, and, as the
peer, one edit at a time. Each way runs in a process of its own; the plain forward is timed again in each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import Timing, peak_memory, side_by_side, write
from recorded_model import text_ids
from torch import Tensor

from headscope import ablate, edit, head_effects, tokenize
from headscope.heads.atlas.measuring import measure
from headscope.heads.corpus import Piece, TextBatch, batches
from headscope.heads.effects import HeadEffects, agreement, next_token_loss
from headscope.heads.measures import Measure, standard
from headscope.heads.relations import count_relations, english_sentences
from headscope.models.loading import Loaded, load

OURS, EAGER, RELATIONS = "all measures, streaming", "all measures, from eager maps", "relations of 96 sentences"
EFFECTS, GRADIENT = "effects", "gradient importance"
ABLATION, SINGLE = "ablation of all heads, growing batches", "ablation of all heads, one edit at a time"
SENTENCE = "The animal didn't cross the street because it was too tired."
SAMPLE = [(layer, layer * 7 % 9) for layer in range(0, 30, 2)]
Row = list[str]


def piece_of(length: int) -> Piece:
    """One text of so many tokens, begun by the start token; every tenth token counts as a delimiter."""
    ids = tuple(text_ids(length)[0].tolist())
    first = tuple(i == 0 for i in range(length))
    return Piece(ids, first, tuple(i % 10 == 9 for i in range(length)), "text", 1)


def pattern_measures() -> list[Measure]:
    """Those that read texts."""
    return [taken for taken in standard() if not any(c.name == "induction" for c in taken.columns)]


def from_maps(
    attentions: tuple[Tensor, ...], values: list[Tensor], weights: list[Tensor], batch: TextBatch
) -> list[Tensor]:
    """The same measures by plain tensor operations on each layer's map, which is let go afterwards."""
    found = []
    text = (batch.valid & ~batch.sinks)[0]
    length = len(text)
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs().float()
    for a, value, weight in zip(attentions, values, weights, strict=True):
        a = a[0]
        kept = a * text
        norms = torch.einsum("hsd,ehd->hse", value[0].repeat_interleave(3, 0), weight.unflatten(1, (9, 64))).norm(
            dim=-1
        )
        carried = a * norms[:, None]
        carried = carried / carried.sum(-1, keepdim=True)
        offsets = [torch.diagonal(a, d, 1, 2).sum(-1) for d in range(-8, 1)]
        best = kept.max(-1)
        hits = [(best.indices - torch.arange(length) == d).sum(-1) for d in range(-8, 9)]
        masses = [x @ torch.stack([text, batch.sinks[0], batch.delimiters[0]], -1).float() for x in (a, carried)]
        found += [-torch.xlogy(a, a).sum(-1), a.amax(-1), best.values, (kept * apart).sum(-1), (a * apart).sum(-1)]
        found += [*offsets, *hits, *masses, a.sum(-2)]
    return found


def ways(loaded: Loaded, length: int) -> tuple[Callable[[], object], dict[str, Callable[[], object]]]:
    """The plain forward, and both ways of measuring by name."""
    model, piece = loaded.model, piece_of(length)
    (batch,) = batches([piece])

    def plain() -> object:
        return model(batch.ids, use_cache=False, logits_to_keep=1)

    def eager() -> object:
        values: list[Tensor] = []
        hooks = [
            layer.self_attn.v_proj.register_forward_hook(
                lambda m, i, out: values.append(out.unflatten(-1, (3, 64)).transpose(1, 2))
            )
            for layer in model.model.layers
        ]
        model.set_attn_implementation("eager")
        maps = model(batch.ids, use_cache=False, logits_to_keep=1, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        for hook in hooks:
            hook.remove()
        return from_maps(maps, values, [layer.self_attn.o_proj.weight for layer in model.model.layers], batch)

    ours = lambda: measure(loaded, [piece], pattern_measures(), tokens=length)  # noqa: E731
    return plain, {OURS: ours, EAGER: eager}


def relations(loaded: Loaded) -> tuple[Callable[[], object], Callable[[], object]]:
    """The plain forwards of 96 sentences, and counting hits on them."""
    given = english_sentences()
    examples = given[:: len(given) // 96][:96]
    ids = [loaded.tokenizer(example.text)["input_ids"] for example in examples]
    order = sorted(ids, key=len, reverse=True)
    rows = max(1, 2048 // len(order[0]))
    groups = [order[i : i + rows] for i in range(0, len(order), rows)]
    padded = [torch.tensor([x + [0] * (len(group[0]) - len(x)) for x in group]) for group in groups]

    def plain() -> object:
        return [loaded.model(x, use_cache=False, logits_to_keep=1) for x in padded]

    return plain, lambda: count_relations(loaded, examples)


class Effects:
    """What every head is worth on one sentence, in three ways; the plain forward gives all logits, as these need."""

    def __init__(self, loaded: Loaded) -> None:
        self.model = loaded.model
        tokens = tokenize(SENTENCE, loaded.tokenizer, start_token_id=loaded.start_token_id)
        self.ids = torch.tensor([tokens.ids])
        self.found: dict[str, HeadEffects] = {}
        self.single: dict[tuple[int, int], float] = {}

    def plain(self) -> object:
        """One forward."""
        with torch.inference_mode():
            return self.model(self.ids, use_cache=False)

    def batched(self) -> None:
        """All heads in growing batches."""
        self.found["ablate"] = head_effects(self.model, self.ids)

    def gradient(self) -> None:
        """One forward and one backward pass."""
        self.found["gradient"] = head_effects(self.model, self.ids, method="gradient")

    def one_at_a_time(self) -> None:
        """The peer: a forward a head inside edit(model, ablate(layer, head)), for some heads of every second layer."""
        text = torch.ones_like(self.ids)
        with torch.no_grad():
            clean = next_token_loss(self.model(self.ids, use_cache=False).logits, self.ids, text)
            for layer, head in SAMPLE:
                with edit(self.model, ablate(layer, head)):
                    logits = self.model(self.ids, use_cache=False).logits
                self.single[layer, head] = float(next_token_loss(logits, self.ids, text) - clean)

    def rows(self, rounds: int) -> list[Row]:
        """Time all in turn, and compare what they give."""
        self.plain()
        before = peak_memory()
        work = {GRADIENT: self.gradient, ABLATION: self.batched, SINGLE: self.one_at_a_time}
        times = side_by_side({"plain": self.plain, **work}, rounds)
        ablated = self.found["ablate"]
        every, memory = ablated.values.numel() / len(SAMPLE), peak_memory() - before
        gap = max(abs(value - float(ablated.values[at])) for at, value in self.single.items())
        rank = agreement(replace(ablated, values=ablated.values.abs()), self.found["gradient"])
        share = times[ABLATION].over(times[SINGLE]) / every
        told = {
            GRADIENT: f"Spearman {rank:.2f} with the size of ablation's",
            ABLATION: f"{share:.3f} of one at a time (wanted: 0.12), off by {gap:.0e} nats at most",
            SINGLE: f"{len(SAMPLE)} heads timed, times {every:.0f}",
        }
        scales = {SINGLE: every}
        return [row_of(times, name, memory, told[name], scales.get(name, 1.0)) for name in work]


def row_of(times: dict[str, Timing], name: str, memory: float, told: str = "", scale: float = 1.0) -> Row:
    """A line of the table, from which the tokens are left out."""
    time, plain = times[name], times["plain"]
    between = "–".join(
        f"{ratio * scale:.2f}" if scale == 1 else f"{ratio * scale:.0f}" for ratio in time.between(plain)
    )
    ratio = time.over(plain) * scale
    return [
        name,
        f"{plain.median:.2f} s",
        f"{time.median * scale:.2f} s",
        f"{ratio:.2f}" if scale == 1 else f"{ratio:.0f}",
        between,
        f"{memory:+.0f} MB",
        f"{len(time.taken)} rounds{'; ' if told else ''}{told}",
    ]


def one(name: str, length: int, rounds: int) -> list[Row]:
    """Measure one way in this process."""
    loaded = load("smollm2")
    if name == EFFECTS:
        return Effects(loaded).rows(rounds)
    with torch.inference_mode():
        if name == RELATIONS:
            plain, work = relations(loaded)
        else:
            plain, found = ways(loaded, length)
            work = found[name]
        plain()
        before = peak_memory()
        times = side_by_side({"plain": plain, name: work}, rounds)
    return [row_of(times, name, peak_memory() - before)]


def main() -> None:
    """Run every way; the table is written anew after each."""
    rows: list[Row] = []
    asked = ((OURS, 2048, 15), (OURS, 4096, 9), (EAGER, 2048, 3), (RELATIONS, 0, 5), (EFFECTS, 14, 5))
    for name, length, rounds in asked:
        command = [sys.executable, __file__, name, str(length), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size = str(length) if length else "all"
        rows += [[size, *row] for row in json.loads(done.stdout.splitlines()[-1])]
        write(
            "heads",
            "Profiling all 270 heads of SmolLM2-135M, ÷ its plain forward",
            (
                "tokens",
                "work",
                "plain forward",
                "with it",
                "÷ plain",
                "half of the rounds",
                "memory above plain",
                "note",
            ),
            rows,
            "Every time includes the forward. Each way ran in its own process beside a plain forward of the same text, "
            "in turn (the last three in one process); ratios are medians over the rounds. Effects are of "
            f"“{SENTENCE}” with its start token, their plain forward gives all logits.",
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
