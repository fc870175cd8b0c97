"""Faults in how texts, tokens and words were read."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from headscope import models
from headscope.commands import heads
from headscope.errors import AtlasError, TextError, TreebankError
from headscope.files import decode_text, read_text
from headscope.heads import corpus
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.relations.sentences.treebank import read_conllu
from headscope.models import loading
from headscope.models.characters import word_spans
from headscope.models.loading import Loaded
from headscope.models.tokens import Tokens, tokenize
from headscope.views import links
from headscope.views.links import find_links
from headscope.watching.texts import record_text
from tests.commands.runner import command


@pytest.fixture
def tiny_model(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A random decoder that reads letters, in place of every model."""
    monkeypatch.setattr(models, "load", lambda name, **options: tiny_decoder)
    return tiny_decoder


@pytest.mark.parametrize(
    "data",
    [b"Red owl.\r\nIt sat.", b"Red owl.\rIt sat.", b"\xef\xbb\xbfRed owl.\nIt sat.", b"Red owl.\r\n\rIt sat.\r\n"],
)
def test_a_file_a_pipe_and_an_argument_are_one_text(data: bytes, tmp_path: Path, tiny_model: Loaded) -> None:
    path, link = tmp_path / "text", ("--from", "It", "--to", "owl", "--json")
    path.write_bytes(data)
    argument = data.decode("utf-8-sig")
    wanted = "\n".join(argument.splitlines())
    file = json.loads(command("see", "--file", str(path), "--json").stdout)
    assert file["text"] == wanted
    assert json.loads(command("see", "-", "--json", stdin=data).stdout) == file
    assert json.loads(command("see", argument, "--json").stdout) == file
    by_argument = json.loads(command("forbid", argument, *link).stdout)
    assert by_argument["text"] == wanted
    assert json.loads(command("forbid", "-", *link, stdin=data).stdout) == by_argument
    assert corpus.documents_of([path])[0].read() == wanted


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_is_not_read_as_single_letters(encoding: str, tmp_path: Path, tiny_model: Loaded) -> None:
    path = tmp_path / "text"
    path.write_bytes("Red owl.".encode(encoding))
    for done in (command("see", "--file", str(path)), command("see", "-", stdin=path.read_bytes())):
        assert (done.exit_code, done.stdout) == (1, "")
        assert "is not UTF-8 text" in done.stderr
    with pytest.raises(TextError, match="UTF-16"):
        corpus.documents_of([path])[0].read()


def test_an_argument_is_utf_8_whatever_the_locale() -> None:
    def run(word: bytes) -> subprocess.CompletedProcess[bytes]:
        program = (
            "import sys; from headscope.commands.pipe import argument_text; print(ascii(argument_text(sys.argv[1])))"
        )
        environment: dict[str, Any] = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        run = [sys.executable, "-c", program, word]
        return subprocess.run(run, capture_output=True, env=environment, check=False)

    assert run("grün 她".encode()).stdout.strip().decode() == ascii("grün 她")
    assert b"neither UTF-8 nor ascii, the encoding of this locale" in run("grün".encode("latin-1")).stderr


BYTE_TOKENS = [f"<0x{number:02X}>" for number in range(256)]
CONTROL = ["<unk>", "<s>", "</s>"]


