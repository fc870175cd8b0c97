"""Which word looks at which: against a plain float64 computation."""

import pytest
import torch

from headscope import models
from headscope.models.tokens import Tokens, tokenize
from headscope.views import links, words
from headscope.views.links import Head
from headscope.watching.recording import Recording
from headscope.watching.texts import record_text

TEXT = "The animal didn't cross the street because it was too tired."


def tokens_of(text: str, loaded: models.Loaded) -> Tokens:
    return tokenize(text, loaded.tokenizer, start_token_id=loaded.start_token_id, limit=loaded.context)


@pytest.fixture(scope="module")
def tokens(smollm2: models.Loaded) -> Tokens:
    return tokens_of(TEXT, smollm2)


@pytest.fixture(scope="module")
def recording(smollm2: models.Loaded, tokens: Tokens) -> Recording:
    return record_text(smollm2, tokens)


def by_hand(recording: Recording, tokens: Tokens, layer: int, head: int) -> torch.Tensor:
    """Words by words, [W, W + 1] with the special tokens last: softmax in float64, Clark's rule in loops."""
    scores = recording[layer].operands
    query = scores.query[0, head].double()
    key = scores.key[0, head // scores.per_group].double()
    logits = query @ key.T * scores.scale
    logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf)
    weights = logits.softmax(-1)
    special = [i for i, flag in enumerate(tokens.special) if flag]
    groups = [list(word.tokens) for word in tokens.words] + [special]
    rows = [torch.stack([weights[t] for t in word.tokens]).mean(0) for word in tokens.words]
    return torch.stack([torch.stack([row[group].sum() for group in groups]) for row in rows])


