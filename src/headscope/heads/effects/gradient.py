"""Gradient importance of heads: the derivative of a metric by each head's gate, by one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.heads.effects.metrics import Metric, checked_metric, run_model
from headscope.watching.edits import Edit, edit
from headscope.watching.hooks import AttentionCall, with_output
from headscope.watching.recording import Position


@dataclass(frozen=True)
class _Gates(Edit):
    """Multiplies each head's output by a gate of 1; collects the gates in the order of calls."""

    gates: list[Tensor]

    def apply(self, call: AttentionCall, position: Position) -> AttentionCall:
        outputs = call.head_outputs()
        gate = torch.ones(outputs.shape[:2], dtype=outputs.dtype, device=outputs.device, requires_grad=True)
        self.gates.append(gate)
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
    their ``.grad`` do not change.
    """
    gates: list[Tensor] = []
    with torch.enable_grad(), edit(model, _Gates(None, gates)):
        logits = run_model(model, input_ids, attention_mask, extra)
        values = checked_metric(metric(logits, input_ids, text), input_ids.shape[0])
        gradients = torch.autograd.grad(values.sum(), gates, allow_unused=True)
    most = max(gate.shape[1] for gate in gates)
    table = torch.full((input_ids.shape[0], len(gates), most), torch.nan, dtype=torch.float64)
    for layer, (gate, gradient) in enumerate(zip(gates, gradients, strict=True)):
        known = torch.zeros_like(gate) if gradient is None else gradient
        table[:, layer, : gate.shape[1]] = known.double().cpu()
    return table, values.detach().cpu()
