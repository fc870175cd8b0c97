"""Treebanks in CoNLL-U: words, pairs, clusters, and the errors of bad files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from headscope.errors import TreebankError
from headscope.heads.relations.sentences.pairs import Example
from headscope.heads.relations.sentences.treebank import read_conllu

EWT = Path(__file__).parent.parent.parent.parent / "shared" / "data" / "en_ewt-ud-dev.conllu"

Read = Callable[..., list[Example]]


def line(which: str, form: str, head: str = "_", deprel: str = "_", misc: str = "_") -> str:
    return "\t".join([which, form, form.lower(), "X", "_", "_", head, deprel, "_", misc])


DOG = [
    line("1", "The", "2", "det"),
    line("2", "dog", "3", "nsubj:pass"),
    line("3", "slept", "0", "root", "SpaceAfter=No"),
    line("4", ".", "3", "punct"),
]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def write_and_read(*lines: str, name: str = "en_tiny-ud-dev.conllu", ending: str = "\n") -> list[Example]:
        path = tmp_path / name
        path.write_bytes(ending.join([*lines, "", ""]).encode())
        return read_conllu(path)

    return write_and_read


def pairs(example: Example) -> list[tuple[str, str, str]]:
    return [(pair.relation, example.word(pair.source), example.word(pair.target)) for pair in example.pairs]


def words(example: Example) -> list[str]:
    return [example.word(index) for index in range(len(example.words))]


def test_pairs_go_from_dependents_to_their_heads(read: Read) -> None:
    (example,) = read("# text = The dog slept.", *DOG)
    assert example.text == "The dog slept."
    assert example.words == ((0, 3), (4, 7), (8, 13), (13, 14))
    assert pairs(example) == [("det", "The", "dog"), ("nsubj:pass", "dog", "slept")]
    assert example.language == "en"


@pytest.mark.parametrize("text", [[], ["# text = The cat slept."], ["# text = The dog slept. More"]])
def test_a_text_that_does_not_fit_is_rebuilt(read: Read, text: list[str]) -> None:
    (example,) = read(*text, *DOG)
    assert example.text == "The dog slept."
    assert words(example) == ["The", "dog", "slept", "."]


def test_a_text_that_fits_keeps_its_spaces(read: Read) -> None:
    (example,) = read("# text = The  dog   slept.", *DOG)
    assert words(example) == ["The", "dog", "slept", "."]
    assert example.words[1] == (5, 8)


def test_a_multiword_token_is_split_where_its_words_make_it_up(read: Read) -> None:
    (example,) = read(
        "# text = I Gonna go",
        line("1", "I", "2", "nsubj"),
        line("2-3", "Gonna"),
        line("2", "gon", "0", "root"),
        line("3", "na", "4", "mark"),
        line("4", "go", "2", "xcomp"),
    )
    assert words(example) == ["I", "Gon", "na", "go"]
    assert pairs(example) == [("nsubj", "I", "Gon"), ("mark", "na", "go"), ("xcomp", "go", "Gon")]


def test_a_multiword_token_stays_whole_where_its_words_are_written_otherwise(read: Read) -> None:
    (example,) = read(
        line("1-2", "du", misc="SpaceAfter=No"),
        line("1", "de", "2", "case"),
        line("2", "le", "4", "det"),
        line("3", ",", "4", "punct"),
        line("4", "chat", "0", "root"),
        name="fr_tiny.conllu",
    )
    assert example.text == "du, chat"
    assert words(example) == ["du", ",", "chat"]
    assert pairs(example) == [("det", "du", "chat")]  # de depends on le inside the word: left out


def test_empty_nodes_are_skipped(read: Read) -> None:
    (example,) = read(*DOG[:2], line("2.1", "fast"), *DOG[2:])
    assert words(example) == ["The", "dog", "slept", "."]
    assert pairs(example)[1] == ("nsubj:pass", "dog", "slept")


def test_documents_are_clusters_and_their_hash_is_the_half(read: Read) -> None:
    examples = read("# newdoc id = a", *DOG, "", *DOG, "", "# newdoc id = b", *DOG, "", "# newdoc", *DOG)
    assert [e.cluster for e in examples[:3]] == ["a", "a", "b"]
    assert re.fullmatch(r"en_tiny-ud-dev\.conllu \([0-9a-f]{8}\) document 3", examples[3].cluster)
    # The last bits of the CRC-32 of "a" and "b": E8B7BE43 and 71BEEFF9.
    assert [e.half for e in examples[:3]] == [1, 1, 1]
    many = read(*(text for i in range(64) for text in (f"# newdoc id = doc {i}", *DOG, "")))
    assert 20 <= sum(e.half for e in many) <= 44


def test_without_documents_ten_sentences_are_a_cluster(read: Read) -> None:
    examples = read(*(text for _ in range(23) for text in (*DOG, "")))
    sizes = {e.cluster: sum(other.cluster == e.cluster for other in examples) for e in examples}
    assert list(sizes.values()) == [10, 10, 3]
    assert re.fullmatch(r"en_tiny-ud-dev\.conllu \([0-9a-f]{8}\) sentences 11-20", list(sizes)[1])
    others = read(*(text for _ in range(24) for text in (*DOG, "")))
    assert not sizes.keys() & {e.cluster for e in others}  # another treebank whose file has the same name


def test_line_ends_and_a_byte_order_mark_do_not_matter(read: Read, tmp_path: Path) -> None:
    wanted = read("# text = The dog slept.", *DOG)
    assert read("# text = The dog slept.", *DOG, ending="\r\n") == wanted
    path = tmp_path / "en_tiny-ud-dev.conllu"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(["# text = The dog slept.", *DOG]).encode())
    assert read_conllu(path) == wanted


@pytest.mark.parametrize(
    ("lines", "where", "reason"),
    [
        (["# a", *DOG[:2], "3\tslept"], 4, "2 columns, wanted 10"),
        ([*DOG[:1], DOG[1].replace("\t", " ")], 2, "1 columns, wanted 10"),
        ([line("1", "", "0", "root")], 1, "column 2 is empty"),
        ([line("one", "The", "0", "root")], 1, "'one' is no id"),
        ([*DOG, "", line("2", "dog", "0", "root")], 6, "the id is 2, wanted 1"),
        ([DOG[0], DOG[0]], 2, "the id is 1, wanted 2"),
        ([line("1", "The", "7", "det")], 1, "the head of word 1 (The) is 7, which is no word of the sentence"),
        ([line("1", "The", "1", "det")], 1, "is 1, which is the word itself"),
        ([line("1", "The", "2", "det"), line("2", "dog", "1", "dep")], 1, "heads of word 1 (The) go round in a circle"),
        ([line("1", "The", "up", "det")], 1, "'up' is no head"),
        ([line("1", "The")], 1, "'_' is no head"),
        ([line("1", "The", "2"), line("2", "dog", "0", "root")], 1, "word 1 (The) has a head and no relation to it"),
        ([line("2-3", "Gonna"), *DOG], 1, "the range 2-3 does not stand before its words"),
        ([line("1-3", "Gonna"), line("1", "gon", "0", "root")], 2, "the range that ends at 3 has words only up to 1"),
        ([line("0.1", "x")], 1, "the sentence has no words"),
        (["# global.columns = ID FORM", *DOG], 1, "CoNLL-U Plus"),
        ([line("1", "a  b", "0", "root")], 1, "two spaces inside a column"),
    ],
)
def test_errors_name_the_line(read: Read, lines: list[str], where: int, reason: str) -> None:
    with pytest.raises(TreebankError, match=re.escape(f"en_tiny-ud-dev.conllu:{where}: ") + ".*" + re.escape(reason)):
        read(*lines)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.conllu"
    path.write_bytes(DOG[0].encode() + b"\n2\tcaf\xe9\n")
    with pytest.raises(TreebankError, match=r"x\.conllu:2: byte 0xE9 is not UTF-8"):
        read_conllu(path)


@pytest.mark.parametrize("content", ["", "\n\n", "# text = nothing\n"])
def test_a_file_without_sentences_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.conllu"
    path.write_text(content)
    with pytest.raises(TreebankError, match="holds no sentence"):
        read_conllu(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TreebankError, match="No such file or directory"):
        read_conllu(tmp_path / "x.conllu")


@pytest.mark.skipif(not EWT.exists(), reason="the treebank EWT is not in ../shared/data")
def test_a_real_treebank() -> None:
    examples = read_conllu(EWT)
    assert len(examples) == 2001
    assert len({e.cluster for e in examples}) == 318  # the documents that the file names
    for example in examples:
        joined = "".join(words(example))
        assert joined == "".join(example.text.split())  # every character is in one word
    second = pairs(examples[1])
    assert ("nsubj", "Bush", "nominated") in second
    assert ("obj", "individuals", "nominated") in second
    assert not {pair.relation for e in examples for pair in e.pairs} & {"root", "punct"}
