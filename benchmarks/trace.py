"""How many files and functions of headscope one question passes through, and how often it changes file.

Run from the repository: ``python benchmarks/trace.py``. The layer is one of a tiny Llama made from a config. Each
question runs once before it is traced, so that imports and caches of a first call are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import headscope

ROOT = str(Path(headscope.__file__).parent)


class Trace:
    """Files and functions of headscope that were called, and how often a call was in another file than the last one."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.functions: set[tuple[str, int]] = set()
        self.changes = 0
        self._file: str | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """For sys.setprofile."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOT):
            return
        self.files.add(code.co_filename)
        self.functions.add((code.co_filename, code.co_firstlineno))
        self.changes += self._file not in (None, code.co_filename)
        self._file = code.co_filename

    def of(self, question: Callable[[], object]) -> str:
        """Trace a question; its numbers as text."""
        sys.setprofile(self)
        try:
            question()
        finally:
            sys.setprofile(None)
        return f"{len(self.files)} files, {len(self.functions)} functions, {self.changes} changes of file"


def main() -> None:
    """Trace P.entropy() of a recorded layer, and record() of one forward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    ids = torch.arange(9)[None]

    def recorded() -> headscope.Recording:
        with torch.no_grad(), headscope.record(model) as recording:
            model(ids)
        return recording

    recorded()[0].entropy()
    P = recorded()[1]
    print("P.entropy():", Trace().of(P.entropy))
    print("record():   ", Trace().of(recorded))


if __name__ == "__main__":
    main()
