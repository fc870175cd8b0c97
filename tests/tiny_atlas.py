"""What tests of atlases share: short texts, tokenizers for them, a small plan, and the command line for a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan
from headscope.heads.corpus import Document
from headscope.heads.relations import Example, english_sentences

PLAN = Plan(length=24, repeats=4, period=7, worth=3, worth_tokens=9)
TEXTS = {
    "owl": "The owl sat still. It was old, and it was grey; nobody knew how old it was.",
    "sea": "Waves came in, one by one, and the sand was wet. A boat lay there, red and small.",
    "bus": "The bus was late again. People stood in the rain and said nothing at all.",
    "pie": "She made a pie. He ate it. Then both of them washed the plates and went out.",
    "cat": "A cat knows where it is warm. It goes there, lies down and sleeps.",
}


def documents(*names: str) -> list[Document]:
    """These texts, or all."""
    return [Document(name, lambda name=name: TEXTS[name]) for name in names or TEXTS]


def letter_tokenizer() -> Any:
    """A tokenizer that cuts words into letters, with spaces and line ends as tokens of their own."""
    known = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;- \n"
    return tokenizer_of(known, pre_tokenizers.Split("", "isolated"))


def word_tokenizer() -> Any:
    """A tokenizer of whole words: those of the texts above, and of the English sentences with known relations."""
    split = pre_tokenizers.Whitespace()
    texts = [*TEXTS.values(), *(example.text for example in english_sentences())]
    return tokenizer_of(sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)}), split)


def tokenizer_of(tokens: Any, split: Any) -> Any:
    """A tokenizer of these tokens after <s> and ?, for text cut by ``split``."""
    inner = Tokenizer(
        token_models.WordLevel({"<s>": 0, "?": 1} | {token: i + 2 for i, token in enumerate(tokens)}, "?")
    )
    inner.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", bos_token="<s>")


def few_sentences() -> dict[str, list[Example]]:
    """Five sentences of each half."""
    return {"some": list(_coreference())}


@cache
def _coreference() -> tuple[Example, ...]:
    sentences = [e for e in english_sentences() if any(pair.relation == "coreference" for pair in e.pairs)]
    return (*[e for e in sentences if e.half == 0][:5], *[e for e in sentences if e.half == 1][:5])


def assert_same_atlas(left: HeadAtlas, right: HeadAtlas, tolerance: float = 1e-6) -> None:
    """Assert that both have the same columns, roles and documents."""
    ours, theirs = left.columns(), right.columns()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance, equal_nan=True)
    assert left.roles() == right.roles()
    assert left.info["documents"] == right.info["documents"]


def write_folder(path: Path, model: Any, tokenizer: Any) -> Path:
    """Save a model as ``tiny`` in a folder, and the texts beside it."""
    model.save_pretrained(path / "tiny")
    tokenizer.save_pretrained(path / "tiny")
    for name, text in TEXTS.items():
        (path / f"{name}.txt").write_text(text, "utf-8")
    return path


def heads_command(folder: Path, *options: str, processes: int = 0) -> list[str]:
    """``headscope heads`` for the model and the texts of a folder, by torchrun if there are several processes."""
    texts = [part for name in TEXTS for part in ("--text", str(folder / f"{name}.txt"))]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    args = ["heads", "--model", str(folder / "tiny"), *texts, "--length", "24", *options]
    return [sys.executable, *launch, "-m", "headscope", *args]


def run_command(args: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command on one thread, and wait for it."""
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(args, capture_output=True, text=True, env=threads, timeout=300, check=False)
