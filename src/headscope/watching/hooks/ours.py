"""The hook for our own attention(), whose operands are known: nothing need be read."""

from __future__ import annotations

from torch import Tensor

from headscope.ops.kernels.fused import Product, capture_logsumexp, observers
from headscope.ops.scores import Scores
from headscope.watching.hooks.reporting import report, report_call
from headscope.watching.hooks.sdpa import direct
from headscope.watching.hooks.watches import active_watches, running_module, within_call


def install() -> None:
    """Observe the function that attention() ends in."""
    if _observed not in observers:
        observers.append(_observed)


def remove() -> None:
    """Observe it no longer."""
    if _observed in observers:
        observers.remove(_observed)


def _observed(product: Product, scores: Scores, value: Tensor, dropout_p: float) -> Tensor:
    if not active_watches():
        return product(scores, value, dropout_p)
    with within_call(), capture_logsumexp(scores.query) as capture:
        output = product(scores, value, dropout_p)

    def read() -> Tensor:
        logsumexp = capture.for_shape(scores.shape)
        out = direct(output)
        call = report_call(
            running_module(), "headscope", lambda _: [scores], value, out, dropout_p, logsumexp=logsumexp
        )
        return call.output.raw

    result: Tensor = report(output, read)
    return result
