"""profile() from end to end on tiny models: what is in an atlas, and what its notes say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from headscope.heads import corpus
from headscope.heads.atlas import profiler
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.measuring import measure
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.corpus import Document
from headscope.heads.measures import standard
from headscope.heads.relations import Example, Pair, chinese_sentences
from headscope.heads.relations.sentences.treebank import read_conllu
from headscope.models.loading import Loaded
from tests import tiny
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import PLAN, TEXTS, assert_same_atlas, documents, few_sentences, letter_tokenizer


def test_atlas_has_one_row_per_head_with_every_column(tiny_atlas: HeadAtlas) -> None:
    rows = tiny_atlas.rows()
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in range(2) for head in range(6)]
    wanted = {"entropy", "induction", "relation:coreference", "ablation_zero", "ablation_mean_low", "gradient"}
    assert wanted <= set(rows[0])
    assert all(row[name] is not None for row in rows for name in wanted)
    info = tiny_atlas.info
    assert len(info["model"]["weights"]) == 64
    assert info["columns"]["entropy"] == {
        "about": "−Σ a ln a, mean over rows",
        "unit": "nats",
        "source": "arXiv 1906.04341",
    }
    assert set(info["texts"]) == set(TEXTS)
    assert info["documents"] == {n: i % 2 for i, n in enumerate(TEXTS)} | {f"repeat:0:{i}": i % 2 for i in range(4)}
    assert -1 <= tiny_atlas.agreement() <= 1
    assert tiny_atlas.worth.unit == "nats per token"
    assert repr(tiny_atlas).startswith("HeadAtlas(tiny: 12 heads, ")


def test_measure_of_a_batch_is_that_of_each_text_alone(tiny_decoder: Loaded) -> None:
    pieces = [p for n, d in enumerate(documents()) for p in corpus.cut(tiny_decoder, d, n % 2, length=24)]
    together = measure(tiny_decoder, pieces, standard(), tokens=1 << 20)
    alone = measure(tiny_decoder, pieces, standard(), tokens=1)
    for name in together.sums.values:
        torch.testing.assert_close(together.sums.value(name), alone.sums.value(name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.outputs["sum"], alone.outputs["sum"], atol=1e-4, rtol=1e-4)


def test_measure_halves_the_batch_when_out_of_memory(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.heads.atlas import measuring as profiling

    pieces = [p for d in documents() for p in corpus.cut(tiny_decoder, d, 0, length=24)]
    inner = profiling._measure_batch

    def small(loaded: Any, batch: Any, *args: Any) -> Any:
        if len(batch.pieces) > 3:
            return torch.empty(1 << 60)  # as it fails on a CPU
        return inner(loaded, batch, *args)

    whole = measure(tiny_decoder, pieces, standard())
    monkeypatch.setattr(profiling, "_measure_batch", small)
    halved = measure(tiny_decoder, pieces, standard())
    assert halved.notes == ["Not enough memory for whole batches of texts: smaller ones were used."]
    torch.testing.assert_close(halved.sums.value("entropy"), whole.sums.value("entropy"), atol=1e-6, rtol=1e-6)


def test_profile_of_an_encoder_measures_worth_by_cosine() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=32
    )
    loaded = Loaded("bert", BertModel(config).eval().requires_grad_(False), letter_tokenizer(), 0, 64, False, "a test")
    atlas = profile(loaded, texts=documents(), plan=PLAN)
    assert atlas.worth.unit == "1 - cosine"
    assert "gradient" not in atlas.columns()
    assert float(atlas.value("offset_mass+1").nan_to_num().sum()) > 0  # it sees what comes after
    assert atlas.agreement() != atlas.agreement()


def test_notes_name_collections_with_too_few_documents_for_a_role(tiny_decoder: Loaded) -> None:
    """Five clusters that agree have p = 0.04; four are too few."""
    plan = Plan(length=24, repeats=0, worth=0)
    words = (Pair("before", 2, 1), Pair("twice", 2, 0))
    text = "It was late"
    collections = {
        name: [
            Example(text, ((0, 2), (3, 6), (7, 11)), words, f"{name} {i}", int(i >= 5), "en") for i in range(5 + count)
        ]
        for name, count in (("small", 4), ("large", 5))
    }
    long = Example("word " * 40, ((0, 4), (5, 9), (10, 14)), words, "long", 0, "en")
    atlas = profile(
        tiny_decoder, texts=documents("owl", "sea", "bus", "pie"), relations=collections | {"long": [long]}, plan=plan
    )
    notes = atlas.measurements.notes
    expected = "small has 9 documents (5 to pick heads, 4 to confirm them): too few for roles that come from it, "
    assert expected + "which take 5 of each." in notes
    assert not any(note.startswith("large has") for note in notes)
    unclassed = "gives no parts of speech: a head with a role from it may attend to any word of the right class."
    assert f"large {unclassed}" in notes
    frames = profile(tiny_decoder, texts=documents("owl"), relations=few_sentences(), plan=plan)
    assert not any("parts of speech" in note for note in frames.measurements.notes)
    assert "long: 1 of 1 sentences are longer than the model reads, and were left out." in notes
    assert atlas.info["examples"]["large"]["read"] == atlas.info["examples"]["long"]["too_long"] + 9 == 10
    assert atlas.relations.examples == 19


def test_profile_measures_texts_of_a_shard_a_few_at_a_time(
    tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer tokens in memory the sums are the same."""
    whole = profile(tiny_decoder, texts=documents(), plan=PLAN)
    counts: list[int] = []
    original: Any = vars(profiler)["measure"]

    def counted(loaded: Loaded, pieces: list[Any], *args: Any, **kwargs: Any) -> Any:
        counts.append(len(pieces))
        return original(loaded, pieces, *args, **kwargs)

    monkeypatch.setattr(profiler, "_TOKENS", 1)
    monkeypatch.setattr(profiler, "measure", counted)
    assert_same_atlas(profile(tiny_decoder, texts=documents(), plan=PLAN), whole)
    assert counts == [4, 1, 1, 1, 1, 0, 1, 0]  # the repeats; four texts, and what is left; one text


