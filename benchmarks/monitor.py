"""What monitor() costs in a training loop: a step that is looked at, ÷ one that is not, and its share at one in 50."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import side_by_side, write

import headscope

BATCH, LENGTH = 8, 256


def main() -> None:
    """A byte-level decoder of a size that two cores train."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 256, "num_heads": 8, "num_layers": 4, "ff_dim": 1024, "dropout_p": 0.0}
    model = headscope.Transformer(headscope.TransformerConfig(256, kind="decoder", position="rotary", **sizes))
    text = torch.randint(256, (BATCH, LENGTH + 1))

    def step() -> None:
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        model.zero_grad()

    def looked_at() -> None:
        with headscope.monitor(model, every=1):
            step()

    times = side_by_side({"one step": step, "one step, looked at": looked_at}, 9)
    plain, seen = times["one step"], times["one step, looked at"]
    cost = seen.over(plain) - 1
    rows = [
        ["one step, forward and backward", f"{plain.median * 1e3:.0f} ms", "1.00"],
        ["one step, looked at", f"{seen.median * 1e3:.0f} ms", f"{1 + cost:.2f}"],
        ["steps looked at every 50", f"{(plain.median * 49 + seen.median) / 50 * 1e3:.1f} ms", f"{1 + cost / 50:.4f}"],
    ]
    write(
        "monitor",
        f"Watching the heads while they learn: 4 layers × 8 heads, embed_dim 256, {BATCH} × {LENGTH} tokens",
        ("work", "time", "÷ one step"),
        rows,
        "The last line follows from the two before: between looks the monitor counts a step and does nothing else. "
        "The optimizer's step is left out; it would make the share smaller.",
    )


if __name__ == "__main__":
    main()
