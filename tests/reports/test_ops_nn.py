"""Faults in the attention matrix and the attention modules."""

import torch

from headscope import AttentionMatrix


def test_answer_that_depends_on_what_was_asked_before() -> None:
    """The kernel's log-sum-exp, one float32 per row, stayed after `P @ v`: rows summed to 1 ± 4e-3."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    q[..., 8], k[..., 8] = 316.0, -316.0
    first, after_product = AttentionMatrix(q, k, scale=1.0), AttentionMatrix(q, k, scale=1.0)
    after_product @ v
    exact = AttentionMatrix(q.double(), k.double(), scale=1.0).dense().float()
    for P in (first, after_product):
        torch.testing.assert_close(P.dense(), exact, atol=1e-6, rtol=0)
        torch.testing.assert_close(P.dense().sum(-1), torch.ones(1, 2, 64), atol=1e-6, rtol=0)
