"""The command `headscope heads`: its messages before the work, its tables, and files that cannot be written."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from headscope.commands import app as cli
from headscope.commands import heads as heads_module
from headscope.errors import AtlasError, TextError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.atlas.shards import Shard, ShardFolder
from headscope.views.terminal import heads as terminal_heads
from tests.options import one_thread  # noqa: F401  (for the whole module)
from tests.tiny_atlas import documents, few_sentences, heads_command


def message(*options: str) -> str:
    """The message with which the command refuses."""
    done = CliRunner().invoke(cli.app, ["heads", *options])
    assert done.exit_code == 1
    return " ".join(done.stderr.split())


def test_heads_refuses_impossible_options_before_it_measures(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("this was measured")

    monkeypatch.setattr(heads_module, "profile", never)
    words = heads_command(tiny_folder)[4:]
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
    few_words = ["--model", str(tiny_folder / "tiny"), "--text", str(nothing)]
    assert "No text has two tokens that the model knows" in message(*few_words)
    unnamed = tmp_path / "bad\udcff.txt"
    unnamed.write_text("Some text of no importance.")
    assert "is not UTF-8: rename it" in message("--model", str(tiny_folder / "tiny"), "--text", str(unnamed))
    (tmp_path / "a.parquet.shards").write_text("")
    monkeypatch.undo()
    assert "Cannot make the folder" in message(*words, "--out", str(tmp_path / "a.parquet"))


def test_one_head_has_examples_from_the_pipe_that_was_just_read(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_module, "_frames", dict)
    words = ["heads", "--model", str(tiny_folder / "tiny"), "--text", "-", "--head", "1.3", "--no-worth"]
    done = CliRunner().invoke(cli.app, words, input="Nobody knew where the zebra was, or whether it was asleep.")
    assert done.exit_code == 0
    assert re.search(r"Its largest weights\n +\d+\s% +… .*(\n.*)? tokens; -\)", done.stdout)


@pytest.mark.parametrize(
    "words", ["--text a b - --treebank=c d --no-worth", "--treebank c --text a --text b - --no-worth --treebank d"]
)
def test_text_and_treebank_take_several_files(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(
        heads_module, "_measure", lambda options, plan: given.append(options) or raise_(TextError("seen"))
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
    tiny_atlas: HeadAtlas,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shards = ShardFolder(tmp_path / "shards", {"work": 1}, [], None)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headscope.heads.atlas.shards.save_file", full)
    with pytest.raises(AtlasError, match=r"Cannot write .*texts-0.safetensors: No space left on device"):
        list(shards.run({"texts-0": Shard}, 0))


def test_print_atlas_keeps_every_number_in_a_narrow_terminal(
    tiny_atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    terminal_heads.print_atlas(tiny_atlas)
    shown = capsys.readouterr().out
    assert "…" not in shown.replace(" … ", "").replace("…\n", "")
    for row in tiny_atlas.roles()[:2]:
        assert re.search(rf"\b{row.layer}\.{row.head}\b", shown)
    terminal_heads.print_head(tiny_atlas, 1, 3, measures=True)
    assert "…" not in capsys.readouterr().out.replace("… ", "")  # before an example


def test_print_atlas_names_the_best_head_of_no_role(tiny_atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(terminal_heads, "print_renderable", Console(file=out, width=300, highlight=False).print)
    terminal_heads.print_atlas(tiny_atlas)
    rows = [row for row in tiny_atlas.relation_scores() if row.relation == "coreference"]
    best = max(rows, key=lambda row: row.accuracy - row.null)
    shown = " ".join(out.getvalue().split())
    sentence = f"the best head, {best.layer}.{best.head}, is right in {best.accuracy * 100:.0f} % of {best.pairs} pairs"
    assert sentence in shown
    assert f"(null: {best.null * 100:.0f} %, p = {best.p_holm:.1g})" in shown


def test_merge_refuses_an_atlas_of_another_plan(tiny_atlas: HeadAtlas, tiny_decoder: object) -> None:
    plan = Plan(length=16, repeats=0, worth=0)
    other = profile(tiny_decoder, texts=documents("owl"), plan=plan)
    with pytest.raises(AtlasError, match="of different lengths of pieces cannot be merged"):
        tiny_atlas.merge(other)


def test_merge_joins_two_treebanks_on_the_same_texts(tiny_decoder: object) -> None:
    plan = Plan(length=24, repeats=4, period=7, worth=2, worth_tokens=9)
    given = few_sentences()["some"]
    first, second = (
        profile(tiny_decoder, texts=documents(), relations={name: part}, plan=plan)
        for name, part in (("one", given[:5]), ("two", given[5:]))
    )
    both = first.merge(second)
    for name, sums in first.measurements.sums.values.items():
        torch.testing.assert_close(both.measurements.sums.values[name], sums)
    assert both.worth.documents == first.worth.documents
    assert both.relations.examples == first.relations.examples + second.relations.examples
    assert both.info["merged"] == [{name: part.info[name] for name in ("plan", "versions")} for part in (first, second)]
    assert len(both.merge(profile(tiny_decoder, texts=documents(), relations={}, plan=plan)).info["merged"]) == 3


def test_heads_measures_saves_shows_and_draws(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_module, "_frames", few_sentences)
    out = tmp_path / "tiny.parquet"
    made = CliRunner().invoke(cli.app, heads_command(tiny_folder, "--out", str(out), "--no-worth")[3:])
    assert made.exit_code == 0, made.stderr
    assert "2 layers, 12 heads" in made.stdout
    assert "One head for reference, one for cause, one for structure?" in made.stdout
    assert "What the heads are worth was not measured." in made.stdout
    assert f"Atlas: {out}" in made.stdout
    figure = tmp_path / "heads.png"
    base = ["heads", "--atlas", str(out)]
    head = CliRunner().invoke(cli.app, [*base, "--head", "1.3", "--figure", str(figure), "--by", "sink"])
    assert head.exit_code == 0, head.stderr
    assert "1.3: " in head.stdout
    assert str(tiny_folder) in "".join(head.stdout.split())  # its examples are from the texts that it was made of
    assert figure.stat().st_size > 5000
    for options, match in (
        (["--head", "2.0"], "There is no head 2.0"),
        (["--head", "x"], "'x' is not a head"),
        (["--figure", str(figure), "--by", "worth"], "was not measured"),
        (["--text", "a.txt", "--no-worth"], "--atlas shows what was measured, and --text, --no-worth would measure"),
        (["--length", "32"], "and --length would measure"),
        (["--model", str(tiny_folder / "tiny")], "and --model would measure"),
        (["--treebank", str(tiny_folder / "owl.txt")], "owl.txt:1"),
    ):
        words = ["heads", "--model", str(tiny_folder / "tiny")] if "--treebank" in options else base
        failed = CliRunner().invoke(cli.app, [*words, *options])
        assert failed.exit_code == 1
        assert match in " ".join(failed.stderr.split())


def test_heads_shows_the_shipped_atlas_without_loading_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_model(name: str) -> None:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("headscope.models.load", no_model)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(cli.app, ["heads", "--model", "minilm"])
    assert done.exit_code == 0
    assert "minilm: 6 layers, 72 heads" in done.stdout
    assert re.search(r"^Try: headscope heads --model minilm --head \d\.\d+$", done.stdout, re.MULTILINE)
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_hint_shows_the_same_atlas_again() -> None:
    assert heads_module._command_for("smollm2", None) == "headscope heads"
    assert heads_module._command_for("minilm", None) == "headscope heads --model minilm"
    assert heads_module._command_for("tiny", Path("my a")) == "headscope heads --atlas 'my a'"


def test_heads_refuses_a_pipe_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = CliRunner().invoke(cli.app, ["heads", "--text", "-", "--out", "never.parquet"], input="A text.")
    assert done.exit_code == 1
    assert "2 processes cannot read one pipe" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("rank", "stays"), [(0, []), (1, ["done-2"]), (2, ["done-1"])])
def test_marks_of_ended_processes_are_removed_when_a_run_begins_again(
    rank: int, stays: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first process removes parts that another has yet to read, which then waits for them forever."""

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", str(rank))
    for number in (1, 2):
        (tmp_path / f"done-{number}").touch()
    (tmp_path / "a.safetensors").touch()
    heads_module._forget_ended(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", *stays]
    heads_module._forget_ended(tmp_path / "not there")


def test_shards_stay_while_another_process_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = tmp_path / "a.shards"
    parts.mkdir()
    heads_module._remove(parts, patience=0.2)
    assert parts.exists()
    (parts / "done-1").touch()
    heads_module._remove(parts, patience=0.2)
    assert not parts.exists()


def test_heads_refuses_another_kind_of_figure_before_it_measures(tmp_path: Path) -> None:
    options = ("--model", str(tmp_path / "none"), "--figure", str(tmp_path / "a.xyz"))
    assert ".png, .svg or .pdf" in message(*options)
