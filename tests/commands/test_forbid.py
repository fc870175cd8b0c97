"""The command `headscope forbid`, on a small random model; its refusals, on the real ones."""

import json

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from headscope import edit, knock_out, models
from headscope.commands import forbid
from tests import tiny
from tests.commands.runner import command


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> models.Loaded:
    """A random decoder with 2 layers of 6 heads that knows the words of the text, in place of every model."""
    known = {word: i + 1 for i, word in enumerate(dict.fromkeys(forbid.DEFAULT_TEXT.split()))}
    inner = Tokenizer(token_models.WordLevel({"<s>": 0} | known, "<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<s>")
    loaded = models.Loaded("small", tiny.llama(), tokenizer, 0, None, True, "a test")
    monkeypatch.setattr(models, "load", lambda name, **options: loaded)
    return loaded


def test_forbid_says_what_the_link_does_to_the_next_token(small: models.Loaded) -> None:
    answer = json.loads(command("forbid", "--json").stdout)
    words = ["<s>", *forbid.DEFAULT_TEXT.split()]
    ids = torch.tensor([small.tokenizer.convert_tokens_to_ids(words)])
    with torch.no_grad():
        clean = small.model(ids).logits[0, -1].double().log_softmax(-1)
        with edit(small.model, knock_out(words.index("it"), words.index("animal"))):
            edited = small.model(ids).logits[0, -1].double().log_softmax(-1)
    assert answer["kl"]["everywhere"] == pytest.approx(float((clean.exp() * (clean - edited)).sum()), rel=1e-3)
    assert answer["kl"]["everywhere"] > 1e-4
    for token in answer["next"]:
        assert token["with"] == pytest.approx(float(clean[token["id"]].exp()), rel=1e-3)
        assert token["without"] == pytest.approx(float(edited[token["id"]].exp()), rel=1e-3)


def test_forbid_lists_the_layers_and_heads_that_matter_most(small: models.Loaded) -> None:
    answer = json.loads(command("forbid", "--json").stdout)
    heads, layers = answer["kl"]["heads"], answer["kl"]["layers"]
    assert [len(row) for row in heads] == [6, 6]
    strongest = max(range(12), key=lambda i: heads[i // 6][i % 6])
    table = command("knock-out").stdout
    assert f"alone, strongest first: {layers.index(max(layers))} " in table
    assert f"alone, strongest first: {strongest // 6}.{strongest % 6} " in table


@pytest.mark.usefixtures("loaded_models")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "animal", "--to", "it"), "'it' comes after 'animal'"),
        (("--from", "dog"), "dog"),
        (("--model", "minilm"), "no logits"),
        (("",), "blank"),
    ],
)
def test_forbid_refuses_a_link_that_the_model_cannot_have(words: tuple[str, ...], message: str) -> None:
    done = command("forbid", *words)
    assert done.exit_code == 1
    assert message in " ".join(done.stderr.split())
