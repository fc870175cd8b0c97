"""No answer builds the L×S matrix: the peak memory of every option, at a size where the matrix would take 34 MB.

The cases run one after another in one process of their own (``python -m tests.ops.test_memory CASE …`` prints them),
which resets the kernel's record of its peak before each.
"""

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headscope import AttentionMatrix, attention, masks
from headscope.heads.measures.products import Distance, Product, SharedProduct
from headscope.heads.measures.strongest import Strongest
from headscope.ops.kernels import differentiable, fused, indexing, tiles
from headscope.ops.reductions import (
    Entropy,
    Groups,
    Mass,
    Max,
    Offsets,
    Pool,
    Received,
    TopK,
    TransposedProduct,
    groups,
)

HEADS, LENGTH, SIZE = 8, 1024, 16
DENSE = HEADS * LENGTH * LENGTH * 4 / 1e6  # 34 MB
BOUND = 0.6 * DENSE  # 20 MB; the most that was measured is 15


def use_small_blocks() -> None:
    """A sixteenth of every block size, as the matrix is a sixteenth of one of 4,096 tokens."""
    for module, names in (
        (tiles, ("_BLOCK", "_SMALL_BLOCK", "_TILE")),
        (differentiable, ("_AUTOGRAD",)),
        (fused, ("_MASK_BLOCK", "_AUTOGRAD")),
        (indexing, ("_CELLS", "_POINTS", "_CACHED")),
        (groups, ("_INDICATOR",)),
    ):
        for name in names:
            setattr(module, name, getattr(module, name) // 16)


def tensor(heads: int = HEADS, length: int = LENGTH, width: int = SIZE, grad: bool = False) -> Tensor:
    return torch.randn(1, heads, length, width).requires_grad_(grad)


def evaluated(options: dict[str, Any]) -> dict[str, Any]:
    """Large options are functions that run inside the case, so that they count."""
    return {name: value() if isinstance(value, FunctionType) else value for name, value in options.items()}


def attend(
    *,
    queries: int = LENGTH,
    kv_heads: int = HEADS,
    width: int = SIZE,
    transposed: bool = False,
    grad: bool = True,
    **options: Any,
) -> Callable[[], None]:
    """A call of attention(), with its gradients."""

    def run() -> None:
        tensors = [tensor(HEADS, queries), tensor(kv_heads), tensor(kv_heads, width=width)]
        if transposed:
            tensors = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in tensors]
        operands = [x.requires_grad_(grad) for x in tensors]
        out = attention(*operands, **evaluated(options))
        if grad:
            out.sum().backward()

    return run


def answer(compute: Callable[[AttentionMatrix], object], *, grad: bool = False, **options: Any) -> Callable[[], None]:
    """An answer of a matrix, causal unless options say otherwise; with its gradients."""

    def run() -> None:
        operands = {"mask": masks.causal()} | evaluated(options)
        result = compute(AttentionMatrix(tensor(grad=grad), tensor(grad=grad), **operands))
        if grad:
            assert isinstance(result, Tensor)
            result.sum().backward()

    return run


def dense() -> Tensor:
    return torch.rand(LENGTH, LENGTH) < 0.9


