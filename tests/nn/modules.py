"""A small module and inputs: no two axes of equal size."""

import torch
from torch import Tensor, nn

from headscope import MultiHeadAttention

B, L, S, E, H = 2, 7, 11, 12, 3


def module_of(*sizes: int, **options: object) -> MultiHeadAttention:
    torch.manual_seed(0)
    module = MultiHeadAttention(*sizes, **options).double()
    for part in module.parameters():
        nn.init.normal_(part, std=0.4)
    return module


def x_of(length: int = L, width: int = E, seed: int = 1) -> Tensor:
    return torch.randn(B, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
