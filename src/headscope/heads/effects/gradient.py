"""Gradient importance: one backward pass says how much each head's gate matters to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.heads.effects.answers import Metric, ask, checked
from headscope.watching.edits import Edit, edit
from headscope.watching.hooks import AttentionCall, with_output
from headscope.watching.recording import Place

__all__ = ["gate_gradients"]


@dataclass(frozen=True)
class _Gates(Edit):
    """Each head's output times its gate, 1; the gates are kept in the order of calls."""

    made: list[Tensor]

    def apply(self, call: AttentionCall, place: Place) -> AttentionCall:
        outputs = call.head_outputs()
        gate = torch.ones(outputs.shape[:2], dtype=outputs.dtype, device=outputs.device, requires_grad=True)
        self.made.append(gate)
        return with_output(call, outputs * gate[:, :, None, None])


def gate_gradients(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    text: Tensor,
    metric: Metric,
    extra: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """∂metric/∂gate of every head in every row, [B, layers, H], and the metric [B]; both float64, on the CPU.

    A gate g multiplies a head's output o, so that its derivative at g = 1 is Σ_t o[t]·∂metric/∂o[t] (Michel et al.
    2019, arXiv 1905.10650). Rows are independent, so the gradient of their sum is each row's own. Parameters and
    their ``.grad`` are left alone.
    """
    made: list[Tensor] = []
    with torch.enable_grad(), edit(model, _Gates(None, made)):
        logits = ask(model, input_ids, attention_mask, extra)
        values = checked(metric(logits, input_ids, text), input_ids.shape[0])
        gradients = torch.autograd.grad(values.sum(), made, allow_unused=True)
    most = max(gate.shape[1] for gate in made)
    table = torch.full((input_ids.shape[0], len(made), most), torch.nan, dtype=torch.float64)
    for layer, (gate, gradient) in enumerate(zip(made, gradients, strict=True)):
        found = torch.zeros_like(gate) if gradient is None else gradient
        table[:, layer, : gate.shape[1]] = found.double().cpu()
    return table, values.detach().cpu()
