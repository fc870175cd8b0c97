"""Where bfloat16 makes a step of training faster: the same step under autocast ÷ in float32, by task and size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from measure import side_by_side, write

from headscope import Transformer
from headscope.training import TrainConfig, make_task

SIZES = (  # task, embed_dim (0: the task's own), rows, positions in a row
    ("copy", 0, 64, 10),
    ("copy", 512, 64, 10),
    ("copy", 256, 320, 16),
    ("copy", 256, 80, 64),
    ("bytes", 0, 16, 128),
    ("bytes", 256, 512, 10),
    ("bytes", 256, 64, 32),
    ("bytes", 64, 2, 32),
    ("bytes", 64, 16, 64),
    ("bytes", 256, 4, 256),
    ("bytes", 64, 1, 1024),
    ("bytes", 512, 16, 128),
)


def _row(task: str, width: int, batch_size: int, length: int) -> list[str]:
    made = make_task(task, length)
    sizes = {"embed_dim": width, "num_heads": max(1, width // 64)} if width else {}
    config = TrainConfig(task, batch_size=batch_size, length=length, model=made.model_config(**sizes))
    model = Transformer(config.sizes)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = made.batch(0, 0, batch_size)

    def step(halves: bool) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=halves):
            logits = model(batch.tokens, batch.source)
        F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=-100).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = side_by_side({"float32": lambda: step(False), "bfloat16": lambda: step(True)}, 9)
    full, half = times["float32"], times["bfloat16"]
    auto = "bfloat16" if config.in_bfloat16(torch.device("cpu")) else "float32"
    shape = f"{batch_size} × {length}"
    row = [task, str(config.sizes.embed_dim), shape, f"{full.median * 1e3:.0f} ms", f"{half.median * 1e3:.0f} ms"]
    return [*row, f"{half.over(full):.2f}", auto]


def main() -> None:
    """Steps as `headscope train` makes them, side by side."""
    rows = [_row(*size) for size in SIZES]
    write(
        "training",
        "A step of training in bfloat16 beside float32: forward, backward and AdamW",
        ("task", "width", "rows × length", "float32", "bfloat16", "÷ float32", "auto takes"),
        rows,
        "On a CPU without instructions for bfloat16, auto takes float32 always. On short rows the time goes into the "
        "fused kernel's way back, which is slow there in bfloat16.",
    )


if __name__ == "__main__":
    main()
