"""An atlas from end to end: tiny models, parts that survive a kill, several processes, files, figures, the command."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from headscope.commands import app as cli
from headscope.commands import heads as heads_command
from headscope.errors import AtlasError, TextError
from headscope.heads import corpus, roles
from headscope.heads.atlas import file as atlas_file
from headscope.heads.atlas import profiler as survey
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.measuring import measure
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.corpus import Document
from headscope.heads.measures import Ratio, standard
from headscope.heads.measures.sums import MeasureSums
from headscope.heads.relations import Example, Pair, english_sentences
from headscope.heads.relations.sentences.treebank import read_conllu
from headscope.models.loading import Loaded
from headscope.views.figures import atlas as atlas_figures
from tests import tiny
from tests.options import one_thread  # noqa: F401  (for the whole module)

PLAN = Plan(length=24, repeats=4, period=7, worth=3, worth_tokens=9)
TEXTS = {
    "owl": "The owl sat still. It was old, and it was grey; nobody knew how old it was.",
    "sea": "Waves came in, one by one, and the sand was wet. A boat lay there, red and small.",
    "bus": "The bus was late again. People stood in the rain and said nothing at all.",
    "pie": "She made a pie. He ate it. Then both of them washed the plates and went out.",
    "cat": "A cat knows where it is warm. It goes there, lies down and sleeps.",
}


def letters() -> Any:
    """A tokenizer that cuts words into letters, with spaces and line ends as tokens of their own."""
    known = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,;- \n"
    inner = Tokenizer(token_models.WordLevel({"<s>": 0, "?": 1} | {c: i + 2 for i, c in enumerate(known)}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", bos_token="<s>")


def words() -> Any:
    """A tokenizer of whole words: those of the texts above, and of the English sentences with known relations."""
    split = pre_tokenizers.Whitespace()
    texts = [*TEXTS.values(), *(example.text for example in english_sentences())]
    known = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    inner = Tokenizer(token_models.WordLevel({"<s>": 0, "?": 1} | {word: i + 2 for i, word in enumerate(known)}, "?"))
    inner.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", bos_token="<s>")


@pytest.fixture(scope="module")
def decoder() -> Loaded:
    return Loaded("tiny", tiny.llama(), letters(), 0, 64, True, "a test")


def documents(*names: str) -> list[Document]:
    return [Document(name, lambda name=name: TEXTS[name]) for name in names or TEXTS]


def few() -> dict[str, list[Example]]:
    """Some sentences of both halves."""
    given = [example for example in english_sentences() if any(p.relation == "coreference" for p in example.pairs)]
    return {"some": [*[e for e in given if e.half == 0][:5], *[e for e in given if e.half == 1][:5]]}


@pytest.fixture(scope="module")
def atlas(decoder: Loaded) -> HeadAtlas:
    return profile(decoder, texts=documents(), relations=few(), plan=PLAN)


def same(left: HeadAtlas, right: HeadAtlas, tolerance: float = 1e-6) -> None:
    ours, theirs = left.columns(), right.columns()
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance, equal_nan=True)
    assert left.roles() == right.roles()
    assert left.info["documents"] == right.info["documents"]


def test_one_row_a_head_and_everything_in_it(atlas: HeadAtlas) -> None:
    rows = atlas.rows()
    assert [(row["layer"], row["head"]) for row in rows] == [(layer, head) for layer in range(2) for head in range(6)]
    wanted = {"entropy", "induction", "relation:coreference", "ablation_zero", "ablation_mean_low", "gradient"}
    assert wanted <= set(rows[0])
    assert all(row[name] is not None for row in rows for name in wanted)
    info = atlas.info
    assert len(info["model"]["weights"]) == 64
    assert info["columns"]["entropy"] == {
        "about": "−Σ a ln a, mean over rows",
        "unit": "nats",
        "source": "arXiv 1906.04341",
    }
    assert set(info["texts"]) == set(TEXTS)
    assert info["documents"] == {n: i % 2 for i, n in enumerate(TEXTS)} | {f"repeat:0:{i}": i % 2 for i in range(4)}
    assert -1 <= atlas.agreement() <= 1
    assert atlas.worth.unit == "nats per token"
    assert repr(atlas).startswith("HeadAtlas(tiny: 12 heads, ")


def test_many_texts_at_once_give_what_each_gives_alone(decoder: Loaded) -> None:
    pieces = [p for n, d in enumerate(documents()) for p in corpus.cut(decoder, d, n % 2, length=24)]
    together = measure(decoder, pieces, standard(), tokens=1 << 20)
    alone = measure(decoder, pieces, standard(), tokens=1)
    for name in together.sums.values:
        torch.testing.assert_close(together.sums.value(name), alone.sums.value(name), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.outputs["sum"], alone.outputs["sum"], atol=1e-4, rtol=1e-4)


def test_out_of_memory_means_smaller_batches(decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.heads.atlas import measuring as profiling

    pieces = [p for d in documents() for p in corpus.cut(decoder, d, 0, length=24)]
    inner = profiling._measure_batch

    def small(loaded: Any, batch: Any, *rest: Any) -> Any:
        if len(batch.pieces) > 3:
            return torch.empty(1 << 60)  # as it fails on a CPU
        return inner(loaded, batch, *rest)

    wanted = measure(decoder, pieces, standard())
    monkeypatch.setattr(profiling, "_measure_batch", small)
    found = measure(decoder, pieces, standard())
    assert found.notes == ["Not enough memory for whole batches of texts: smaller ones were used."]
    torch.testing.assert_close(found.sums.value("entropy"), wanted.sums.value("entropy"), atol=1e-6, rtol=1e-6)


def test_an_encoder_is_measured_without_a_loss() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=32
    )
    loaded = Loaded("bert", BertModel(config).eval().requires_grad_(False), letters(), 0, 64, False, "a test")
    found = profile(loaded, texts=documents(), plan=PLAN)
    assert found.worth.unit == "1 - cosine"
    assert "gradient" not in found.columns()
    assert float(found.value("offset_mass+1").nan_to_num().sum()) > 0  # it sees what comes after
    assert found.agreement() != found.agreement()


def test_finished_parts_are_not_done_again(decoder: Loaded, atlas: HeadAtlas, tmp_path: Path) -> None:
    told: list[str] = []
    parts = tmp_path / "parts"
    same(
        profile(
            decoder,
            texts=documents(),
            relations=few(),
            plan=PLAN,
            shards=parts,
            on_progress=lambda d, o, w: told.append(w),
        ),
        atlas,
    )
    assert told == ["relations", "repeats", "texts", "texts", "worth", "worth", "worth"]
    times = {path.name: path.stat().st_mtime_ns for path in parts.iterdir()}
    (parts / "texts-00000004.safetensors").unlink()
    same(profile(decoder, texts=documents(), relations=few(), plan=PLAN, shards=parts), atlas)
    changed = {path.name for path in parts.iterdir() if times[path.name] != path.stat().st_mtime_ns}
    assert changed == {"texts-00000004.safetensors"}
    with pytest.raises(AtlasError, match="holds finished shards of other work"):
        profile(decoder, texts=documents("owl"), relations=few(), plan=PLAN, shards=parts)
    (parts / "texts-00000000.safetensors").write_bytes(b"cut")
    with pytest.raises(AtlasError, match=r"texts-00000000.safetensors is damaged .*remove it"):
        profile(decoder, texts=documents(), relations=few(), plan=PLAN, shards=parts)


def test_several_processes_need_a_folder(decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(AtlasError, match="3 processes share work through a folder"):
        profile(decoder, texts=documents(), plan=PLAN)


def test_saved_and_loaded_it_is_the_same(atlas: HeadAtlas, tmp_path: Path) -> None:
    path = atlas.save(tmp_path / "heads.parquet")
    again = HeadAtlas.load(path)
    same(again, atlas, 0)
    assert again.info == json.loads(json.dumps(atlas.info))
    plain = pyarrow.parquet.read_table(path)  # any reader of Parquet
    assert polars.read_parquet(path)["roles"].to_list() == plain.column("roles").to_pylist()
    assert plain.num_rows == 12
    assert plain.column("layer").to_pylist() == [0] * 6 + [1] * 6
    assert plain.column("entropy").to_pylist() == pytest.approx(atlas.value("entropy").flatten().tolist())


def test_sums_of_a_large_treebank_are_loaded_again(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)  # 120 MB that cannot be made smaller: more than pyarrow reads unasked
    noise = torch.randint(0, 256, (120 << 20,), generator=random, dtype=torch.uint8)
    path = tmp_path / "large.parquet"
    atlas_file.write(
        path,
        atlas_file.table([{"layer": 0, "head": 0, "roles": ["sink"]}]),
        {"noise": noise},
        {"format": atlas_file.FORMAT},
    )
    tensors, _ = atlas_file.read(path)
    torch.testing.assert_close(tensors["noise"], noise, atol=0, rtol=0)


def test_sums_that_no_file_can_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas_file, "_MOST", 1000)
    shown = atlas_file.table([{"layer": 0, "head": 0, "roles": []}])
    with pytest.raises(AtlasError, match="would hold 2 MB of sums, more than such a file can"):
        atlas_file.write(tmp_path / "large.parquet", shown, {"sums": torch.zeros(1 << 18, dtype=torch.float64)}, {})
    assert not list(tmp_path.iterdir())


def test_to_pandas_and_polars(atlas: HeadAtlas) -> None:
    frame = atlas.to_table().to_pandas()
    assert frame.groupby("layer")["entropy"].mean()[1] == pytest.approx(float(atlas.value("entropy")[1].mean()))
    other = polars.DataFrame(atlas)
    assert other.filter(polars.col("head") == 5)["confidence"].to_list() == pytest.approx(
        atlas.value("confidence")[:, 5].tolist()
    )


def test_two_corpora_merge_into_one(decoder: Loaded, atlas: HeadAtlas) -> None:
    names = list(TEXTS)
    first = profile(decoder, texts=documents(*names[:2]), relations=few(), plan=PLAN)
    second = profile(decoder, texts=documents(*names[2:4]), relations=few(), plan=PLAN)
    both = first.merge(second)
    whole = profile(decoder, texts=documents(*names[:4]), relations=few(), plan=replace(PLAN, worth=4))
    for name in ("entropy", "sink", "induction", "relation:coreference", "ablation_zero"):
        torch.testing.assert_close(both.value(name), whole.value(name), atol=1e-9, rtol=1e-9, equal_nan=True)
    for name, sums in whole.measurements.sums.values.items():  # a ratio would not tell what counts twice
        torch.testing.assert_close(both.measurements.sums.values[name], sums, atol=1e-9, rtol=1e-9)
    assert both.measurements.sums.documents == whole.measurements.sums.documents
    assert both.info["documents"] == whole.info["documents"]
    assert first.relations.examples == both.relations.examples > 0
    with pytest.raises(AtlasError, match="both atlases hold 'owl'"):
        atlas.merge(first)
    stranger = Loaded("other", tiny.mistral(4), letters(), 0, 64, True, "a test")
    with pytest.raises(AtlasError, match="of different types cannot be merged: tiny and other"):
        first.merge(profile(stranger, texts=documents("cat"), plan=Plan(length=24, repeats=0, worth=0)))


def test_atlases_that_share_sentences_count_them_once(decoder: Loaded) -> None:
    plan = Plan(length=24, repeats=0, worth=0)
    frames = few()["some"]
    mine: list[Any] = []
    theirs: list[Any] = []
    for number in range(6):
        pair = (Pair("before", 1, 0),) if number % 2 else (Pair("before", 2, 1), Pair("twice", 2, 0))
        example = Example("It was late", ((0, 2), (3, 6), (7, 11)), pair, f"document {number}", number // 2 % 2, "en")
        (mine if number < 3 else theirs).append(example)
    given = {"frames": frames, "mine": mine}, {"frames": frames, "theirs": theirs}
    first, second = (
        profile(decoder, texts=documents(*names), relations=held, plan=plan)
        for names, held in zip((("owl", "sea"), ("bus", "pie")), given, strict=True)
    )
    everything = {"frames": frames, "mine": mine, "theirs": theirs}
    whole = profile(decoder, texts=documents("owl", "sea", "bus", "pie"), relations=everything, plan=plan)
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
    changed = profile(decoder, texts=documents("cat"), relations={"mine": mine[:2]}, plan=plan)
    with pytest.raises(AtlasError, match="hold sentences named 'mine', and these differ"):
        first.merge(changed)
    renamed = profile(decoder, texts=documents("cat"), relations={"other": mine[:2]}, plan=plan)
    with pytest.raises(AtlasError, match="hold sentences of 'document 0', in collections that differ"):
        first.merge(renamed)


def test_what_is_given_twice_is_refused(decoder: Loaded, tmp_path: Path) -> None:
    """A head would be confirmed on the text that picked it."""
    plan = Plan(length=24, repeats=0, worth=0)
    with pytest.raises(TextError, match="owl is given twice"):
        profile(decoder, texts=documents("owl", "sea", "owl"), plan=plan)
    copy = [*documents("owl", "sea"), Document("copy", lambda: TEXTS["owl"])]
    with pytest.raises(AtlasError, match="owl and copy hold the same text"):
        profile(decoder, texts=copy, plan=plan)
    with pytest.raises(AtlasError, match="a and b hold the same sentences"):
        profile(decoder, texts=documents("owl"), relations={"a": few()["some"], "b": few()["some"]}, plan=plan)
    with pytest.raises(AtlasError, match=r"a and b both hold .*: its sentences would count twice"):
        profile(decoder, texts=documents("owl"), relations={"a": few()["some"], "b": few()["some"][:-1]}, plan=plan)
    first = profile(decoder, texts=documents("owl"), plan=plan)
    with pytest.raises(AtlasError, match="both atlases hold 'copy' and 0 more"):
        first.merge(profile(decoder, texts=copy[2:], plan=plan))
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("The same words.", "utf-8")
    same_text = ["--text", str(tmp_path / "a.txt"), "--text", str(tmp_path / "b.txt")]
    for texts, match in ((same_text, "b.txt hold the same text"), (same_text[:2] * 2, "a.txt is given twice")):
        done = CliRunner().invoke(cli.app, ["heads", *texts])
        assert done.exit_code == 1
        assert match in " ".join(done.stderr.split())


def test_collections_that_can_give_no_role_are_said(decoder: Loaded) -> None:
    """Five clusters that agree have p = 0.04; four are too few."""
    plan = Plan(length=24, repeats=0, worth=0)
    words = (Pair("before", 2, 1), Pair("twice", 2, 0))
    text = "It was late"
    given = {
        name: [
            Example(text, ((0, 2), (3, 6), (7, 11)), words, f"{name} {i}", int(i >= 5), "en") for i in range(5 + count)
        ]
        for name, count in (("small", 4), ("large", 5))
    }
    long = Example("word " * 40, ((0, 4), (5, 9), (10, 14)), words, "long", 0, "en")
    found = profile(decoder, texts=documents("owl", "sea", "bus", "pie"), relations=given | {"long": [long]}, plan=plan)
    notes = found.measurements.notes
    told = "small has 9 documents (5 to pick heads, 4 to confirm them): too few for roles that come from it, "
    assert told + "which take 5 of each." in notes
    assert not any(note.startswith("large has") for note in notes)
    unclassed = "gives no parts of speech: a head with a role from it may attend to any word of the right class."
    assert f"large {unclassed}" in notes
    frames = profile(decoder, texts=documents("owl"), relations=few(), plan=plan)
    assert not any("parts of speech" in note for note in frames.measurements.notes)
    assert "long: 1 of 1 sentences are longer than the model reads, and were left out." in notes
    assert found.info["examples"]["large"]["read"] == found.info["examples"]["long"]["too_long"] + 9 == 10
    assert found.relations.examples == 19


def test_texts_are_measured_a_few_at_a_time(decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part holds no more than it must, and that changes nothing."""
    whole = profile(decoder, texts=documents(), plan=PLAN)
    asked: list[int] = []
    usual: Any = vars(survey)["measure"]

    def counted(loaded: Loaded, pieces: list[Any], *given: Any, **how: Any) -> Any:
        asked.append(len(pieces))
        return usual(loaded, pieces, *given, **how)

    monkeypatch.setattr(survey, "_TOKENS", 1)
    monkeypatch.setattr(survey, "measure", counted)
    same(profile(decoder, texts=documents(), plan=PLAN), whole)
    assert asked == [4, 1, 1, 1, 1, 0, 1, 0]  # the repeats; four texts, and what is left; one text


