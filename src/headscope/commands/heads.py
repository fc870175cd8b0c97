"""The command `headscope heads`: what each head of a model does, and what it is worth."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from headscope import models
from headscope.commands.models import DEFAULT_MODEL, pull_default
from headscope.commands.outputs import Force, Output, check_outputs, figure_output
from headscope.commands.pipe import read_pipe
from headscope.commands.words import StartToken
from headscope.distributed import processes, rank
from headscope.errors import AtlasError, TextError
from headscope.heads import corpus
from headscope.heads.atlas import file as atlas_file
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.measuring import columns_of
from headscope.heads.atlas.profiler import Plan, head_counts, profile
from headscope.heads.measures import standard
from headscope.heads.relations import Example, chinese_sentences, english_sentences
from headscope.heads.relations.counts import direction_of
from headscope.heads.relations.sentences.treebank import read_conllu
from headscope.views.links import split_head
from headscope.views.terminal import console as terminal
from headscope.views.terminal import heads as terminal_heads
from headscope.views.words import quote

_BY = "roles"
_MEASURING = {"--text", "--treebank", "--out", "--again", "--worth", "--no-worth", "--length", "--pieces"}
_MEASURING |= {"--start-token", "--model"}
_WORTH = ("worth", "ablation_zero", "ablation_mean", "gradient")

app = typer.Typer(rich_markup_mode=None)

_HELP = """Profile every head of a model: what it does, with evidence, and what it is worth.

Each head is measured on texts (entropy, distances, weight on the first token …), on random tokens that come twice,
and on sentences whose related words are known. It gets a role where a measure is strong on texts that it was not picked
on. Then each head is left out, to see what the model loses.

For smollm2 and minilm the atlas is in the package and is shown at once. With a text or a treebank of your own, with
--again, or for another model, the heads are measured: 10 to 20 minutes for smollm2 on two slow cores.

\b
Examples:
  headscope heads                                the default model's roles, and its most valuable heads
  headscope heads --head 18.6                    one head: its roles, and its best and worst examples in words
  headscope heads --head 18.6 --all              all its measures, too, each with its null and rank
  headscope heads --text *.txt --out mine.parquet
  headscope heads --treebank en.conllu           every dependency relation, in any language
  headscope heads --atlas mine.parquet --figure heads.png --by entropy
  torchrun --nproc-per-node 2 -m headscope heads --out shared.parquet     several processes share the work

A run with --out that was stopped goes on where it was when you give the same command again.
"""

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        help="smollm2, minilm, a folder, a .gguf file or a hub name.",
    ),
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE…", help="UTF-8 texts, one or several; - for a pipe."),
]
Treebank = Annotated[
    list[Path] | None,
    typer.Option("--treebank", metavar="FILE…", help="CoNLL-U files: all their relations are scored."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Save the atlas as a Parquet file.")]
AtlasOption = Annotated[
    Path | None, typer.Option("--atlas", metavar="FILE", help="Show a saved atlas instead of measuring.")
]
HeadOption = Annotated[
    str | None, typer.Option("--head", metavar="LAYER.HEAD", help="One head: its roles, with examples in words.")
]
Figure = Annotated[
    Path | None, typer.Option("--figure", metavar="FILE", help="Draw all heads by a measure: .png, .svg or .pdf.")
]
By = Annotated[
    str,
    typer.Option(
        "--by",
        metavar="COLUMN",
        help="What to draw: roles, worth, a measure such as entropy, or a relation such as relation:coreference.",
    ),
]
Worth = Annotated[bool, typer.Option("--worth/--no-worth", help="Whether to measure what heads are worth.")]
Length = Annotated[int, typer.Option("--length", metavar="N", min=8, help="Tokens in a piece of text.")]
Pieces = Annotated[
    int, typer.Option("--pieces", metavar="N", min=0, help="Pieces of each text, from its start; 0: all of it.")
]
All = Annotated[
    bool, typer.Option("--all", help="Every head, not the first few of each role; with --head every measure.")
]
Again = Annotated[bool, typer.Option("--again", help="Measure again what the package already has.")]


class _ManyFiles(TyperCommand):
    """Lets several files follow an option, as a shell's ``--text *.txt`` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the option before each file; the command has no arguments of its own."""
        words, option, files = list[str](), "", 0
        for arg in args:
            if arg.startswith("-") and arg != "-":
                option, equals, _ = arg.partition("=")
                files = len(equals)
            elif option in ("--text", "--treebank"):
                words += [option] if files else []
                files += 1
            words.append(arg)
        return super().parse_args(ctx, words)