def documents() -> masks.Mask:
    return masks.causal() & masks.documents(torch.arange(LENGTH) // 175)


def without_gradients(run: Callable[[], None]) -> Callable[[], None]:
    def inside() -> None:
        with torch.no_grad():
            run()

    return inside


def key_bias(grad: bool = False) -> Tensor:
    return torch.randn(1, HEADS, 1, LENGTH).requires_grad_(grad)


IDS = torch.arange(LENGTH) // 8
REDUCTIONS = [Entropy(), Max(), TopK(5), Received(mean=True), Offsets(8), Groups(IDS), Mass()]
REDUCTIONS += [Pool(IDS, IDS, "mass"), Pool(64, 64, "mean"), Pool(64, 64, "max"), TransposedProduct(tensor())]
TEXT = torch.arange(LENGTH)[None] > 0  # all but a start token
MEASURES = [Strongest(TEXT, 8), SharedProduct([Distance(TEXT[..., None]), Product(torch.rand(1, HEADS, LENGTH, 4))])]
CASES: dict[str, Callable[[], None]] = {
    "no mask": attend(),
    "causal": attend(mask=masks.causal()),
    "causal, fewer queries": attend(mask=masks.causal(), queries=1000),
    "window": attend(mask=masks.sliding_window(75)),
    "padding": attend(mask=masks.padding([1000])),
    "documents": attend(mask=documents),
    "dense": attend(mask=dense),
    "packed": attend(mask=lambda: masks.packed(dense())),
    "function": attend(mask=masks.function(lambda b, h, i, j: (i + j) % 3 > 0)),
    "nothing visible": attend(mask=masks.prefix(0)),
    "key-only bias": attend(bias=key_bias),
    "key-only bias and causal": attend(bias=key_bias, mask=masks.causal()),
    "[1, 1, L, S] bias": attend(bias=lambda: torch.randn(1, 1, LENGTH, LENGTH)),
    "trained bias": attend(bias=lambda: key_bias(grad=True), mask=masks.causal()),
    "trained bias without gradients": without_gradients(attend(bias=lambda: key_bias(grad=True), grad=False)),
    "float64 bias": attend(bias=lambda: key_bias().double(), grad=False),
    "dropout": attend(dropout_p=0.2, mask=masks.causal()),
    "narrow value": attend(width=5, mask=masks.causal()),
    "wide value": attend(width=40, mask=masks.causal()),
    "grouped heads": attend(kv_heads=2),
    "grouped heads and padding": attend(kv_heads=2, mask=masks.padding([1000])),
    "transposed views": attend(transposed=True, mask=masks.causal()),
    "P @ value": answer(lambda P: P @ tensor()),
    "P @ value, transposed views": answer(lambda P: P @ tensor(width=LENGTH, length=SIZE).transpose(2, 3), mask=None),
    "P @ x for all heads": answer(lambda P: P @ torch.randn(LENGTH, 7), mask=None),
    "P @ value with gradients": answer(lambda P: P @ tensor(grad=True), grad=True),
    "P @ value, softcap": answer(lambda P: P @ tensor(grad=True), grad=True, softcap=3.0),
    "P @ value, sinks": answer(lambda P: P @ tensor(), sinks=torch.zeros(HEADS)),
    "P.T @ x": answer(lambda P: P.T @ tensor()),
    "P.T @ x with gradients": answer(lambda P: P.T @ tensor(grad=True), grad=True),
    "entropy": answer(lambda P: P.entropy()),
    "entropy, no mask": answer(lambda P: P.entropy(), mask=None),
    "entropy with gradients": answer(lambda P: P.entropy(), grad=True),
    "entropy, softcap and sinks": answer(lambda P: P.entropy(), softcap=3.0, sinks=torch.zeros(HEADS)),
    "entropy, known logsumexp": answer(lambda P: (P @ tensor(), P.entropy())),
    "logsumexp": answer(lambda P: P.logsumexp),
    "every reduction in one pass": answer(lambda P: P.reduce(*REDUCTIONS)),
    "the reductions of the measures": answer(lambda P: P.reduce(*MEASURES)),
    "a part": answer(lambda P: P[0, 3, 100:1000, :50]),
    "far apart cells": answer(lambda P: P[0, [1, 5], [17, 1000], [3, 9]]),
}  # fmt: skip


def status(name: str) -> float:
    """A line of this process's status, in MB."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def measure(name: str) -> float:
    """How far memory rises above what was held before, in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = status("VmRSS")
    CASES[name]()
    return status("VmHWM") - before


def build_the_matrix() -> None:
    torch.softmax(tensor() @ tensor().transpose(2, 3), -1)


@pytest.fixture(scope="module")
def peaks() -> dict[str, float]:
    """The peak of every case in MB, measured in one other process."""
    if platform.system() != "Linux" or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory is read from /proc/self, which only Linux has")
    # Freed tensors go back to the system, so that no case reuses the memory of another.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": str(1 << 18)}
    command = [sys.executable, "-m", "tests.ops.test_memory", *CASES, "built"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    peak_of_case: dict[str, float] = json.loads(done.stdout)
    return peak_of_case


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_stays_far_below_the_dense_matrix(name: str, peaks: dict[str, float]) -> None:
    assert peaks[name] < BOUND


def test_peak_memory_shows_a_matrix_that_is_built(peaks: dict[str, float]) -> None:
    assert peaks["built"] > DENSE


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    use_small_blocks()
    CASES["built"] = build_the_matrix
    # A first call imports code, which must not count.
    operand = torch.randn(1, 8, 64, 8, requires_grad=True)
    checkpoint(torch.exp, attention(*[operand] * 3), use_reentrant=False).sum().backward()
    gc.freeze()
    print(json.dumps({name: round(measure(name), 1) for name in sys.argv[1:]}))
