"""The command `headscope heads`: its messages before the work, its tables, and files that cannot be written."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from headscope.commands import app as cli
from headscope.commands import heads as heads_command
from headscope.commands.pipe import read_pipe
from headscope.errors import AtlasError, TextError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.atlas.shards import Shard, ShardFolder
from headscope.views.terminal import heads as terminal_heads
from tests.heads.test_atlas import atlas, command, decoder, documents, few, folder, run  # noqa: F401  (fixtures among them)
from tests.options import one_thread  # noqa: F401  (for the whole module)


def message(*options: str) -> str:
    """The message with which the command refuses."""
    done = CliRunner().invoke(cli.app, ["heads", *options])
    assert done.exit_code == 1
    return " ".join(done.stderr.split())


def test_heads_refuses_impossible_options_before_it_measures(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was measured")

    monkeypatch.setattr(heads_command, "profile", never)
    words = command(folder)[4:]
    assert "'13' is not a head. Write layer.head" in message(*words, "--head", "13")
    assert "tiny has 2 layers with up to 6 heads" in message(*words, "--head", "2.0")
    figure = ["--figure", str(tmp_path / "heads.png")]
    assert "There is no measure 'entropie' to draw. There are: roles, worth, " in message(
        *words, *figure, "--by", "entropie"
    )
    assert "--by entropy chooses what a figure shows: give --figure FILE" in message(*words, "--by", "entropy")
    assert "--no-worth does not measure it" in message(*words, *figure, "--by", "ablation_zero", "--no-worth")
    assert (
        "There is no 'relation:corefrence' to draw. There are: adjective-noun, adjective-noun (reverse), "
        in message(*words, *figure, "--by", "relation:corefrence")
    )
    assert "a model without a next token has none" in message(
        "--again", "--model", "minilm", *figure, "--by", "gradient"
    )
    nothing = tmp_path / "one.txt"
    nothing.write_text("a")
    few_words = ["--model", str(folder / "tiny"), "--text", str(nothing)]
    assert "No text has two tokens that the model knows" in message(*few_words)
    unnamed = tmp_path / "bad\udcff.txt"
    unnamed.write_text("Some text of no importance.")
    assert "is not UTF-8: rename it" in message("--model", str(folder / "tiny"), "--text", str(unnamed))
    (tmp_path / "a.parquet.shards").write_text("")
    monkeypatch.undo()
    assert "Cannot make the folder" in message(*words, "--out", str(tmp_path / "a.parquet"))


def test_one_head_has_no_examples_of_other_weights(atlas: HeadAtlas, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    other = HeadAtlas(
        atlas.info | {"model": atlas.info["model"] | {"weights": "0" * 64}},
        atlas.measurements,
        atlas.relations,
        atlas.worth,
    )
    path = other.save(tmp_path / "other.parquet")
    given = ["heads", "--atlas", str(path), "--model", str(folder / "tiny"), "--head", "1.3"]
    shown = CliRunner().invoke(cli.app, given)
    assert shown.exit_code == 0
    assert "has other weights than the model of the atlas" in " ".join(shown.stderr.split())
    assert "Looks hardest" not in shown.stdout


def test_one_head_has_examples_from_the_pipe_that_was_just_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(heads_command, "_frames", dict)
    given = ["heads", "--model", str(folder / "tiny"), "--text", "-", "--head", "1.3", "--no-worth"]
    done = CliRunner().invoke(cli.app, given, input="Nobody knew where the zebra was, or whether it was asleep.")
    assert done.exit_code == 0
    assert "texts of this machine" not in done.stdout
    assert "Looks hardest" in done.stdout


@pytest.mark.parametrize(
    "words", ["--text a b - --treebank=c d --no-worth", "--treebank c --text a --text b - --no-worth --treebank d"]
)
def test_text_and_treebank_take_several_files(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(
        heads_command, "_measure", lambda options, plan: given.append(options) or raise_(TextError("seen"))
    )
    answer = CliRunner().invoke(cli.app, ["heads", *words.split()])
    assert "seen" in answer.output
    assert [str(path) for path in given[0].texts] == ["a", "b", "-"]  # type: ignore[attr-defined]
    assert [str(path) for path in given[0].treebanks] == ["c", "d"]  # type: ignore[attr-defined]
    alone = CliRunner().invoke(cli.app, ["heads", "--no-worth", "a.txt"])  # which option is it for?
    assert alone.exit_code == 2
    assert "a.txt" in alone.output


def raise_(error: Exception) -> None:
    raise error


def test_shards_on_a_full_disk_are_one_message(
    atlas: HeadAtlas,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = ShardFolder(tmp_path / "shards", {"work": 1}, [], None)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headscope.heads.atlas.shards.save_file", full)
    with pytest.raises(AtlasError, match=r"Cannot write .*texts-0.safetensors: No space left on device"):
        list(shards.run({"texts-0": Shard}, 0))


def test_read_pipe_reads_utf_8_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    give("\ufeffgrün".encode())
    assert read_pipe() == "grün"
    give("grün".encode("latin-1"))
    with pytest.raises(TextError, match="not UTF-8 text: byte 2"):
        read_pipe()


def test_print_atlas_keeps_every_number_in_a_narrow_terminal(atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    out = io.StringIO()
    narrow = Console(file=out, width=60, highlight=False)
    monkeypatch.setattr(terminal_heads, "print_renderable", narrow.print)
    monkeypatch.setattr(terminal_heads, "width", lambda: 60)
    terminal_heads.print_atlas(atlas)
    shown = out.getvalue()
    assert "…" not in shown.replace(" … ", "").replace("…\n", "")
    for row in atlas.roles()[:2]:
        assert f"{row.layer}.{row.head} " in shown
    out.seek(out.truncate(0))
    terminal_heads.print_head(atlas, 1, 3)
    assert "…" not in out.getvalue()


def test_print_atlas_names_the_best_head_of_no_role(atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    out = io.StringIO()
    monkeypatch.setattr(terminal_heads, "print_renderable", Console(file=out, width=300, highlight=False).print)
    terminal_heads.print_atlas(atlas)
    rows = [row for row in atlas.relation_scores() if row.relation == "coreference"]
    best = max(rows, key=lambda row: row.accuracy - row.null)
    shown = " ".join(out.getvalue().split())
    sentence = f"the best head, {best.layer}.{best.head}, is right in {best.accuracy * 100:.0f} % of {best.pairs} pairs"
    assert sentence in shown
    assert f"(null: {best.null * 100:.0f} %, p = {best.p_holm:.1g})" in shown


def test_merge_refuses_an_atlas_of_another_plan(atlas: HeadAtlas, decoder: object) -> None:  # noqa: F811
    plan = Plan(length=16, repeats=0, worth=0)
    other = profile(decoder, texts=documents("owl"), plan=plan)
    with pytest.raises(AtlasError, match="of different lengths of pieces cannot be merged"):
        atlas.merge(other)


def test_merge_joins_two_treebanks_on_the_same_texts(decoder: object) -> None:  # noqa: F811
    plan = Plan(length=24, repeats=4, period=7, worth=2, worth_tokens=9)
    given = few()["some"]
    first, second = (
        profile(decoder, texts=documents(), relations={name: part}, plan=plan)
        for name, part in (("one", given[:5]), ("two", given[5:]))
    )
    both = first.merge(second)
    for name, sums in first.measurements.sums.values.items():
        torch.testing.assert_close(both.measurements.sums.values[name], sums)
    assert both.worth.documents == first.worth.documents
    assert both.relations.examples == first.relations.examples + second.relations.examples
    assert both.info["merged"] == [{name: part.info[name] for name in ("plan", "versions")} for part in (first, second)]
    assert len(both.merge(profile(decoder, texts=documents(), relations={}, plan=plan)).info["merged"]) == 3