@app.command(name="heads", help=_HELP, cls=_ManyFiles)
def heads(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    text: TextOption = None,
    treebank: Treebank = None,
    out: Out = None,
    atlas: AtlasOption = None,
    head: HeadOption = None,
    figure: Figure = None,
    by: By = _BY,
    worth: Worth = True,
    length: Length = 512,
    pieces: Pieces = 1,
    all_heads: All = False,
    again: Again = False,
    start_token: StartToken = "auto",
    force: Force = False,
) -> None:
    """Profile every head of a model; the help text is above."""
    given = _given(context)
    _check(given, head, by, worth)
    inputs = [atlas, *(text or []), *(treebank or []), Path(model)]
    check_outputs([Output("--out", out, atlas_file.KIND), *figure_output(figure)], inputs, force=force)
    plan = Plan(length=length, pieces=pieces, worth=Plan.worth if worth else 0)
    to_measure = bool(text or treebank or out or again) or plan != Plan() or start_token != "auto"
    profiled = HeadAtlas.load(atlas) if atlas is not None else None if to_measure else _shipped_atlas(model)
    measured = profiled is None
    if profiled is None:
        pull_default(model)
        profiled = _measure(_Options(model, text or [], treebank or [], out, head, by, force, start_token), plan)
    if rank():
        return
    command = None if measured and out is None else _command_for(model, atlas or out)
    if head is not None:
        _check_head(head, profiled.heads, profiled.name)
        terminal_heads.print_head(profiled, *split_head(head), measures=all_heads, command=command)
    else:
        terminal_heads.print_atlas(profiled, all_heads=all_heads, command=command)
    if figure is not None:
        from headscope.views.figures import atlas as atlas_figures

        atlas_figures.draw(profiled, figure, by=by, force=force)
        terminal.print_line(f"Figure: {figure}")


@dataclass(frozen=True)
class _Options:
    """The options of a run that measures."""

    model: str
    texts: list[Path]
    treebanks: list[Path]
    out: Path | None
    head: str | None
    by: str
    force: bool
    start_token: str


def _command_for(model: str, atlas: Path | None) -> str:
    """The command that shows the same atlas again."""
    if atlas is not None:
        return f"headscope heads --atlas {quote(str(atlas))}"
    return "headscope heads" if model == DEFAULT_MODEL else f"headscope heads --model {quote(model)}"


def _given(context: typer.Context) -> list[str]:
    """The options that stand in the command, also those that repeat a default."""
    source = context.get_parameter_source
    names = {
        param.name: param.opts[0]
        for param in context.command.params
        if (where := source(param.name or "")) is not None and where.name == "COMMANDLINE"
    }
    if not context.params["worth"]:
        names["worth"] = "--no-worth"
    return list(names.values())


def _check(given: Sequence[str], head: str | None, by: str, worth: bool) -> None:
    """Raise an error before anything is measured if the options cannot be met."""
    if head is not None:
        split_head(head)
    if "--by" in given and "--figure" not in given:
        raise AtlasError(f"--by {by} chooses what a figure shows: give --figure FILE, too.")
    if "--atlas" in given:
        if measuring := [option for option in given if option in _MEASURING]:
            raise AtlasError(
                f"--atlas shows what was measured, and {', '.join(measuring)} would measure: leave one of them out."
            )
    elif not by.startswith("relation:") and by not in (columns := _drawable()):
        raise AtlasError(f"There is no measure {by!r} to draw. There are: {', '.join(columns)}, relation:NAME.")
    if not worth and by in _WORTH:
        raise AtlasError(f"--by {by} draws what heads are worth, and --no-worth does not measure it.")


def _drawable() -> tuple[str, ...]:
    """The values of `--by` for an atlas that is still to be measured."""
    return _BY, *_WORTH, *(column.name for column in columns_of(standard()))


def _check_relation(by: str, examples: dict[str, list[Example]]) -> None:
    """Raise AtlasError if no sentence has the relation that is to be drawn."""
    relations = {pair.relation for group in examples.values() for example in group for pair in example.pairs}
    directions = sorted(direction_of(relation, reverse) for relation in relations for reverse in (False, True))
    if by.startswith("relation:") and by.removeprefix("relation:") not in directions:
        raise AtlasError(f"There is no {by!r} to draw. There are: {', '.join(directions)}.")