def tokenizer_like(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that knows 中, 国 and a, built as those of Llama 2, XLM-R, Gemma and RoBERTa are."""
    known = ["▁", "中", "国", "a"]
    if kind == "xlm-r":
        pieces = [(piece, -1.0) for piece in (*CONTROL, *known, *BYTE_TOKENS)]
        inner = Tokenizer(token_models.Unigram(pieces, 0, True))
        inner.normalizer = normalizers.NFKC()
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "roberta":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(token_models.BPE({p: i for i, p in enumerate([*CONTROL, *alphabet])}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        inner.decoder = decoders.ByteLevel()
    else:
        vocabulary = {piece: i for i, piece in enumerate([*CONTROL, *BYTE_TOKENS, *known])}
        inner = Tokenizer(token_models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        prefix = [normalizers.Prepend("▁")] if kind == "llama-2" else []
        inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    inner.add_special_tokens(CONTROL)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["llama-2", "xlm-r", "roberta"])
@pytest.mark.parametrize("before", ["", "</s>", "a ", "a  "])
def test_a_prefix_that_is_a_space_alone_is_blank(kind: str, before: str) -> None:
    """tokenizers#1775: a prefix has the offsets of the character after it."""
    tokens = tokenize(f"{before}中国", tokenizer_like(kind))
    (china, land) = tokens.words[-2:]
    assert (china.text, land.text) == ("中", "国")
    each = 3 if kind == "roberta" else 1
    assert (len(china.tokens), len(land.tokens)) == (each, each)
    space = china.tokens[0] - 1
    assert tokens.pieces[space] == " "
    assert tokens.word_ids()[space] == -1
    assert not tokens.special[space]
    if each == 1:
        assert tokens.pieces[-2:] == ("中", "国")


@pytest.mark.parametrize("kind", ["llama-2", "xlm-r", "gemma"])
@pytest.mark.parametrize("text", ["她他a", "a她\n他", "😀她 a", "她ａ"])
def test_characters_that_are_bytes_are_words_of_their_own(kind: str, text: str) -> None:
    tokens = tokenize(text, tokenizer_like(kind))
    assert [word.text for word in tokens.words] == [character for character in text if not character.isspace()]
    assert tokens.pieces[tokens.find("她").tokens[0]] == "她(1/3)"
    spans = [tokens.offsets[i] for word in tokens.words for i in word.tokens]
    assert all(end - start == 1 for start, end in spans)


@pytest.mark.parametrize("letter", ["Ġ", "G\u0307", "▁"])
def test_a_letter_that_is_written_like_a_space_is_a_word(letter: str) -> None:
    """Maltese has the letter that stands for a space in byte-level vocabularies."""
    inner = Tokenizer(token_models.WordLevel({"<unk>": 0, "Ġ": 1, "▁": 2, "a": 3}, "<unk>"))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = tokenize(f"{letter} a", PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert [word.text for word in tokens.words] == [letter, "a"]


def test_a_prefix_is_no_text_of_a_corpus() -> None:
    loaded = Loaded("none", None, tokenizer_like("xlm-r"), None, None, True, "a test")
    (piece,) = corpus.cut(loaded, corpus.Document("text", lambda: "中国"), 0)
    assert piece.texts == ("", "中", "国")


def test_a_space_is_shown_as_a_space() -> None:
    inner = tokenizer_like("roberta").backend_tokenizer
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokens = tokenize("a  a\n\na", tokenizer)
    assert [tokens.pieces[i] for i, word in enumerate(tokens.word_ids()) if word < 0] == [
        "<s>",
        *[" "] * 3,
        "\n",
        "\n",
        "</s>",
    ]


@pytest.mark.parametrize("text", ["a\nb", "a b", "a\t\nb"])
def test_a_blank_that_the_vocabulary_lacks_is_unknown_and_not_special(text: str) -> None:
    inner = Tokenizer(token_models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.add_special_tokens(["<unk>"])
    tokens = tokenize(text, PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert tokens.special == (False,) * len(text)
    assert tokens.unknown == (False, *[True] * (len(text) - 2), False)
    written = tokenize("a<unk>b", PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert written.special == (False, True, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("٣٫١٤ و", ["٣٫١٤", "و"]),
        ("١٬٠٠٠٫٥", ["١٬٠٠٠٫٥"]),
        ("10⁻³ m⁻², Na⁺.", ["10⁻³", "m⁻²", ",", "Na⁺", "."]),
        ("x₋₁ 1⁄2", ["x₋₁", "1⁄2"]),
        ("３．１４。", ["３．１４", "。"]),
        ("3.14 1,000 a.b 5 - 3", ["3.14", "1,000", "a", ".", "b", "5", "-", "3"]),
    ],
)
def test_a_number_is_one_word(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words


def roberta_like(kind: str) -> Any:
    """A tiny encoder with 20 positions, counted from behind that of the padding token, and what it can read."""
    sizes = {"vocab_size": 99, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 8, "max_position_embeddings": 20}
    made = {
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**sizes, pad_token_id=1)),
        "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**sizes, pad_token_id=1)),
        "camembert": lambda: transformers.CamembertModel(transformers.CamembertConfig(**sizes, pad_token_id=4)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes, pad_token_id=1)),
        "gpt2": lambda: transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=99, n_embd=24, n_layer=1, n_head=3, n_positions=20)
        ),
    }
    return made[kind]().eval()


