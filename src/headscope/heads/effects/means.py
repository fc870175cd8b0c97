"""Mean head outputs over a corpus, which mean ablation needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from headscope.errors import EditError
from headscope.heads.effects.metrics import forward_options, run_model
from headscope.watching.hooks import AttentionCall, Forward, unwatched, watch

Batches = Iterable[Tensor | Mapping[str, Tensor]]


def head_sums(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Sums of head outputs over positions that are text, and the number of these positions.

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
            output = output_sum(call, text)
            if forward.number == len(sums):
                sums.append(torch.zeros_like(output))
                counts.append(0.0)
            sums[forward.number] += output
            counts[forward.number] += float(text.sum())

    extra = forward_options(model, use_cache=False)
    with torch.no_grad(), watch(model, add):
        for batch in batches:
            inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
            run_model(model, inputs["input_ids"], inputs.get("attention_mask"), extra)
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
    per_text = outputs.sum(2, dtype=torch.promote_types(outputs.dtype, torch.float32))  # a tenth of float64's time
    return per_text.sum(0, dtype=torch.float64).cpu()


def head_means(model: nn.Module, batches: Batches) -> Tensor:
    """Each head's mean output over all positions that are text, [layers, H, Dv] in float32.

    For ``ablate(layer, head, to=means)`` and ``head_effects(…, to=means)``. One batch is in memory at a time.

    Args:
        model: as for record().
        batches: token ids [B, T], or mappings with "input_ids" and optionally "attention_mask".

    Raises:
        EditError: as :func:`head_sums`.
    """
    sums, counts = head_sums(model, batches)
    return (sums / counts[:, None, None]).float()