def test_notes_of_head_effects_are_notes_of_the_atlas(tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    original, notes = vars(profiler)["head_effects"], ("out of memory with 12 heads",)
    monkeypatch.setattr(
        profiler, "head_effects", lambda *args, **kwargs: replace(original(*args, **kwargs), notes=notes)
    )
    atlas = profile(tiny_decoder, texts=documents("owl"), plan=replace(PLAN, repeats=0, worth=1))
    assert atlas.notes.count("What heads are worth: out of memory with 12 heads.") == 1


def test_worth_is_measured_on_texts_spread_over_the_corpus(
    tiny_decoder: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts are spread evenly; the name of a text decides which piece of it is read, in every corpus."""
    read: list[Any] = []
    original = vars(profiler)["head_effects"]
    monkeypatch.setattr(
        profiler, "head_effects", lambda e, ids, **kwargs: read.append(ids) or original(e, ids, **kwargs)
    )
    plan = replace(PLAN, repeats=0, worth=2)
    atlas = profile(tiny_decoder, texts=documents(), plan=plan)
    assert atlas.worth.documents == ["bus", "owl"]  # the first and the third of five
    alone = {name: profile(tiny_decoder, texts=documents(name), plan=plan).worth for name in ("owl", "bus")}
    for row, name in enumerate(atlas.worth.documents):
        torch.testing.assert_close(atlas.worth.values["gradient"][row], alone[name].values["gradient"][0])
    starts = {tuple(ids[0, 1:3].tolist()) for ids in read}
    assert len(starts) == 2
    assert starts != {tuple(tiny_decoder.tokenizer(TEXTS[name])["input_ids"][:2]) for name in ("owl", "bus")}


def test_profile_takes_a_model_with_its_tokenizer(tiny_decoder: Loaded, tiny_atlas: HeadAtlas) -> None:
    model = tiny.llama().requires_grad_(True)
    atlas = profile(model, tiny_decoder.tokenizer, list(TEXTS.values()), plan=replace(PLAN, worth=1))
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert atlas.name == "LlamaForCausalLM"
    assert [name[:7] for name in atlas.info["texts"]] == [f"text {number} " for number in range(1, 6)]
    others = profile(model, tiny_decoder.tokenizer, ["It was late. It was cold."], plan=replace(PLAN, worth=0))
    assert len(atlas.merge(others).info["texts"]) == 6  # both have a first text, and these differ
    for name in ("first", "entropy", "induction"):  # with the start token that the tokenizer declares
        torch.testing.assert_close(atlas.value(name), tiny_atlas.value(name))
    with pytest.raises(ValueError, match="a model without its tokenizer"):
        profile(tiny_decoder.model, texts=list(TEXTS.values()))
    with pytest.raises(ValueError, match="one text where a list of texts is wanted"):
        profile(tiny_decoder, texts=TEXTS["owl"])
    with pytest.raises(ValueError, match=r"in training.*call model.eval\(\) first"):
        profile(tiny.llama().train(), tiny_decoder.tokenizer)


def test_treebanks_of_one_file_name_are_two_collections(tiny_decoder: Loaded, tmp_path: Path) -> None:
    examples = {}
    for tiny_folder, verb in (("en", "slept"), ("de", "sleeps")):
        path = tmp_path / tiny_folder / "dev.conllu"
        path.parent.mkdir()
        rows = ["1\tIt\t_\tPRON\t_\t_\t2\tnsubj\t_\t_", f"2\t{verb}\t_\tVERB\t_\t_\t0\troot\t_\t_", "", ""]
        path.write_text("\n".join(rows))
        examples[str(path)] = read_conllu(path)
    assert (
        profile(
            tiny_decoder, texts=documents("owl"), relations=examples, plan=replace(PLAN, worth=0)
        ).relations.examples
        == 2
    )


def test_notes_name_relations_with_contested_pairs_in_too_few_documents(tiny_decoder: Loaded) -> None:
    """In ten documents a noun is right; there is another one in one document of each half, in five, or in none."""
    plan, names = Plan(length=24, repeats=0, worth=0), ("rare", "common")

    def notes(contested: int) -> list[str]:
        examples = [
            Example(
                "a cat that saw rain fell",
                ((2, 5), (11, 14), (15, 19), (20, 24)),
                (Pair(names[contested >= 5], 3, 0),),
                f"{i}",
                i % 2,
                "en",
                ("noun", "verb", "noun" if i // 2 < contested else "", "verb"),
            )
            for i in range(10)
        ]
        return profile(tiny_decoder, texts=documents("owl"), relations={"nouns": examples}, plan=plan).notes

    rival_notes = [note for note in notes(1) if "right class" in note]
    assert len(rival_notes) == 1
    assert rival_notes[0].startswith("No head can have a role from rare: in fewer than 5 documents")
    assert not any("right class" in note for note in notes(0) + notes(5))


def test_layers_with_different_heads_are_ablated_to_zero_only(tiny_decoder: Loaded) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = tiny.llama()
    narrow = type(model.config)(**model.config.to_dict() | {"num_attention_heads": 4})
    narrow._attn_implementation = "sdpa"
    torch.manual_seed(1)
    model.model.layers[1].self_attn = LlamaAttention(narrow, 1).eval()
    loaded = replace(tiny_decoder, model=model)
    atlas = profile(loaded, texts=documents("owl", "sea"), plan=replace(PLAN, repeats=0, worth=2))
    assert atlas.heads == (6, 4)
    assert set(atlas.worth.values) == {"ablation_zero", "gradient"}
    assert atlas.value("ablation_zero").isfinite().tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert any(note.startswith("Ablation to the mean is left out") for note in atlas.measurements.notes)


def test_notes_name_a_language_that_the_model_does_not_read(tiny_decoder: Loaded) -> None:

    atlas = profile(
        tiny_decoder,
        texts=documents("owl"),
        relations={"Chinese frames": chinese_sentences()},
        plan=Plan(repeats=0, worth=0),
    )
    assert atlas.relations.examples == 0
    expected = "Chinese frames: not profiled, the model does not read it: "
    assert any(note.startswith(expected) for note in atlas.measurements.notes)


def test_profile_of_a_model_that_reads_chinese_counts_chinese_relations() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    known = sorted({character for example in chinese_sentences() for character in example.text})
    inner = Tokenizer(token_models.WordLevel({"<s>": 0, "?": 1} | {c: i + 2 for i, c in enumerate(known)}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", bos_token="<s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny._decoder() | {"vocab_size": len(known) + 2})).eval()
    loaded = Loaded("tiny", model, tokenizer, 0, 64, True, "a test")
    atlas = profile(
        loaded, texts=documents("owl"), relations={"Chinese frames": chinese_sentences()}, plan=Plan(repeats=0, worth=0)
    )
    assert not any("Chinese" in note for note in atlas.measurements.notes)
    assert atlas.relations.examples == len(chinese_sentences())
    assert {row.relation for row in atlas.relation_scores()} == {"coreference-zh", "giver-receiver-zh"}
    assert not any(row.role for row in atlas.relation_scores())  # its weights are random


def test_profile_of_an_encoder_decoder_is_that_of_its_encoder() -> None:
    model = tiny.bart()
    loaded = Loaded("tiny", model, letter_tokenizer(), 0, 64, True, "a test")
    atlas = profile(loaded, texts=documents("owl", "sea"), relations=few_sentences(), plan=PLAN)
    assert atlas.heads == (6, 6)
    assert atlas.relations.examples > 0
    assert bool(atlas.value("norm_first").isfinite().all())
    assert atlas.worth.unit == "1 - cosine"
    assert float(atlas.value("ablation_zero").min()) > 0
    inner = Loaded("tiny", model.get_encoder(), letter_tokenizer(), 0, 64, True, "a test")
    alone = profile(inner, texts=documents("owl", "sea"), relations=few_sentences(), plan=PLAN)
    for column in ("entropy", "norm_first", "ablation_zero"):
        torch.testing.assert_close(atlas.value(column), alone.value(column))


TREEBANK = """# newdoc id = {name}
1\tBig\tbig\tADJ\t_\t_\t2\tamod\t_\t_
2\tbirds\tbird\tNOUN\t_\t_\t3\tnsubj\t_\t_
3\tsee\tsee\tVERB\t_\t_\t0\troot\t_\t_
4\tthe\tthe\tDET\t_\t_\t5\tdet\t_\t_
5\tsea\tsea\tNOUN\t_\t_\t3\tobj\t_\tSpaceAfter=No
6\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_

"""


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_profile_of_a_loaded_folder_with_a_treebank(kind: str, tmp_path: Path) -> None:
    """BERT and GPT-2 from a folder, as in the papers, but small and random."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    from headscope import models

    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    bert = BertConfig(**sizes, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=32)
    gpt2 = GPT2Config(**sizes, n_embd=24, n_layer=2, n_head=6, n_positions=128)
    (BertModel(bert) if kind == "bert" else GPT2LMHeadModel(gpt2)).save_pretrained(tmp_path / kind)
    letter_tokenizer().save_pretrained(tmp_path / kind)
    file = tmp_path / "en_made-up.conllu"
    file.write_text("".join(TREEBANK.format(name=f"doc {n}") for n in range(12)), "utf-8")
    loaded = models.load(tmp_path / kind)
    examples = read_conllu(file)
    assert {example.half for example in examples} == {0, 1}
    atlas = profile(loaded, texts=documents(), relations={"made up": examples}, plan=replace(PLAN, worth=0))
    columns = atlas.columns()
    assert atlas.relations.examples == 12
    assert {"relation:nsubj (reverse)", "relation:obj"} <= set(columns)  # a decoder sees what comes before
    assert ("relation:det" in columns) == (kind == "bert")
    assert columns["norm_sink"].isfinite().all()  # the output projection was found, a Conv1D in GPT-2
    assert columns["induction"].isfinite().all()


def test_notes_say_when_only_the_beginning_of_texts_was_read(tiny_decoder: Loaded) -> None:
    plan = replace(PLAN, repeats=0, worth=0)
    expected = "Of longer texts only the beginning was read, 24 tokens at most; --pieces 0 reads all."
    assert expected in profile(tiny_decoder, texts=documents(), plan=plan).measurements.notes
    assert expected not in profile(tiny_decoder, texts=documents(), plan=replace(plan, pieces=0)).measurements.notes


def test_texts_longer_than_the_context_are_cut_with_a_note(tiny_decoder: Loaded) -> None:
    long = Document("long", lambda: "word " * 200)
    pieces = corpus.cut(tiny_decoder, long, 1, length=4096)
    assert {len(piece.ids) for piece in pieces[:-1]} == {64}
    assert sum(len(piece.ids) - 1 for piece in pieces) == 1000
    assert [piece.offset for piece in pieces[:3]] == [0, 63, 126]
    atlas = profile(tiny_decoder, texts=[long], plan=Plan(length=64, pieces=0, repeats=0, worth=0))
    assert "Texts longer than 64 tokens are read in pieces, each after a start token." in atlas.measurements.notes
