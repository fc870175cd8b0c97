"""Mean head outputs over a corpus, what mean ablation writes in a head's place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from headscope.errors import EditError
from headscope.heads.effects.answers import ask, options
from headscope.watching.hooks import AttentionCall, Forward, unwatched, watch

__all__ = ["head_means", "head_sums", "output_sum"]

Batches = Iterable[Tensor | Mapping[str, Tensor]]


def head_sums(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Sums of head outputs over positions that are text, and how many there were.

    Sums of parts of a corpus add up: ``(sums_a + sums_b) / (counts_a + counts_b)[:, None, None]``.

    Args:
        model: as for record().
        batches: token ids [B, T], or mappings with "input_ids" and optionally "attention_mask", one at a time.

    Returns:
        sums [layers, H, Dv] and counts [layers], both float64, on the CPU; layers in the order of calls.

    Raises:
        EditError: no batches, or sites that differ in the number or the size of their heads.
    """
    sums: list[Tensor] = []
    counts: list[float] = []

    def add(call: AttentionCall, forward: Forward) -> None:
        with unwatched():
            text = forward.valid
            if text is None or tuple(text.shape) != (call.shape[0], call.shape[2]):
                text = torch.ones(call.shape[0], call.shape[2], dtype=torch.bool)
            here = output_sum(call, text)
            if forward.number == len(sums):
                sums.append(torch.zeros_like(here))
                counts.append(0.0)
            sums[forward.number] += here
            counts[forward.number] += float(text.sum())

    extra = options(model, use_cache=False)
    with torch.no_grad(), watch(model, add):
        for batch in batches:
            given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            ask(model, given["input_ids"], given.get("attention_mask"), extra)
    shapes = {tuple(part.shape) for part in sums}
    if len(shapes) != 1:
        raise EditError(
            f"head_sums found heads of {len(shapes)} shapes, [H, Dv]: {sorted(shapes)}; wanted one at all attention "
            "sites, and at least one batch."
        )
    return torch.stack(sums), torch.tensor(counts, dtype=torch.float64)


def output_sum(call: AttentionCall, text: Tensor) -> Tensor:
    """The sum of a call's head outputs over the positions that are text, [B, L] bool: [H, Dv] float64, on the CPU."""
    outputs = call.head_outputs()
    if not bool(text.all()):
        outputs = outputs.masked_fill(~text.to(outputs.device)[:, None, :, None], 0)
    own = outputs.sum(2, dtype=torch.promote_types(outputs.dtype, torch.float32))  # of each text: a tenth of the time
    return own.sum(0, dtype=torch.float64).cpu()


def head_means(model: nn.Module, batches: Batches) -> Tensor:
    """Each head's mean output over all positions that are text, [layers, H, Dv] in float32.

    For ``ablate(layer, head, to=means)`` and ``head_effects(…, to=means)``. One batch is held at a time.

    Args:
        model: as for record().
        batches: token ids [B, T], or mappings with "input_ids" and optionally "attention_mask".

    Raises:
        EditError: as :func:`head_sums`.
    """
    sums, counts = head_sums(model, batches)
    return (sums / counts[:, None, None]).float()