def _check_names(paths: Iterable[Path]) -> None:
    """Raise TextError if the name of a file is not UTF-8, as an atlas keeps names."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise TextError(f"The name of the file {str(path)!r} is not UTF-8: rename it.") from None


def _check_words(loaded: models.Loaded, documents: Sequence[corpus.Document], length: int) -> None:
    """Raise TextError before the work if the model's tokenizer leaves nothing of the texts."""
    if documents and not any(corpus.cut(loaded, document, 0, length=length, most=1) for document in documents):
        raise TextError("No text has two tokens that the model knows: there is nothing to measure. Give longer texts.")


def _check_head(head: str, heads: Sequence[int], name: str) -> None:
    layer, number = split_head(head)
    if layer >= len(heads) or number >= heads[layer]:
        raise AtlasError(
            f"There is no head {head}: {name} has {len(heads)} layers with up to {max(heads)} heads, "
            "both counted from 0."
        )


def _shipped_atlas(model: str) -> HeadAtlas | None:
    """The model's atlas in the package; None if there is none."""
    shipped = resources.files("headscope.heads.atlas") / "shipped" / f"{model}.parquet"
    if not re.fullmatch(r"[\w-]+", model) or not shipped.is_file():
        return None
    with resources.as_file(shipped) as shipped_path:
        return HeadAtlas.load(shipped_path)


def _measure(options: _Options, plan: Plan) -> HeadAtlas:
    """The atlas, to which each of several processes measures its share."""
    texts, out = options.texts, options.out
    _check_names([*texts, *options.treebanks])
    if Path("-") in texts and processes() > 1:
        raise AtlasError(
            f"{processes()} processes cannot read one pipe: put the text into a file, and give --text FILE."
        )
    piped = read_pipe() if Path("-") in texts else None
    files = [path for path in texts if path != Path("-")]
    documents = corpus.documents_of(files, text=piped) if texts else None
    corpus.check_different(documents or [])  # before the work
    on_note = partial(terminal.print_line, error=True)
    examples = _frames() | {str(path): read_conllu(path, on_note=on_note) for path in options.treebanks}
    _check_relation(options.by, examples)
    loaded = models.load(options.model, start_token=options.start_token)
    if options.head is not None:
        _check_head(options.head, head_counts(loaded), loaded.name)
    if options.by == "gradient" and not loaded.causal:
        raise AtlasError(
            "--by gradient: a model without a next token has none; --by worth draws what its heads are worth."
        )
    _check_words(loaded, documents or [], plan.length)
    shards = None if out is None else out.with_name(out.name + ".shards")
    if shards is not None:
        _forget_ended(shards)
    with terminal.running("measuring heads", shown=rank() == 0) as on_progress:
        atlas = profile(loaded, texts=documents, relations=examples, plan=plan, shards=shards, on_progress=on_progress)
    if out is not None and shards is not None:
        if rank() == 0:
            HeadAtlas.load(atlas.save(out, force=options.force))  # the shards go only if the file can be read
            _remove(shards)
            terminal.print_line(f"Atlas: {out}")
        else:
            (shards / f"done-{rank()}").touch()
    return atlas


def _forget_ended(shards: Path) -> None:
    """Delete the marks of ended processes that a killed run left: the first process all, the others their own."""
    for path in shards.glob("done-*" if rank() == 0 else f"done-{rank()}"):
        path.unlink(missing_ok=True)


def _remove(shards: Path, patience: float = 60.0) -> None:
    """Remove the shards when no other process reads them any more; after a minute leave them, with a message."""
    deadline = time.monotonic() + patience
    marks = [shards / f"done-{number}" for number in range(1, processes())]
    while not all(path.exists() for path in marks):
        if time.monotonic() > deadline:
            terminal.print_line(f"Some processes are still at work: {shards} stays. Remove it when they have ended.")
            return
        time.sleep(0.1)
    shutil.rmtree(shards, ignore_errors=True)


def _frames() -> dict[str, list[Example]]:
    """The sentences that come with the package."""
    return {"English frames": english_sentences(), "Chinese frames": chinese_sentences()}