@pytest.mark.parametrize(
    ("kind", "usable"), [("roberta", 18), ("mpnet", 18), ("camembert", 15), ("bert", 20), ("gpt2", 20)]
)
def test_the_context_is_what_the_model_can_read(kind: str, usable: int) -> None:
    """RoBERTa has 514 positions, of which 512 can be used."""
    loaded = Loaded.of(roberta_like(kind), tokenizer_like("gemma"))
    assert loaded.context == usable
    with torch.no_grad():
        loaded.model(torch.full((1, usable), 7))
        with pytest.raises((IndexError, RuntimeError)):
            loaded.model(torch.full((1, usable + 1), 7))
    with pytest.raises(TextError, match=f"has {usable + 1} tokens, and the model reads at most {usable}"):
        tokenize("a" * (usable + 1), loaded.tokenizer, limit=loaded.context)


def bracketing() -> PreTrainedTokenizerFast:
    """A tokenizer of letters that puts <s> in front of a text and </s> behind it."""
    inner = tokenizer_like("gemma").backend_tokenizer
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("start", "alone", "bracketed"),
    [
        ("auto", ("a",), ("<s>", "a", "</s>")),
        (None, ("a",), ("a", "</s>")),
        (1, ("<s>", "a"), ("<s>", "a", "</s>")),
        (2, ("</s>", "a"), ("</s>", "a", "</s>")),
    ],
)
def test_the_start_token_is_the_one_that_was_chosen(start: Any, alone: Any, bracketed: Any) -> None:
    """TransformerLens#385: other tools begin a text in other ways, and the answers differ."""
    for tokenizer, pieces in ((tokenizer_like("gemma"), alone), (bracketing(), bracketed)):
        tokens = tokenize("a", tokenizer, start_token_id=start)
        assert tokens.pieces == pieces
        assert [piece for piece, special in zip(tokens.pieces, tokens.special, strict=True) if not special] == ["a"]
        if start != "auto":
            loaded = Loaded("none", None, tokenizer, start, None, True, "a test")
            (piece,) = corpus.cut(loaded, corpus.Document("text", lambda: "aa"), 0)
            assert piece.ids == tokenize("aa", tokenizer, start_token_id=start).ids


def test_load_takes_a_start_token(tmp_path: Path, tiny_decoder: Loaded) -> None:
    tiny_decoder.model.save_pretrained(tmp_path)
    tiny_decoder.tokenizer.save_pretrained(tmp_path)
    for written, wanted in (("auto", 0), (None, None), ("none", None), (5, 5), ("5", 5), ("<s>", 0), ("a", 2)):
        assert models.load(tmp_path, start_token=written).start_token_id == wanted
    for wrong, message in (
        (-1, "There is no token -1"),
        ("999", "ids of this model are 0 to"),
        ("owl", "'owl' is no token"),
    ):
        with pytest.raises(TextError, match=message):
            models.load(tmp_path, start_token=wrong)


