"""What watching a real model costs: SmolLM2's forward, plain, under record, and with all heads' entropy.

Peer: the eager way, output_attentions=True. Each way runs in a process of its own, so that its peak memory is
its own; the plain forward is timed again in each, and ratios are taken inside the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from measure import peak_memory, side_by_side, write

import headscope
from headscope.ops.reductions import Entropy

LAST = ", logits of the last row"


def text_ids(length: int) -> torch.Tensor:
    """Token ids of a text that every machine has: Python's own documentation strings."""
    import argparse
    import collections
    import typing

    from headscope.models.loading import load

    loaded = load("smollm2")
    text = "\n".join(module.__doc__ or "" for module in (argparse, collections, typing))
    text += "\n".join(f"{name}: {getattr(typing, name).__doc__}" for name in sorted(vars(typing)))
    ids = loaded.tokenizer(text * 9)["input_ids"]
    return torch.tensor([[loaded.start_token_id, *ids][:length]])


def ways(model: Any, ids: torch.Tensor, options: dict[str, int]) -> dict[str, Callable[[], object]]:
    """The pieces of work."""

    def recorded() -> object:
        with headscope.record(model) as recording:
            model(ids, use_cache=False, **options)
        return recording

    def entropies() -> object:
        with headscope.record(model) as recording:
            model(ids, use_cache=False, **options)
        return [matrix.entropy() for matrix in recording]

    def streamed() -> object:
        with headscope.record(model, reduce=Entropy()) as recording:
            model(ids, use_cache=False, **options)
        return recording.answers

    def eager() -> object:
        model.set_attn_implementation("eager")
        maps = model(ids, use_cache=False, **options, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        return [-torch.xlogy(a, a).sum(-1) for a in maps]

    return {
        "record": recorded,
        "record, then entropy of all heads": entropies,
        "record with reduce=Entropy()": streamed,
        "eager, output_attentions, entropy": eager,
    }


def one(name: str, length: int, rounds: int) -> None:
    """Measure one way in this process and print it as JSON."""
    from headscope.models.loading import load

    model = load("smollm2").model
    ids = text_ids(length)
    with torch.inference_mode():
        options = {"logits_to_keep": 1} if name.endswith(LAST) else {}
        plain = lambda: model(ids, use_cache=False, **options)  # noqa: E731
        plain()
        before = peak_memory()
        work = {"plain": plain} | {name: ways(model, ids, options)[name.removesuffix(LAST)]}
        times = side_by_side(work, rounds)
    ratio = times[name].over(times["plain"])
    row = {"time": times[name].median, "ratio": ratio, "plain": times["plain"].median}
    print(json.dumps(row | {"before": before, "peak": peak_memory()}))


def main() -> None:
    """Run every way; the table is written anew after each, so that a long run that is stopped has not been in vain."""
    names = ["record", "record, then entropy of all heads", "record with reduce=Entropy()"]
    eager = "eager, output_attentions, entropy"
    rows: list[list[str]] = []
    long = [names[1], names[1] + LAST, names[2] + LAST]
    for length, rounds, work in ((2048, 3, [*names, eager]), (7000, 2, long)):
        for name in work:
            command = [sys.executable, __file__, name, str(length), str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            memory = [f"{row['peak']:.0f} MB", f"{row['peak'] - row['before']:+.0f} MB"]
            rows.append(
                [str(length), name, f"{row['plain']:.2f} s", f"{row['time']:.2f} s", f"{row['ratio']:.2f}", *memory]
            )
            table(rows)


def table(rows: list[list[str]]) -> None:
    """Write what has been measured so far."""
    write(
        "recorded_model",
        "Watching SmolLM2-135M (30 layers × 9 heads), ÷ its plain forward",
        ("tokens", "work", "plain forward", "with it", "÷ plain", "peak memory in all", "above the plain forward"),
        rows,
        "Each line includes the forward and ran in its own process in turn with the plain forward, three times at "
        "2,048 tokens, twice at 7,000. At 7,000 tokens eager maps alone would take 52,920 MB. Logits of 7,000 rows "
        "take 1,376 MB by themselves.",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
