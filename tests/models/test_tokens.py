"""Tokens and the words they make up."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from headscope.errors import TextError
from headscope.models.tokens import Word, tokenize

SENTENCE = "The animal didn't cross the street because it was too tired."
BYTES = sorted(pre.ByteLevel.alphabet())


def byte_level(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, and of the given merges of them."""
    vocabulary = ["<|end|>", *BYTES, *(a + b for a, b in merges)]
    inner = Tokenizer(token_models.BPE({piece: i for i, piece in enumerate(vocabulary)}, list(merges)))
    inner.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def whole(*pieces: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the given pieces, which are set apart by spaces only."""
    inner = Tokenizer(token_models.WordLevel({p: i for i, p in enumerate(["?", *pieces])}, unk_token="?"))
    inner.pre_tokenizer = pre.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def words_of(text: str) -> list[str]:
    return [word.text for word in tokenize(text, byte_level()).words]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SENTENCE, [*SENTENCE[:-1].split(), "."]),
        ("a well-known, state-of-the-art x_1", ["a", "well-known", ",", "state-of-the-art", "x_1"]),
        (
            "'Tis 3.14 or 1,000. No--2",
            ["'", "Tis", "3.14", "or", "1,000", ".", "No", "-", "-", "2"],
        ),
        ("因为他很好，3个。", ["因", "为", "他", "很", "好", "，", "3", "个", "。"]),
        ("私はラーメンが", ["私", "は", "ラ", "ー", "メ", "ン", "が"]),
        ("か\u3099 ﾊﾞ 𠮷", ["か\u3099", "ﾊﾞ", "𠮷"]),
        ("나는 학교에", ["나는", "학교에"]),
        ("👩‍👩‍👧🇩🇪🇫🇷 👍🏽a❤️", ["👩‍👩‍👧", "🇩🇪", "🇫🇷", "👍🏽", "a", "❤️"]),
        ("🏳️‍🌈x1️⃣2️⃣", ["🏳️‍🌈", "x", "1️⃣", "2️⃣"]),
        ("🏴\U000e0067\U000e0062\U000e007f!", ["🏴\U000e0067\U000e0062\U000e007f", "!"]),
        ("cafe\u0301 n\u0303o", ["cafe\u0301", "n\u0303o"]),
        ("שָׁלוֹם, עולם! صה״ל", ["שָׁלוֹם", ",", "עולם", "!", "صה״ל"]),
        ("مرحبا بالعالم؟", ["مرحبا", "بالعالم", "؟"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("\ufeffHi\u200f \u200b\n\n\ty", ["Hi", "y"]),
        ("\u0301 x", ["\u0301", "x"]),
    ],
)
def test_tokenize_groups_tokens_into_the_words_that_people_read(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_tokenize_joins_the_bytes_of_a_character_in_one_word() -> None:
    tokens = tokenize("a 她", byte_level())
    assert tokens.pieces == ("a", " ", "她(1/3)", "她(2/3)", "她(3/3)")
    assert [word.tokens for word in tokens.words] == [(0,), (2, 3, 4)]
    assert tokens.word_ids() == [0, -1, 1, 1, 1]


def test_tokenize_joins_the_words_of_one_token() -> None:
    tokens = tokenize("他 因为他 (x), 好", whole("他", "因为他", "(x),", "好"))
    assert [(w.text, w.tokens) for w in tokens.words] == [
        ("他", (0,)),
        ("因为他", (1,)),
        ("(x),", (2,)),
        ("好", (3,)),
    ]


def test_tokenize_joins_a_word_that_a_token_of_the_word_before_enters() -> None:
    tokens = tokenize("a,bc", byte_level((",", "b")))
    assert [(w.text, w.tokens) for w in tokens.words] == [("a", (0,)), (",bc", (1, 2))]


def test_tokenize_adds_the_start_token_once_and_not_as_a_word() -> None:
    tokens = tokenize("a", byte_level(), start_token_id=0)
    assert tokens.ids[0] == 0
    assert tokens.special == (True, False)
    assert tokens.offsets == ((0, 0), (0, 1))
    assert tokens.pieces == ("<|end|>", "a")
    assert tokens.word_ids() == [-1, 0]
    written = tokenize("<|end|>a", byte_level(), start_token_id=0)
    assert written.ids == tokens.ids
    assert written.special == (True, False)
    assert [word.text for word in written.words] == ["a"]


def test_unknown_share_counts_text_tokens_only() -> None:
    tokens = tokenize("red blue red red", whole("red"), start_token_id=0)
    assert tokens.unknown == (False, False, True, False, False)
    assert tokens.unknown_share == 0.25
    assert tokenize("red", whole("red")).unknown_share == 0.0


def test_find_prefers_an_exact_match_and_takes_numbers() -> None:
    tokens = tokenize("It was it, as It is, Café.", byte_level())
    assert tokens.find("it").start == 7
    assert tokens.find("WAS").text == "was"
    assert tokens.find("cafe\u0301").text == "Café"
    assert tokens.find("It#2").start == tokens.find("It").start == 14
    assert tokens.find("It#1").start == 0
    assert tokens.find("as#1").text == "as"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("it#3", "There is no occurrence 3 of 'it': it is in the text once, it#1 in 'It was [it], "
         "as It is'."),
        ("It#0", "There is no occurrence 0 of 'It'"),
        ("wass", "'wass' is not a word of the text. Did you mean 'was' or 'as'? Its words are: It "
         "was it , as is"),
        ("dog#2", "'dog' is not a word of the text."),
        ("", "'' is not a word of the text."),
        ("wa", "'wa' is only a part of the word 'was' here. Ask for that."),
        ("as it,", "'as it,' begins or ends inside a word here: was, it, ,. Ask for whole words."),
    ],
)  # fmt: skip
def test_find_names_the_words_that_are_there(word: str, message: str) -> None:
    tokens = tokenize("It was it, as It is", byte_level())
    with pytest.raises(TextError) as caught:
        tokens.find(word)
    assert message in str(caught.value)


def test_find_says_that_it_takes_the_last_of_several() -> None:
    notes: list[str] = []
    tokens = tokenize("It was it, as It is", byte_level())
    assert tokens.find("It", on_note=notes.append).start == 14
    assert notes == [
        "'It' is in the text 2 times: It#1 in '[It] was it, as It is', It#2 in 'It was it, as [It] is'. "
        "The last one is taken; write 'It#1' for the first, and 'It#2' to be sure of this one."
    ]
    assert tokens.find("was", on_note=notes.append).start == 3
    assert tokens.find("It#1", on_note=notes.append).start == 0
    assert len(notes) == 1


def test_find_takes_a_phrase_as_one_word_with_its_tokens() -> None:
    tokens = tokenize("It was\n it, as it was", whole("It", "was", "it,", "as", "it"))
    assert tokens.find("it, as") == Word("it, as", 8, 14, (2, 3))
    assert tokens.find("It  was#1") == Word("It was".replace(" ", "\n", 0), 0, 6, (0, 1))
    assert tokens.find("was it,") == Word("was\n it,", 3, 11, (1, 2))
    assert tokens.find("AS It was").tokens == (3, 4, 5)


def test_joined_makes_one_word_of_a_phrase_wherever_it_is() -> None:
    tokens = tokenize("the cat saw the cat", whole("the", "cat", "saw")).joined(["the cat", "saw"])
    assert [(word.text, word.tokens) for word in tokens.words] == [
        ("the cat", (0, 1)),
        ("saw", (2,)),
        ("the cat", (3, 4)),
    ]
    assert tokens.word_ids() == [0, 0, 1, 2, 2]
    assert tokens.find("the cat#1").start == 0
    assert tokens.joined(["saw", "no such"]) == tokens
    with pytest.raises(TextError, match="'cat saw' and 'saw the' share a word here"):
        tokenize("the cat saw the cat", whole("the", "cat", "saw")).joined(["saw the", "cat saw"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The text is blank: ''. Give at least one word."),
        (" \n\u3000", "The text is blank"),
        ("ab\ud83d!", "The text: character 2 is half a character (the surrogate U+D83D alone)"),
        ("caf\udce9", "character 3 is the byte 0xE9, which was read in another encoding than its own"),
        ("\u200b", "The tokenizer keeps nothing of the text"),
    ],
)
def test_tokenize_refuses_text_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(TextError) as caught:
        tokenize(text, byte_level())
    assert message in str(caught.value)


def test_tokenize_counts_the_start_token_in_the_limit() -> None:
    assert len(tokenize("abcd", byte_level(), start_token_id=0, limit=5)) == 5
    with pytest.raises(TextError, match="has 6 tokens, and the model reads at most 5"):
        tokenize("abcde", byte_level(), start_token_id=0, limit=5)


def test_tokenize_refuses_a_tokenizer_without_offsets() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TextError, match="Slow gives no character offsets"):
        tokenize("a", Slow())


JOINING = byte_level(("a", ","), (",", "b"))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_tokenize_puts_each_visible_token_in_exactly_one_word(text: str) -> None:
    text = "a" + text.replace("<|end|>", "")
    tokens = tokenize(text, JOINING)
    seen = [token for word in tokens.words for token in word.tokens]
    assert len(seen) == len(set(seen))
    for token, (start, end) in enumerate(tokens.offsets):
        if any(character.isprintable() and character != " " for character in text[start:end]):
            assert token in seen
    for word in tokens.words:
        assert word.text == text[word.start : word.end]
        assert all(word.start < tokens.offsets[t][1] for t in word.tokens)
    for one, other in zip(tokens.words, tokens.words[1:], strict=False):
        assert one.end <= other.start


def test_tokenize_cuts_text_as_smollm2_was_trained(smollm2) -> None:
    tokens = tokenize(SENTENCE, smollm2.tokenizer, start_token_id=smollm2.start_token_id)
    assert tokens.pieces[:5] == ("<|endoftext|>", "The", " animal", " didn", "'t")
    assert tokens.find("didn't").tokens == (3, 4)
    assert tokens.unknown_share == 0.0
    spaced = tokenize("a  1 12", smollm2.tokenizer)
    assert spaced.pieces == ("a", "  ", "1", " ", "1", "2")
    chinese = tokenize("因为她", smollm2.tokenizer)
    assert [word.text for word in chinese.words] == ["因", "为", "她"]
    turn = tokenize("<|im_start|>user\nHi<|im_end|>", smollm2.tokenizer)
    assert [word.text for word in turn.words] == ["user", "Hi"]


def test_tokenize_marks_the_special_tokens_of_minilm(minilm) -> None:
    tokens = tokenize(SENTENCE, minilm.tokenizer, start_token_id=minilm.start_token_id)
    assert (tokens.pieces[0], tokens.pieces[-1]) == ("[CLS]", "[SEP]")
    assert tokens.special == (True, *[False] * (len(tokens) - 2), True)
    assert tokens.find("didn't").tokens == (3, 4, 5)
    unread = tokenize("it ☃☃ 𓂀", minilm.tokenizer)
    assert unread.unknown_share == pytest.approx(2 / 3)
    assert unread.special == (True, False, False, False, True)
    with pytest.raises(TextError, match="602 tokens, and the model reads at most 512"):
        tokenize("it " * 600, minilm.tokenizer, limit=minilm.context)
    assert len(tokenize("it " * 400, minilm.tokenizer, limit=minilm.context)) == 402


def test_tokenize_takes_less_than_two_seconds_more_than_the_tokenizer_for_100_000_words() -> None:
    tokenizer, text = whole("red", "blue"), "red blue " * 50_000
    began = time.process_time()
    tokenizer(text, return_offsets_mapping=True)
    tokenizer_seconds = time.process_time() - began
    began = time.process_time()
    tokens = tokenize(text, tokenizer)
    assert time.process_time() - began - tokenizer_seconds < 2.0
    assert len(tokens.words) == 100_000