def test_load_shows_the_tokenizer_before_it_reads_the_weights(
    tmp_path: Path, tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_decoder.model.save_pretrained(tmp_path)
    tiny_decoder.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "_read_weights", lambda *parts: pytest.fail("the weights were read"))

    def refuse(tokenizer: Any, start_token_id: int | None, context: int | None) -> None:
        raise TextError(f"{start_token_id} {context} {len(tokenizer)}")

    with pytest.raises(TextError, match=rf"0 2048 {len(tiny_decoder.tokenizer)}"):
        models.load(tmp_path, on_tokenizer=refuse)


def plain_weights(loaded: Loaded, tokens: Tokens, layer: int) -> Any:
    """The weights [H, L, L] of a layer as eager attention gives them."""
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([tokens.ids]), output_attentions=True).attentions[layer][0].double()


@pytest.mark.parametrize(("source", "target"), [("sat on it", "red owl"), ("on it", "owl"), ("it", "The  red")])
def test_a_phrase_is_a_span_of_tokens(source: str, target: str, tiny_model: Loaded) -> None:
    text = "The red owl sat on it"
    answer = json.loads(command("see", text, "--from", source, "--to", target, "--json", "--top", "12").stdout)
    assert len(answer["links"]) == 12
    tokens = tokenize(text, tiny_model.tokenizer, start_token_id=0)
    spans = {}
    for end, phrase in (("from", source), ("to", target)):
        first = text.index(" ".join(phrase.split()))
        last = first + len(" ".join(phrase.split()))
        spans[end] = [i for i in range(first + 1, last + 1) if text[i - 1] != " "]  # letters; token 0 is the start
        assert tokens.find(phrase).tokens == tuple(spans[end])
    for link in answer["links"]:
        assert (link["from"]["text"], link["to"]["text"]) == (source, " ".join(target.split()))
        weights = plain_weights(tiny_model, tokens, link["layer"])[link["head"]]
        wanted = weights[spans["from"]][:, spans["to"]].sum(1).mean()
        assert link["weight"] == pytest.approx(float(wanted), abs=2e-5)