def test_what_memory_did_to_the_worth_is_said(decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, told = vars(survey)["head_effects"], ("out of memory with 12 heads",)
    monkeypatch.setattr(survey, "head_effects", lambda *given, **how: replace(usual(*given, **how), notes=told))
    found = profile(decoder, texts=documents("owl"), plan=replace(PLAN, repeats=0, worth=1))
    assert found.notes.count("What heads are worth: out of memory with 12 heads.") == 1


def test_the_texts_for_worth_are_spread_over_the_corpus(decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts evenly, and places in them by their names: whoever measures a text measures the same of it."""
    read: list[Any] = []
    usual = vars(survey)["head_effects"]
    monkeypatch.setattr(survey, "head_effects", lambda e, ids, **how: read.append(ids) or usual(e, ids, **how))
    plan = replace(PLAN, repeats=0, worth=2)
    found = profile(decoder, texts=documents(), plan=plan)
    assert found.worth.documents == ["bus", "owl"]  # the first and the third of five
    alone = {name: profile(decoder, texts=documents(name), plan=plan).worth for name in ("owl", "bus")}
    for row, name in enumerate(found.worth.documents):
        torch.testing.assert_close(found.worth.values["gradient"][row], alone[name].values["gradient"][0])
    starts = {tuple(ids[0, 1:3].tolist()) for ids in read}
    assert len(starts) == 2
    assert starts != {tuple(decoder.tokenizer(TEXTS[name])["input_ids"][:2]) for name in ("owl", "bus")}


def test_a_model_of_ones_own_is_profiled_with_its_tokenizer(decoder: Loaded, atlas: HeadAtlas) -> None:
    model = tiny.llama().requires_grad_(True)
    found = profile(model, decoder.tokenizer, list(TEXTS.values()), plan=replace(PLAN, worth=1))
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert found.name == "LlamaForCausalLM"
    assert [name[:7] for name in found.info["texts"]] == [f"text {number} " for number in range(1, 6)]
    others = profile(model, decoder.tokenizer, ["It was late. It was cold."], plan=replace(PLAN, worth=0))
    assert len(found.merge(others).info["texts"]) == 6  # each has a first text, which is not the other's
    for name in ("first", "entropy", "induction"):  # with the start token that the tokenizer declares
        torch.testing.assert_close(found.value(name), atlas.value(name))
    with pytest.raises(ValueError, match="a model without its tokenizer"):
        profile(decoder.model, texts=list(TEXTS.values()))
    with pytest.raises(ValueError, match="one text where a list of texts is wanted"):
        profile(decoder, texts=TEXTS["owl"])
    with pytest.raises(ValueError, match=r"in training.*call model.eval\(\) first"):
        profile(tiny.llama().train(), decoder.tokenizer)


def test_two_treebanks_of_one_file_name_are_two(decoder: Loaded, tmp_path: Path) -> None:
    examples = {}
    for folder, verb in (("en", "slept"), ("de", "sleeps")):
        path = tmp_path / folder / "dev.conllu"
        path.parent.mkdir()
        rows = ["1\tIt\t_\tPRON\t_\t_\t2\tnsubj\t_\t_", f"2\t{verb}\t_\tVERB\t_\t_\t0\troot\t_\t_", "", ""]
        path.write_text("\n".join(rows))
        examples[str(path)] = read_conllu(path)
    assert (
        profile(decoder, texts=documents("owl"), relations=examples, plan=replace(PLAN, worth=0)).relations.examples
        == 2
    )


def test_relations_whose_rivals_are_in_too_few_documents_are_said(decoder: Loaded) -> None:
    """In ten documents a noun is right; there is another one in one document of each half, in five, or in none."""
    plan, names = Plan(length=24, repeats=0, worth=0), ("rare", "common")

    def notes(contested: int) -> list[str]:
        found = [
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
        return profile(decoder, texts=documents("owl"), relations={"nouns": found}, plan=plan).notes

    told = [note for note in notes(1) if "right class" in note]
    assert len(told) == 1
    assert told[0].startswith("No head can have a role from rare: in fewer than 5 documents")
    assert not any("right class" in note for note in notes(0) + notes(5))


def test_layers_with_other_heads_are_ablated_to_zero(decoder: Loaded) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    model = tiny.llama()
    narrow = type(model.config)(**model.config.to_dict() | {"num_attention_heads": 4})
    narrow._attn_implementation = "sdpa"
    torch.manual_seed(1)
    model.model.layers[1].self_attn = LlamaAttention(narrow, 1).eval()
    loaded = replace(decoder, model=model)
    found = profile(loaded, texts=documents("owl", "sea"), plan=replace(PLAN, repeats=0, worth=2))
    assert found.heads == (6, 4)
    assert set(found.worth.values) == {"ablation_zero", "gradient"}
    assert found.value("ablation_zero").isfinite().tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert any(note.startswith("Ablation to the mean is left out") for note in found.measurements.notes)


def test_files_that_are_no_atlas(atlas: HeadAtlas, tmp_path: Path) -> None:
    path = atlas.save(tmp_path / "heads.parquet")
    with pytest.raises(AtlasError, match="There is no file"):
        HeadAtlas.load(tmp_path / "none.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AtlasError, match="no Parquet file, or is cut short"):
        HeadAtlas.load(cut)
    other = tmp_path / "other.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"layer": [0]}), other)
    with pytest.raises(AtlasError, match="not an atlas of heads"):
        HeadAtlas.load(other)
    table = pyarrow.parquet.read_table(path)
    held = dict(table.schema.metadata)
    told = json.loads(held[b"headscope.atlas"])
    for name, value, match in (
        (b"headscope.atlas", json.dumps(told | {"format": 7}).encode(), "format 7; this version reads format 4"),
        (b"headscope.atlas", b"{", "is damaged"),
        (b"headscope.sums", b"\x00\x01", "is damaged"),
        (b"headscope.atlas", json.dumps({"format": 4}).encode(), "is not a whole atlas"),
        (b"headscope.atlas", json.dumps([told]).encode(), "is not a whole atlas"),
        (b"headscope.atlas", json.dumps(told | {"info": {"columns": {}}}).encode(), "is not a whole atlas: 'model'"),
    ):
        pyarrow.parquet.write_table(table.replace_schema_metadata(held | {name: value}), other)
        with pytest.raises(AtlasError, match=match):
            HeadAtlas.load(other)
    with pytest.raises(AtlasError, match="no column 'entropie'; it has: offset"):
        HeadAtlas(atlas.info | {"columns": {"offset_hits-1": {}}}, atlas.measurements).value("entropie")


@pytest.mark.parametrize("by", ["roles", "worth", "entropy"])
def test_figures(by: str, atlas: HeadAtlas, tmp_path: Path) -> None:
    path = atlas_figures.draw(atlas, tmp_path / "heads.svg", by=by)
    svg = path.read_text("utf-8")
    assert svg.count("<path") > 12
    with pytest.raises(AtlasError, match="no column 'x'"):
        atlas_figures.draw(atlas, path, by="x")
    with pytest.raises(ValueError, match="png"):
        atlas_figures.draw(atlas, tmp_path / "heads.txt", by=by)


@pytest.mark.parametrize(
    ("text", "rows"),
    [("word", 4), ("x" * 100_000, 100_000), ("👩‍👩‍👧‍👦 🏳️‍🌈 family", 1), ("שלום עולם, מה שלומך", 1), ("?! ...", 1)],
    ids=["one word", "no space", "emoji", "right to left", "no words"],
)
def test_odd_texts_are_measured(text: str, rows: int, decoder: Loaded) -> None:
    pieces = corpus.cut(decoder, Document("odd", lambda: text), 0, length=64, most=2)
    assert len(pieces) == (2 if rows > 64 else 1)
    found = measure(decoder, pieces, standard())
    assert found.sums.value("entropy").isfinite().all()


def test_texts_longer_than_the_context_are_cut_and_it_is_said(decoder: Loaded) -> None:
    long = Document("long", lambda: "word " * 200)
    pieces = corpus.cut(decoder, long, 1, length=4096)
    assert {len(piece.ids) for piece in pieces[:-1]} == {64}
    assert sum(len(piece.ids) - 1 for piece in pieces) == 1000
    assert [piece.offset for piece in pieces[:3]] == [0, 63, 126]
    found = profile(decoder, texts=[long], plan=Plan(length=64, pieces=0, repeats=0, worth=0))
    assert "Texts longer than 64 tokens are read in pieces, each after a start token." in found.measurements.notes


def test_texts_that_cannot_be_read(tmp_path: Path, decoder: Loaded) -> None:
    latin, empty = tmp_path / "latin.txt", tmp_path / "empty.txt"
    latin.write_bytes(b"caf\xe9")
    empty.write_text(" \n")
    for path, match in (
        (latin, "not UTF-8: byte 3"),
        (empty, "holds no text"),
        (tmp_path / "no.txt", "cannot be read"),
    ):
        with pytest.raises(TextError, match=match):
            corpus.documents_of([path])[0].read()
    with pytest.raises(TextError, match="character 1 is half a character"):
        corpus.documents_of([], text="a\ud800")[0].read()
    with pytest.raises(TextError, match="2 tokens a piece leave no room"):
        corpus.cut(decoder, documents("owl")[0], 0, length=2)


def test_what_a_tokenizer_does_not_know_is_text_and_no_sink(decoder: Loaded) -> None:
    odd = Document("odd", lambda: "a “b” ’ c")  # the marks have no token of their own
    (piece,) = corpus.cut(decoder, odd, 0, length=64)
    assert piece.ids.count(1) == 3
    assert piece.sinks == (True, *[False] * (len(piece.ids) - 1))
    assert [t for t, delimiter in zip(piece.texts, piece.delimiters, strict=True) if delimiter] == ["“", "”", "’"]
    (written,) = corpus.cut(decoder, Document("written", lambda: "a <s> b"), 0, length=64)
    assert [t for t, sink in zip(written.texts, written.sinks, strict=True) if sink] == ["", "<s>"]


def test_delimiters_that_are_sinks_are_no_text(decoder: Loaded) -> None:
    piece = corpus.cut(decoder, documents("owl")[0], 0, length=64)[0]
    marks = tuple(sink or delimiter for sink, delimiter in zip(piece.sinks, piece.delimiters, strict=True))
    values = measure(decoder, [replace(piece, sinks=marks)], standard()).sums.value("delimiter")
    assert float(values.nan_to_num().max()) == 0


def test_a_language_that_the_model_does_not_read_is_said(decoder: Loaded) -> None:
    from headscope.heads.relations import chinese_sentences

    found = profile(
        decoder,
        texts=documents("owl"),
        relations={"Chinese frames": chinese_sentences()},
        plan=Plan(repeats=0, worth=0),
    )
    assert found.relations.examples == 0
    told = "Chinese frames: not profiled, the model does not read it: "
    assert any(note.startswith(told) for note in found.measurements.notes)


def test_a_model_that_reads_chinese_is_profiled_in_chinese() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from headscope.heads.relations import chinese_sentences

    known = sorted({character for example in chinese_sentences() for character in example.text})
    inner = Tokenizer(token_models.WordLevel({"<s>": 0, "?": 1} | {c: i + 2 for i, c in enumerate(known)}, "?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?", bos_token="<s>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny._decoder() | {"vocab_size": len(known) + 2})).eval()
    loaded = Loaded("tiny", model, tokenizer, 0, 64, True, "a test")
    found = profile(
        loaded, texts=documents("owl"), relations={"Chinese frames": chinese_sentences()}, plan=Plan(repeats=0, worth=0)
    )
    assert not any("Chinese" in note for note in found.measurements.notes)
    assert found.relations.examples == len(chinese_sentences())
    assert {row.relation for row in found.relation_scores()} == {"coreference-zh", "giver-receiver-zh"}
    assert not any(row.role for row in found.relation_scores())  # its weights are random


def test_of_two_sides_the_encoder_is_profiled() -> None:
    model = tiny.bart()
    loaded = Loaded("tiny", model, letters(), 0, 64, True, "a test")
    found = profile(loaded, texts=documents("owl", "sea"), relations=few(), plan=PLAN)
    assert found.heads == (6, 6)
    assert found.relations.examples > 0
    assert bool(found.value("norm_first").isfinite().all())
    assert found.worth.unit == "1 - cosine"
    assert float(found.value("ablation_zero").min()) > 0
    inner = Loaded("tiny", model.get_encoder(), letters(), 0, 64, True, "a test")
    alone = profile(inner, texts=documents("owl", "sea"), relations=few(), plan=PLAN)
    for column in ("entropy", "norm_first", "ablation_zero"):
        torch.testing.assert_close(found.value(column), alone.value(column))


TREEBANK = """# newdoc id = {name}
1\tBig\tbig\tADJ\t_\t_\t2\tamod\t_\t_
2\tbirds\tbird\tNOUN\t_\t_\t3\tnsubj\t_\t_
3\tsee\tsee\tVERB\t_\t_\t0\troot\t_\t_
4\tthe\tthe\tDET\t_\t_\t5\tdet\t_\t_
5\tsea\tsea\tNOUN\t_\t_\t3\tobj\t_\tSpaceAfter=No
6\t.\t.\tPUNCT\t_\t_\t3\tpunct\t_\t_

"""


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_folder_of_the_papers_kinds_and_a_treebank(kind: str, tmp_path: Path) -> None:
    """What Clark's table and the induction heads of GPT-2 small need, on models made up for it."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    from headscope import models
    from headscope.heads.relations.sentences.treebank import read_conllu

    torch.manual_seed(0)
    sizes = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    bert = BertConfig(**sizes, hidden_size=24, num_hidden_layers=2, num_attention_heads=6, intermediate_size=32)
    gpt2 = GPT2Config(**sizes, n_embd=24, n_layer=2, n_head=6, n_positions=128)
    (BertModel(bert) if kind == "bert" else GPT2LMHeadModel(gpt2)).save_pretrained(tmp_path / kind)
    letters().save_pretrained(tmp_path / kind)
    file = tmp_path / "en_made-up.conllu"
    file.write_text("".join(TREEBANK.format(name=f"doc {n}") for n in range(12)), "utf-8")
    loaded = models.load(tmp_path / kind)
    examples = read_conllu(file)
    assert {example.half for example in examples} == {0, 1}
    found = profile(loaded, texts=documents(), relations={"made up": examples}, plan=replace(PLAN, worth=0))
    columns = found.columns()
    assert found.relations.examples == 12
    assert {"relation:nsubj (reverse)", "relation:obj"} <= set(columns)  # a decoder sees what comes before
    assert ("relation:det" in columns) == (kind == "bert")
    assert columns["norm_sink"].isfinite().all()  # the output projection was found, a Conv1D in GPT-2
    assert columns["induction"].isfinite().all()


def test_default_documents_are_there_and_their_hash_is_stable() -> None:
    given = corpus.default_documents()
    assert len(given) > 15
    assert len({document.name for document in given}) == len(given)
    assert [corpus.digest(d) for d in given] == [corpus.digest(d) for d in corpus.default_documents()]
    assert all(len(document.read()) > 200 for document in given)


@pytest.fixture(scope="module")
def folder(decoder: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in a folder, and texts beside it."""
    return write(tmp_path_factory.mktemp("model"), decoder.model, decoder.tokenizer)


def write(path: Path, model: Any, tokenizer: Any) -> Path:
    """A model in a folder, and texts beside it."""
    model.save_pretrained(path / "tiny")
    tokenizer.save_pretrained(path / "tiny")
    for name, text in TEXTS.items():
        (path / f"{name}.txt").write_text(text, "utf-8")
    return path


def command(folder: Path, *options: str, processes: int = 0) -> list[str]:
    texts = [part for name in TEXTS for part in ("--text", str(folder / f"{name}.txt"))]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    given = ["heads", "--model", str(folder / "tiny"), *texts, "--length", "24", *options]
    return [sys.executable, *launch, "-m", "headscope", *given]


def run(args: list[str]) -> subprocess.CompletedProcess[str]:
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(args, capture_output=True, text=True, env=threads, timeout=300, check=False)


def end_one_worker(launcher: int) -> None:
    """Kill one of torchrun's workers; it then ends the others, and itself."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    workers = sorted(int(n) for n in children if b"headscope" in Path(f"/proc/{n}/cmdline").read_bytes())
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_killed_and_begun_again_give_the_single_ones_table(tmp_path: Path) -> None:
    tokenizer = words()  # of letters, 3,800 sentences would be long
    folder = write(tmp_path, tiny.llama(vocab_size=len(tokenizer)), tokenizer)
    alone = run(command(folder, "--out", str(tmp_path / "alone.parquet")))
    assert alone.returncode == 0, alone.stderr
    kill_and_begin_again("all", folder, tmp_path)
    if Path("/proc/self/task").is_dir():  # where a process's children can be read
        kill_and_begin_again("one worker", folder, tmp_path)


def kill_and_begin_again(killed: str, folder: Path, tmp_path: Path) -> None:
    """Of two processes; what they give at last is compared with ``alone.parquet``."""
    shared, parts = tmp_path / f"{killed}.parquet", tmp_path / f"{killed}.parquet.shards"
    args = command(folder, "--out", str(shared), processes=2)
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        args, env=threads, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    if killed == "all":
        os.killpg(begun.pid, signal.SIGKILL)
    else:
        end_one_worker(begun.pid)
    begun.wait(timeout=60)
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert before
    assert not shared.exists()
    again = run(args)
    assert again.returncode == 0, again.stderr
    same(HeadAtlas.load(shared), HeadAtlas.load(tmp_path / "alone.parquet"))
    assert not parts.exists()
    assert again.stdout.count("One head for reference") == 1  # one of the two speaks


def test_the_command_shows_saves_and_draws(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads_command, "_frames", few)  # all of them are asked by two processes above
    out = tmp_path / "tiny.parquet"
    made = CliRunner().invoke(cli.app, command(folder, "--out", str(out), "--no-worth")[3:])
    assert made.exit_code == 0, made.stderr
    assert "2 layers, 12 heads" in made.stdout
    assert "One head for reference, one for cause, one for structure?" in made.stdout
    assert "What the heads are worth was not measured." in made.stdout
    assert f"Atlas: {out}" in made.stdout
    figure = tmp_path / "heads.png"
    base = ["heads", "--model", str(folder / "tiny"), "--atlas", str(out)]
    head = CliRunner().invoke(cli.app, [*base, "--head", "1.3", "--figure", str(figure), "--by", "sink"])
    assert head.exit_code == 0, head.stderr
    assert "1.3: " in head.stdout
    assert "Looks hardest" in head.stdout
    assert str(folder) in "".join(head.stdout.split())  # its examples are from the texts that it was made of
    assert figure.stat().st_size > 5000
    for options, match in (
        (["--head", "2.0"], "There is no head 2.0"),
        (["--head", "x"], "'x' is not a head"),
        (["--figure", str(figure), "--by", "worth"], "was not measured"),
        (["--text", "a.txt", "--no-worth"], "--atlas shows what was measured, and --text, --no-worth would measure"),
        (["--length", "32"], "and --length would measure"),
        (["--treebank", str(folder / "owl.txt")], "owl.txt:1"),
    ):
        words = base[:-2] if "--treebank" in options else base  # --atlas measures nothing
        failed = CliRunner().invoke(cli.app, [*words, *options])
        assert failed.exit_code == 1
        assert match in " ".join(failed.stderr.split())


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_the_atlas_in_the_package_is_of_the_model_here(name: str, request: pytest.FixtureRequest) -> None:
    from importlib import resources

    from headscope.heads.atlas.profiler import weights_hash

    loaded = request.getfixturevalue(name)
    with resources.as_file(resources.files("headscope.heads.atlas") / "shipped" / f"{name}.parquet") as path:
        held = HeadAtlas.load(path)
    assert held.info["model"]["weights"] == weights_hash(loaded.model)
    assert len(held) == {"smollm2": 270, "minilm": 72}[name]
    assert set(held.info["columns"]) == {column.name for measure in standard() for column in measure.columns}
    best = [row for row in held.roles() if row.role == "coreference"]
    assert best
    assert all(row.low > 0.2 and row.p < 0.05 for row in best)
    assert held.value("ablation_zero").isfinite().all()


def test_the_atlas_in_the_package_comes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from headscope.commands import app as cli

    def no_model(name: str) -> None:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("headscope.models.load", no_model)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(cli.app, ["heads", "--model", "minilm"])
    assert done.exit_code == 0
    assert "minilm: 6 layers, 72 heads" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_one_head_beside_its_own_nulls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from importlib import resources

    from headscope.views.terminal.heads import print_head

    monkeypatch.setenv("COLUMNS", "80")
    with resources.as_file(resources.files("headscope.heads.atlas") / "shipped" / "minilm.parquet") as path:
        held = HeadAtlas.load(path)
    print_head(held, 3, 1)
    shown = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    (row,) = [r for r in held.relation_scores() if (r.direction, r.layer, r.head) == ("coreference", 3, 1)]
    better = sum(r.accuracy > row.accuracy for r in held.relation_scores() if r.direction == "coreference")
    assert shown["coreference"][1:4] == [f"{row.accuracy:.3f}", f"{row.null:.3f}", f"{better + 1}/72"]
    assert shown["entropy"][1] == f"{float(held.value('entropy')[3, 1]):.3f}"
    assert shown["entropy"][2] == f"{float(held.measurements.null.value('entropy')[3, 0]):.3f}"


def test_too_few_texts_give_no_roles_and_it_is_said(decoder: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    uniform = next(role for role in roles.ROLES if role.name == "uniform")
    monkeypatch.setattr(roles, "ROLES", (replace(uniform, threshold=0.1),))  # every head has it
    plan = replace(PLAN, repeats=0, worth=0)
    for count, told in (
        (2, "1 to pick heads (needed: 1), 1 to confirm them (needed: 2)"),
        (3, "2 to pick heads"),
        (4, None),
    ):
        found = profile(decoder, texts=documents()[:count], plan=plan)
        assert any("Too few texts" in note and f": {told}" in note for note in found.notes) == (told is not None)
        assert any("Too few texts" in note for note in found.notes) == (told is not None)
        assert bool(found.roles()) == (told is None)
    names = ("owl", "sea", "bus", "cat")
    alone = [profile(decoder, texts=documents(name), plan=plan) for name in names]
    assert [found.info["documents"] for found in alone] == [{"owl": 1}, {"sea": 1}, {"bus": 1}, {"cat": 0}]
    assert not any(found.roles() for found in alone)
    merged = alone[0].merge(alone[1]).merge(alone[2]).merge(alone[3])
    assert merged.roles()
    assert not any("Too few texts" in note for note in merged.notes)


def test_texts_of_which_only_the_beginning_is_read_are_said(decoder: Loaded) -> None:
    plan = replace(PLAN, repeats=0, worth=0)
    told = "Of longer texts only the beginning was read, 24 tokens at most; --pieces 0 reads all."
    assert told in profile(decoder, texts=documents(), plan=plan).measurements.notes
    assert told not in profile(decoder, texts=documents(), plan=replace(plan, pieces=0)).measurements.notes


def test_a_text_that_changed_since_its_part_was_finished_is_refused(decoder: Loaded, tmp_path: Path) -> None:
    plan = replace(PLAN, repeats=0, worth=0)
    profile(decoder, texts=documents(), plan=plan, shards=tmp_path / "parts")
    changed = [*documents()[:4], Document("cat", lambda: "Another text stands under this name now.")]
    with pytest.raises(AtlasError, match="was measured on another text named 'cat': remove it"):
        profile(decoder, texts=changed, plan=plan, shards=tmp_path / "parts")


def test_more_layers_than_the_config_says() -> None:
    sums, one = MeasureSums(), torch.ones(1, 3)
    for layer, layers in ((0, 1), (1, 2), (2, 3)):
        sums.add({"a": Ratio(one * layer, one)}, layer, layers, torch.ones(2, 1))
    assert sums.value("a").tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


def test_a_pipe_is_refused_where_several_processes_would_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(cli.app, ["heads", "--text", "-", "--out", "never.parquet"], input="A text.")
    assert done.exit_code == 1
    assert "2 processes cannot read one pipe" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("rank", "stays"), [(0, []), (1, ["done-2"]), (2, ["done-1"])])
def test_who_ended_in_a_killed_run_has_not_ended_in_this_one(
    rank: int, stays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first process removes parts that another has yet to read, which then waits for them forever."""
    from headscope.commands.heads import _forget_ended

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", str(rank))
    for number in (1, 2):
        (tmp_path / f"done-{number}").touch()
    (tmp_path / "a.safetensors").touch()
    _forget_ended(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", *stays]
    _forget_ended(tmp_path / "not there")


def test_parts_stay_while_another_process_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.commands.heads import _remove

    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = tmp_path / "a.shards"
    parts.mkdir()
    _remove(parts, patience=0.2)
    assert parts.exists()
    (parts / "done-1").touch()
    _remove(parts, patience=0.2)
    assert not parts.exists()