@pytest.mark.parametrize("head", [Head(13, 8), Head(3, 4)])
def test_find_links_gives_the_weights_of_a_plain_computation(recording: Recording, tokens: Tokens, head: Head) -> None:
    wanted = by_hand(recording, tokens, head.layer, head.head)
    view = links.find_links(recording, tokens, tokens.words, head=head, top=12)
    index = {word.start: i for i, word in enumerate(tokens.words)}
    assert len(view.links) == 12 * 11 // 2  # a decoder: each word on those before it
    for link in view.links:
        assert link.weight == pytest.approx(wanted[index[link.source.start], index[link.target.start]].item(), abs=1e-5)
    special = torch.stack([part.special[head.layer, head.head] for part in view.unlisted])
    itself = torch.stack([part.itself[head.layer, head.head] for part in view.unlisted])
    torch.testing.assert_close(special.double(), wanted[:, -1], atol=1e-5, rtol=0)
    torch.testing.assert_close(itself.double(), wanted[:, :-1].diagonal(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        words.word_map(recording[head.layer], tokens, head.head)[:, :13].double(), wanted, atol=1e-5, rtol=0
    )


def test_find_links_finds_the_heads_from_it_to_animal(recording: Recording, tokens: Tokens) -> None:
    view = links.find_links(recording, tokens, [tokens.find("it")], target=tokens.find("animal"), causal=True)
    heads = [(link.layer, link.head) for link in view.links]
    assert heads[:2] == [(3, 8), (13, 8)]
    strongest = view.links[0]
    assert (strongest.word_distance, strongest.token_distance) == (-6, -7)  # "didn't" between them is two tokens
    assert [link.weight for link in view.links] == sorted((link.weight for link in view.links), reverse=True)
    assert view.proof is not None
    assert view.proof < 1e-4


def test_find_links_finds_the_strongest_heads_of_a_pair_among_all(recording: Recording, tokens: Tokens) -> None:
    view = links.find_links(recording, tokens, [tokens.find("tired")], target=tokens.find("it"), top=270)
    every = {
        (layer, head): words.word_map(recording[layer], tokens, head)[10, 7].item()
        for layer in (0, 13, 29)
        for head in range(9)
    }
    found = {(link.layer, link.head): link.weight for link in view.links}
    assert len(found) == 270
    assert {key: found[key] for key in every} == pytest.approx(every)
    assert view.heads_above_tenth == sum(link.weight > 0.1 for link in view.links)


def test_find_links_reads_a_long_text_row_by_row_to_the_same_numbers(
    recording: Recording, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [tokens.find("it"), tokens.find("didn't")]  # the second is two tokens
    few = links.find_links(recording, tokens, sources)
    by_target = links.find_links(recording, tokens, target=sources[1])
    monkeypatch.setattr(links, "FEW_WORDS", 3)
    long = links.find_links(recording, tokens, sources)
    assert len(long.links) == len(few.links) > 20
    for one, other in zip(long.links, few.links, strict=True):
        assert (one.layer, one.head, one.source, one.target) == (other.layer, other.head, other.source, other.target)
        assert one.weight == pytest.approx(other.weight, abs=1e-5)
    torch.testing.assert_close(long.unlisted[1].special, few.unlisted[1].special)
    by_column = links.find_links(recording, tokens, target=sources[1])
    assert [(link.source, link.weight) for link in by_column.links] == [
        (link.source, pytest.approx(link.weight, abs=1e-5)) for link in by_target.links
    ]


def test_find_links_notes_that_a_decoder_cannot_look_ahead(recording: Recording, tokens: Tokens) -> None:
    view = links.find_links(recording, tokens, [tokens.find("it")], target=tokens.find("tired"), causal=True)
    assert view.links == ()
    assert view.notes == (
        "'it' gives nothing to 'tired': in a decoder a word can only look back. "
        "Ask the other way round: --from tired --to it",
    )


def test_find_links_lists_a_word_itself_only_as_a_named_target(recording: Recording, tokens: Tokens) -> None:
    it = tokens.find("it")
    view = links.find_links(recording, tokens, [it], target=it, causal=True)
    wanted = max(float(view.unlisted[0].itself[layer, head]) for layer in range(30) for head in range(9))
    assert view.links[0].weight == pytest.approx(wanted)
    assert view.links[0].word_distance == 0
    assert all(link.source != it for link in links.find_links(recording, tokens, target=it).links)


def test_find_links_looks_both_ways_in_an_encoder(minilm: models.Loaded) -> None:
    tokens = tokens_of(TEXT, minilm)
    recording = record_text(minilm, tokens)
    view = links.find_links(recording, tokens, [tokens.find("it")], top=12)
    assert {link.word_distance > 0 for link in view.links} == {True, False}
    assert all(link.source != link.target for link in view.links)
    shares = [link.weight for link in view.links if (link.layer, link.head) == (0, 2)]
    unlisted = view.unlisted[0]
    total = sum(shares) + sum(float(part[0, 2]) for part in (unlisted.special, unlisted.itself, unlisted.blank))
    assert total <= 1 + 1e-5
    assert max(shares) > 0.99  # the head of the word before


def test_find_links_between_chinese_characters_of_several_tokens(smollm2: models.Loaded) -> None:
    tokens = tokens_of("我把苹果给了她，因为她饿了。", smollm2)
    assert max(len(word.tokens) for word in tokens.words) > 1
    view = links.find_links(record_text(smollm2, tokens), tokens, [tokens.find("饿")], top=3)
    assert {link.target.text for link in view.links} <= set("我把苹果给了她，因为")
    assert len(view.links) == 9


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (TEXT, ["it", "tired", "street", "cross"]),
        ("She told him that they left", ["him", "they", "left", "told"]),
        ("To be or not to be", ["or", "not", "to", "be"]),
        ("? !", ["!", "?"]),
        ("我把苹果给了她，因为她饿了。", ["她", "她", "饿", "为"]),
    ],
)
def test_default_words_are_pronouns_then_content_words(smollm2: models.Loaded, text: str, chosen: list[str]) -> None:
    assert [word.text for word in words.default_words(tokens_of(text, smollm2))] == chosen


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("13,8", "'13,8' is not a head. Write layer.head, both counted from 0: 13.8"),
        ("99.0", "There is no layer 99: the model has 30 attention layers, 0 to 29."),
        ("7.9", "There is no head 9: layer 7 has 9 heads, 0 to 8."),
    ],
)
def test_head_of_refuses_a_head_that_the_model_lacks(recording: Recording, written: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        links.head_of(written, recording)
    assert str(error.value) == message


def test_record_text_reports_each_layer(smollm2: models.Loaded, tokens: Tokens) -> None:
    told: list[tuple[int, int]] = []
    record_text(smollm2, tokens, on_progress=lambda done, of: told.append((done, of)))
    assert told == [(i, 30) for i in range(1, 31)]


def test_label_of_a_repeated_word_finds_it_again(smollm2: models.Loaded) -> None:
    tokens = tokens_of("the cat saw the dog", smollm2)
    assert [words.label(tokens, word) for word in tokens.words] == ["the#1", "cat", "saw", "the#2", "dog"]
    assert all(tokens.find(words.label(tokens, word)) == word for word in tokens.words)
