"""Documents cut into pieces: sinks, delimiters, odd texts, texts that cannot be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from headscope.errors import TextError
from headscope.heads import corpus
from headscope.heads.atlas.measuring import measure
from headscope.heads.corpus import Document
from headscope.heads.measures import standard
from headscope.models.loading import Loaded
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import documents


@pytest.mark.parametrize(
    ("text", "rows"),
    [("word", 4), ("x" * 100_000, 100_000), ("👩‍👩‍👧‍👦 🏳️‍🌈 family", 1), ("שלום עולם, מה שלומך", 1), ("?! ...", 1)],
    ids=["one word", "no space", "emoji", "right to left", "no words"],
)
def test_cut_and_measure_take_odd_texts(text: str, rows: int, tiny_decoder: Loaded) -> None:
    pieces = corpus.cut(tiny_decoder, Document("odd", lambda: text), 0, length=64, most=2)
    assert len(pieces) == (2 if rows > 64 else 1)
    measurements = measure(tiny_decoder, pieces, standard())
    assert measurements.sums.value("entropy").isfinite().all()


def test_unreadable_texts_are_refused(tmp_path: Path, tiny_decoder: Loaded) -> None:
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes(b"caf\xe9")
    empty.write_text(" \n")
    for path, match in (
        (latin, "not UTF-8 text: byte 3"),
        (empty, "holds no text"),
        (tmp_path / "no.txt", "Cannot read"),
    ):
        with pytest.raises(TextError, match=match):
            corpus.documents_of([path])[0].read()
    with pytest.raises(TextError, match="character 1 is half a character"):
        corpus.documents_of([], text="a\ud800")[0].read()
    with pytest.raises(TextError, match="2 tokens a piece leave no room"):
        corpus.cut(tiny_decoder, documents("owl")[0], 0, length=2)


def test_unknown_tokens_are_text_and_not_sinks(tiny_decoder: Loaded) -> None:
    odd = Document("odd", lambda: "a “b” ’ c")  # the marks have no token of their own
    (piece,) = corpus.cut(tiny_decoder, odd, 0, length=64)
    assert piece.ids.count(1) == 3
    assert piece.sinks == (True, *[False] * (len(piece.ids) - 1))
    assert [t for t, delimiter in zip(piece.texts, piece.delimiters, strict=True) if delimiter] == ["“", "”", "’"]
    (written,) = corpus.cut(tiny_decoder, Document("written", lambda: "a <s> b"), 0, length=64)
    assert [t for t, sink in zip(written.texts, written.sinks, strict=True) if sink] == ["", "<s>"]


def test_delimiters_that_are_sinks_are_not_text(tiny_decoder: Loaded) -> None:
    piece = corpus.cut(tiny_decoder, documents("owl")[0], 0, length=64)[0]
    marks = tuple(sink or delimiter for sink, delimiter in zip(piece.sinks, piece.delimiters, strict=True))
    values = measure(tiny_decoder, [replace(piece, sinks=marks)], standard()).sums.value("delimiter")
    assert float(values.nan_to_num().max()) == 0


def test_default_documents_are_long_and_stable() -> None:
    default = corpus.default_documents()
    assert len(default) > 15
    assert len({document.name for document in default}) == len(default)
    assert [corpus.digest(d) for d in default] == [corpus.digest(d) for d in corpus.default_documents()]
    assert all(len(document.read()) > 200 for document in default)
