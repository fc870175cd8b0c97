"""Atlases of two corpora, merged into one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from headscope.commands import app as cli
from headscope.errors import AtlasError, TextError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.corpus import Document
from headscope.heads.relations import Example, Pair
from headscope.models.loading import Loaded
from tests import tiny
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import PLAN, TEXTS, documents, few_sentences, letter_tokenizer


def test_merge_of_two_corpora_is_the_profile_of_both(tiny_decoder: Loaded, tiny_atlas: HeadAtlas) -> None:
    names = list(TEXTS)
    first = profile(tiny_decoder, texts=documents(*names[:2]), relations=few_sentences(), plan=PLAN)
    second = profile(tiny_decoder, texts=documents(*names[2:4]), relations=few_sentences(), plan=PLAN)
    both = first.merge(second)
    whole = profile(tiny_decoder, texts=documents(*names[:4]), relations=few_sentences(), plan=replace(PLAN, worth=4))
    for name in ("entropy", "sink", "induction", "relation:coreference", "ablation_zero"):
        torch.testing.assert_close(both.value(name), whole.value(name), atol=1e-9, rtol=1e-9, equal_nan=True)
    for name, sums in whole.measurements.sums.values.items():  # a ratio would not tell what counts twice
        torch.testing.assert_close(both.measurements.sums.values[name], sums, atol=1e-9, rtol=1e-9)
    assert both.measurements.sums.documents == whole.measurements.sums.documents
    assert both.info["documents"] == whole.info["documents"]
    assert both.relations.pair_examples.pairs == whole.relations.pair_examples.pairs  # of shared sentences, once
    ours, theirs = both.measurements.token_examples.largest, whole.measurements.token_examples.largest
    for head, examples in theirs.items():
        assert [e.weight for e in ours[head]] == pytest.approx([e.weight for e in examples], abs=2e-4)
    assert {e.document for examples in ours.values() for e in examples} > set(names[:2])
    assert first.relations.examples == both.relations.examples > 0
    with pytest.raises(AtlasError, match="both atlases hold 'owl'"):
        tiny_atlas.merge(first)
    stranger = Loaded("other", tiny.mistral(4), letter_tokenizer(), 0, 64, True, "a test")
    with pytest.raises(AtlasError, match="of different types cannot be merged: tiny and other"):
        first.merge(profile(stranger, texts=documents("cat"), plan=Plan(length=24, repeats=0, worth=0)))


def test_merge_counts_shared_sentences_once(tiny_decoder: Loaded) -> None:
    plan = Plan(length=24, repeats=0, worth=0)
    frames = few_sentences()["some"]
    mine: list[Any] = []
    theirs: list[Any] = []
    for number in range(6):
        pair = (Pair("before", 1, 0),) if number % 2 else (Pair("before", 2, 1), Pair("twice", 2, 0))
        example = Example("It was late", ((0, 2), (3, 6), (7, 11)), pair, f"document {number}", number // 2 % 2, "en")
        (mine if number < 3 else theirs).append(example)
    collections = {"frames": frames, "mine": mine}, {"frames": frames, "theirs": theirs}
    first, second = (
        profile(tiny_decoder, texts=documents(*names), relations=relations, plan=plan)
        for names, relations in zip((("owl", "sea"), ("bus", "pie")), collections, strict=True)
    )
    everything = {"frames": frames, "mine": mine, "theirs": theirs}
    whole = profile(tiny_decoder, texts=documents("owl", "sea", "bus", "pie"), relations=everything, plan=plan)
    for both in (first.merge(second), second.merge(first)):
        assert both.relations.keys == whole.relations.keys
        assert both.relations.examples == whole.relations.examples > 6
        assert both.relations.skipped == whole.relations.skipped
        for key in whole.relations.keys:
            ours, wanted = both.relations.tally(*key), whole.relations.tally(*key)
            assert ours.clusters == wanted.clusters
            torch.testing.assert_close(ours.hits, wanted.hits)
            torch.testing.assert_close(ours.pairs, wanted.pairs)
        assert both.info["examples"] == whole.info["examples"]
    changed = profile(tiny_decoder, texts=documents("cat"), relations={"mine": mine[:2]}, plan=plan)
    with pytest.raises(AtlasError, match="hold sentences named 'mine', and these differ"):
        first.merge(changed)
    renamed = profile(tiny_decoder, texts=documents("cat"), relations={"other": mine[:2]}, plan=plan)
    with pytest.raises(AtlasError, match="hold sentences of 'document 0', in collections that differ"):
        first.merge(renamed)


def test_profile_refuses_duplicate_texts_and_sentences(tiny_decoder: Loaded, tmp_path: Path) -> None:
    """A head would be confirmed on the text that picked it."""
    plan = Plan(length=24, repeats=0, worth=0)
    with pytest.raises(TextError, match="owl is given twice"):
        profile(tiny_decoder, texts=documents("owl", "sea", "owl"), plan=plan)
    copy = [*documents("owl", "sea"), Document("copy", lambda: TEXTS["owl"])]
    with pytest.raises(AtlasError, match="owl and copy hold the same text"):
        profile(tiny_decoder, texts=copy, plan=plan)
    with pytest.raises(AtlasError, match="a and b hold the same sentences"):
        profile(
            tiny_decoder,
            texts=documents("owl"),
            relations={"a": few_sentences()["some"], "b": few_sentences()["some"]},
            plan=plan,
        )
    with pytest.raises(AtlasError, match=r"a and b both hold .*: its sentences would count twice"):
        profile(
            tiny_decoder,
            texts=documents("owl"),
            relations={"a": few_sentences()["some"], "b": few_sentences()["some"][:-1]},
            plan=plan,
        )
    first = profile(tiny_decoder, texts=documents("owl"), plan=plan)
    with pytest.raises(AtlasError, match="both atlases hold 'copy' and 0 more"):
        first.merge(profile(tiny_decoder, texts=copy[2:], plan=plan))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("The same words.", "utf-8")
    same_text = ["--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.txt")]
    for texts, match in ((same_text, "b.txt hold the same text"), (same_text[:2] * 2, "a.txt is given twice")):
        done = CliRunner().invoke(cli.app, ["heads", *texts])
        assert done.exit_code == 1
        assert match in " ".join(done.stderr.split())
