"""What profiling every head of SmolLM2 costs, ÷ its plain forward over the same text.

All pattern measures, entropy to norm-weighted mass, as ``headscope heads`` takes them. Peer: the eager way, with
output_attentions=True and the same measures from the maps. Relations: counting hits on sentences, ÷ their forwards.
Each way runs in a process of its own; the plain forward is timed again in each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import torch
from measure import peak_memory, side_by_side, write
from recorded_model import text_ids
from torch import Tensor

from headscope.corpus import Batch, Piece, batches
from headscope.measures import Measure, standard
from headscope.models import Loaded, load
from headscope.profiling import measure
from headscope.relations import count_relations, english

OURS, EAGER, RELATIONS = "all measures, streaming", "all measures, from eager maps", "relations of 96 sentences"


def piece_of(length: int) -> Piece:
    """One text of so many tokens, begun by the start token; every tenth token counts as a delimiter."""
    ids = tuple(text_ids(length)[0].tolist())
    first = tuple(i == 0 for i in range(length))
    return Piece(ids, first, tuple(i % 10 == 9 for i in range(length)), "text", 1)


def pattern_measures() -> list[Measure]:
    """Those that read texts."""
    return [taken for taken in standard() if not any(c.name == "induction" for c in taken.columns)]


def from_maps(
    attentions: tuple[Tensor, ...], values: list[Tensor], weights: list[Tensor], batch: Batch
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


def one(name: str, length: int, rounds: int) -> None:
    """Measure one way in this process and print it as JSON."""
    loaded = load("smollm2")
    with torch.inference_mode():
        if name == RELATIONS:
            given = english()
            examples = given[:: len(given) // 96][:96]
            ids = [loaded.tokenizer(example.text)["input_ids"] for example in examples]
            order = sorted(ids, key=len, reverse=True)
            rows = max(1, 2048 // len(order[0]))
            padded = [torch.tensor([x + [0] * (len(g[0]) - len(x)) for x in g]) for g in
                      (order[i : i + rows] for i in range(0, len(order), rows))]  # fmt: skip
            plain = lambda: [loaded.model(x, use_cache=False, logits_to_keep=1) for x in padded]  # noqa: E731
            work = lambda: count_relations(loaded, examples)  # noqa: E731
        else:
            plain, found = ways(loaded, length)
            work = found[name]
        plain()
        before = peak_memory()
        times = side_by_side({"plain": plain, name: work}, rounds)
    row = {"time": times[name].median, "plain": times["plain"].median, "ratio": times[name].over(times["plain"])}
    print(json.dumps(row | {"before": before, "peak": peak_memory()}))


def main() -> None:
    """Run every way; the table is written anew after each."""
    rows: list[list[str]] = []
    for name, length, rounds in ((OURS, 2048, 15), (OURS, 4096, 9), (EAGER, 2048, 1), (RELATIONS, 0, 1)):
        command = [sys.executable, __file__, name, str(length), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        size = str(length) if length else "all"
        cells = [f"{row['plain']:.2f} s", f"{row['time']:.2f} s", f"{row['ratio']:.2f}"]
        rows.append([size, name, *cells, f"{row['peak'] - row['before']:+.0f} MB"])
        write(
            "heads",
            "Profiling all 270 heads of SmolLM2-135M, ÷ its plain forward",
            ("tokens", "work", "plain forward", "with it", "÷ plain", "memory above the plain forward"),
            rows,
            "Each line includes the forward and ran in its own process beside a plain forward of the same texts, in "
            "turn; the median of fifteen rounds (9 at 4,096; 1 of the peer and of relations). Other work: effects.md.",
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