def test_a_phrase_in_a_long_text_has_the_weights_of_a_short_one(
    tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenize("The red owl sat on it, and on it", tiny_decoder.tokenizer, start_token_id=0)
    tokens = tokens.joined(["red owl", "on it"])
    recording = record_text(tiny_decoder, tokens)

    def weights(**options: Any) -> dict[tuple[int, int, int, int], float]:
        found = find_links(recording, tokens, top=12, **options).links
        return {(link.layer, link.head, link.source.start, link.target.start): link.weight for link in found}

    owl, on_it = tokens.find("red owl"), tokens.find("on it")
    short = weights(sources=[on_it]), weights(target=owl), weights(sources=[on_it], target=owl)
    monkeypatch.setattr(links, "FEW_WORDS", 3)
    long = weights(sources=[on_it]), weights(target=owl), weights(sources=[on_it], target=owl)
    assert len(short[0]) > 12
    for one, other in zip(short, long, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_run_of_chinese_characters_is_a_span(tiny_decoder: Loaded) -> None:
    tokens = tokenize("我把苹果给了她,苹果", tiny_decoder.tokenizer)
    assert tokens.find("苹果").tokens == (8, 9)
    assert tokens.find("苹果#1").tokens == (2, 3)
    assert [word.text for word in tokens.joined(["苹果"]).words] == ["我", "把", "苹果", "给", "了", "她", ",", "苹果"]


def test_find_links_refuses_a_phrase_that_is_not_joined(tiny_decoder: Loaded) -> None:
    tokens = tokenize("The red owl sat", tiny_decoder.tokenizer, start_token_id=0)
    recording = record_text(tiny_decoder, tokens)
    with pytest.raises(ValueError, match=r"pass tokens.joined\(\['red owl'\]\)"):
        find_links(recording, tokens, [tokens.find("sat")], target=tokens.find("red owl"))


def test_words_that_the_model_cannot_read_are_shown_as_it_reads_them(tiny_model: Loaded) -> None:
    """MiniLM reads 我把苹果给了她 as [UNK] six times, and seven other characters give the same maps."""
    done = command("see", "我把 owl 给他", "--from", "他", "--to", "把")
    table = done.stdout[: done.stdout.index("How to read it")]
    assert "把" not in table
    assert "Which heads link ?#4 to ?#2" in " ".join(table.split())
    assert table.index("of this text's tokens are unknown to the model") < table.index("share")
    answer = json.loads(command("see", "我把 owl 给他", "--json").stdout)
    assert [token["piece"] for token in answer["tokens"]][:3] == ["<s>", "?", "?"]


def test_of_a_word_that_is_there_twice_the_last_is_taken_and_said(tiny_model: Loaded) -> None:
    text = "It saw it and it ran"
    done = command("see", text, "--from", "it", "--to", "saw")
    assert "'it' is in the text 2 times" in " ".join(done.stdout.split())
    assert "The last one is taken" in " ".join(done.stdout.split())
    answer = json.loads(command("see", text, "--from", "it", "--to", "saw", "--json").stdout)
    assert {link["from"]["name"] for link in answer["links"]} == {"it#2"}
    assert "'it' is in the text 2 times" in answer["notes"][0]
    answer = json.loads(command("forbid", text, "--from", "it", "--to", "saw", "--json").stdout)
    assert answer["from"] == "it#2"
    assert "'it' is in the text 2 times" in answer["notes"][0]


def test_words_are_looked_for_before_the_weights_are_read(
    tmp_path: Path, tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_decoder.model.save_pretrained(tmp_path)
    tiny_decoder.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "_read_weights", lambda *parts: pytest.fail("the weights were read"))
    for words, message in (
        (("see", "a cat", "--from", "dog"), "'dog' is not a word of the text"),
        (("see", "a cat", "--to", "ca"), "'ca' is only a part of the word 'cat'"),
        (("forbid", "a cat", "--from", "cat", "--to", "a#2"), "There is no occurrence 2"),
        (("see", "a cat", "--start-token", "owl"), "'owl' is no token of this model"),
        (("see", "a" * 3000), "has 3001 tokens, and the model reads at most 2048"),
    ):
        done = command(*words, "--model", str(tmp_path))
        assert done.exit_code == 1
        assert message in done.stderr


@pytest.mark.parametrize(
    ("start", "heading", "ids"),
    [("auto", "start token <s> (0)", [0, 2]), ("none", "no start token", [2]), ("3", "start token b (3)", [3, 2])],
)
def test_the_heading_says_which_start_token_it_was(
    start: str, heading: str, ids: list[int], tmp_path: Path, tiny_decoder: Loaded
) -> None:
    tiny_decoder.model.save_pretrained(tmp_path)
    tiny_decoder.tokenizer.save_pretrained(tmp_path)
    options = ("--model", str(tmp_path), "--start-token", start)
    assert f"; {heading}." in " ".join(command("see", "a b", *options).stdout.split())
    answer = json.loads(command("see", "a b", *options, "--json").stdout)
    assert [token["id"] for token in answer["tokens"]][: len(ids)] == ids
    link = ("--from", "b", "--to", "a")
    assert f"; {heading}:" in " ".join(command("forbid", "a b", *link, *options).stdout.split())
    assert f"--start-token {start}" in command("see", "a b", *options).stdout or start == "auto"


def conllu(*forms: str, before: str = "") -> str:
    """A sentence whose words all depend on the first."""
    rows = [
        f"{i}\t{form}\t_\tX\t_\t_\t{int(i > 1)}\t{'dep' if i > 1 else 'root'}\t_\t_" for i, form in enumerate(forms, 1)
    ]
    return before + "\n".join(rows) + "\n\n"


@pytest.mark.parametrize("sentence", [("_",) * 4, ("___", "__", "_"), ("_", "_", "."), ("_", "_", "…", "_")])
def test_a_treebank_without_its_text_is_refused(sentence: tuple[str, ...], tmp_path: Path) -> None:
    """UD_English-ESL and others are published with _ in place of each word."""
    path = tmp_path / "en_esl-ud-dev.conllu"
    path.write_text(conllu(*sentence, before="# sent_id = 1\n") + conllu(*sentence) + conllu("_"))
    with pytest.raises(
        TreebankError, match=r"without the text of 2 sentences, the first in line 2.* Merge the text in"
    ):
        read_conllu(path)
    notes: list[str] = []
    path.write_text(conllu("Red", "owl") + conllu(*sentence) + conllu("a", "_", "b") + conllu("______"))
    examples = read_conllu(path, on_note=notes.append)
    assert [example.text for example in examples] == ["Red owl", "a _ b", "______"]  # a line, as in UD_English-EWT
    assert [(pair.source, pair.target) for pair in examples[1].pairs] == [(2, 0)]
    assert len(notes) == 1
    assert "the text of 1 sentences, the first in line 4" in notes[0]


@pytest.mark.parametrize("ending", ["\n", "\n\n", "\r\n"])
def test_the_ten_standard_columns_are_plain_conllu(ending: str, tmp_path: Path) -> None:
    """UD_French-GSD and UD_French-Sequoia name the standard columns in their first line."""
    path = tmp_path / "fr_gsd-ud-dev.conllu"
    names = "ID FORM LEMMA UPOS XPOS FEATS HEAD DEPREL DEPS MISC"
    path.write_text(conllu("Le", "chat"), newline="")
    wanted = [(example.text, example.pairs, example.language) for example in read_conllu(path)]
    path.write_text(f"# global.columns = {names}{ending}# sent_id = a{ending}" + conllu("Le", "chat"), newline="")
    assert [(example.text, example.pairs, example.language) for example in read_conllu(path)] == wanted
    for other in (f"{names} PARSEME:MWE", names.replace("HEAD DEPREL", "DEPREL HEAD"), "ID FORM"):
        path.write_text(f"# global.columns = {other}\n" + conllu("Le", "chat"))
        with pytest.raises(TreebankError, match=":1: this is CoNLL-U Plus, whose columns differ"):
            read_conllu(path)


def test_an_atlas_says_its_start_token_and_is_merged_with_its_like_only(
    tmp_path: Path, tiny_decoder: Loaded, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(length=16, repeats=0, worth=0)
    none = profile(replace(tiny_decoder, start_token_id=None), texts=["The owl sat still."], plan=plan)
    own = profile(tiny_decoder, texts=["Waves came in, one by one."], plan=plan)
    with pytest.raises(AtlasError, match="different start tokens cannot be merged"):
        none.merge(own)
    saved = none.save(tmp_path / "none.parquet")
    assert "; no start token." in " ".join(command("heads", "--atlas", str(saved)).stdout.split())
    shown = command("heads", "--atlas", str(saved), "--start-token", "0")
    assert "--start-token would measure" in shown.stderr
    started: list[int | None] = []

    def measured(loaded: Loaded, **options: Any) -> HeadAtlas:
        started.append(loaded.start_token_id)
        return own

    monkeypatch.setattr(heads, "profile", measured)
    for written in ("none", "<s>", "4"):
        done = command("heads", "--model", str(tiny_folder / "tiny"), "--start-token", written)
        assert "; start token <s> (0)." in " ".join(done.stdout.split())
    assert started == [None, 0, 4]


def test_line_end_of_the_last_line_is_no_part_of_the_text(tmp_path: Path) -> None:
    """`echo … | headscope forbid` asked what comes after the line end, and said that the link hardly mattered."""
    for data in (b"a cup\r\nwas", b"a cup\nwas\n", b"a cup\r\nwas\r\n", b"\xef\xbb\xbfa cup\rwas\r"):
        path = tmp_path / "text"
        path.write_bytes(data)
        assert read_text(path) == "a cup\nwas"
    assert decode_text(b"was\n\n", "a pipe") == "was\n"
