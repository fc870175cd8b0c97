"""The command `headscope heads`: what each head of a model does, and what it is worth."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from headscope import models
from headscope.commands.models import DEFAULT_MODEL, pull_default
from headscope.commands.pipe import read_pipe
from headscope.distributed import processes, rank
from headscope.errors import AtlasError, HeadscopeError, MissingExtra, TextError, TreebankError
from headscope.files import check_writable
from headscope.heads import corpus
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.measuring import columns_of
from headscope.heads.atlas.profiler import Plan, head_counts, profile, weights_hash
from headscope.heads.measures import standard
from headscope.heads.relations import Example
from headscope.heads.relations.counts import direction_of, with_arrow
from headscope.heads.relations.sentences.treebank import read_conllu
from headscope.views.links import split_head
from headscope.views.terminal import console as terminal
from headscope.views.terminal import heads as terminal_heads

__all__ = ["app"]

_BY = "roles"
_WORTH = ("worth", "ablation_zero", "ablation_mean", "gradient")

app = typer.Typer(rich_markup_mode=None)

_HELP = """Profile every head of a model: what it does, with evidence, and what it is worth.

Each head is measured on texts (how evenly it looks, how far, at which distance, what rests on the first token …), on
random tokens that come twice, and on sentences in which it is known which word belongs to which. It gets a role where
a measure is strong on texts that it was not picked on. Then each head is left out, to see what the model loses.

For the default models the answer is in the package and comes at once. With a text or a treebank of your own, with
--again, or for another model, it is measured: 10 to 20 minutes for the default model on two slow cores.

\b
Examples:
  headscope heads                                the default model's roles, and its most valuable heads
  headscope heads --head 18.6                    all about one head, with its best and worst examples
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
        help="smollm2, minilm, a folder, a .gguf file or a hub name; of --atlas, where it is now.",
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
    str | None, typer.Option("--head", metavar="LAYER.HEAD", help="All about one head, with examples in words.")
]
Figure = Annotated[
    Path | None, typer.Option("--figure", metavar="FILE", help="Draw all heads by a measure: .png, .svg or .pdf.")
]
By = Annotated[
    str, typer.Option("--by", metavar="COLUMN", help="The measure to draw; roles and worth are figures of their own.")
]
Worth = Annotated[bool, typer.Option("--worth/--no-worth", help="Whether to measure what heads are worth.")]
Length = Annotated[int, typer.Option("--length", min=8, help="Tokens in a piece of text.")]
Pieces = Annotated[int, typer.Option("--pieces", min=0, help="Pieces of each text, from its start; 0: all of it.")]
All = Annotated[bool, typer.Option("--all", help="Every head of each role and by worth, not the first few.")]
Again = Annotated[bool, typer.Option("--again", help="Measure anew what the package already holds.")]


class _ManyFiles(TyperCommand):
    """Lets several files follow an option, as a shell's ``--text *.txt`` gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Each file gets its option; the command takes nothing that is not an option's."""
        given, option, files = list[str](), "", 0
        for arg in args:
            if arg.startswith("-") and arg != "-":
                option, equals, _ = arg.partition("=")
                files = len(equals)
            elif option in ("--text", "--treebank"):
                given += [option] if files else []
                files += 1
            given.append(arg)
        return super().parse_args(ctx, given)


@app.command(name="heads", help=_HELP, cls=_ManyFiles)
def heads(
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
) -> None:
    """Profile every head of a model; the help text is above."""
    _check(out, atlas, head, figure, by, worth)
    asked = {"--text": text, "--treebank": treebank, "--out": out, "--again": again, "--no-worth": not worth}
    asked |= {"--length": length != Plan.length, "--pieces": pieces != Plan.pieces}
    documents: Sequence[corpus.Document] = ()
    found = _held(model, atlas, [option for option, given in asked.items() if given])
    if found is None:
        pull_default(model)
        plan = Plan(length=length, pieces=pieces, worth=Plan.worth if worth else 0)
        given = _Given(model, text or [], treebank or [], out, head, by)
        found, documents = _measure(given, plan)
    if rank():
        return
    if head is not None:
        _one_head(found, head, found.name if atlas is None or model == DEFAULT_MODEL else model, documents)
    else:
        terminal_heads.print_atlas(found, all_heads=all_heads)
    if figure is not None:
        from headscope.views.figures import atlas as atlas_figures

        atlas_figures.draw(found, figure, by=by)
        terminal.print_line(f"Figure: {figure}")


@dataclass(frozen=True)
class _Given:
    """What a run that measures was given."""

    model: str
    texts: list[Path]
    treebanks: list[Path]
    out: Path | None
    head: str | None
    by: str


def _check(out: Path | None, atlas: Path | None, head: str | None, figure: Path | None, by: str, worth: bool) -> None:
    """Say what cannot be before anything is measured."""
    if head is not None:
        split_head(head)
    if figure is None and by != _BY:
        raise AtlasError(f"--by {by} says what a figure shall show: give --figure FILE, too.")
    if figure is not None:
        from headscope.views.figures import maps as figures

        figures.check_extension(figure)
        if atlas is None and not by.startswith("relation:") and by not in (known := _drawn()):
            raise AtlasError(f"There is no measure {by!r} to draw. There are: {', '.join(known)}, relation:NAME.")
        if not worth and by in _WORTH:
            raise AtlasError(f"--by {by} draws what heads are worth, and --no-worth does not measure it.")
    for path in (out, figure):
        if path is not None:
            check_writable(path)


def _drawn() -> tuple[str, ...]:
    """What `--by` can be for an atlas that is still to be measured."""
    columns = (column.name for column in columns_of(standard()))
    return _BY, *_WORTH, *columns


def _check_relation(by: str, examples: dict[str, list[Example]]) -> None:
    """Is the relation to be drawn in any of the sentences?"""
    found = {pair.relation for given in examples.values() for example in given for pair in example.pairs}
    directions = sorted(direction_of(relation, reverse) for relation in found for reverse in (False, True))
    if by.startswith("relation:") and by.removeprefix("relation:") not in directions:
        raise AtlasError(f"There is no {by!r} to draw. There are: {', '.join(directions)}.")


def _check_names(paths: Iterable[Path]) -> None:
    """An atlas keeps the names of its files as text."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise TextError(f"The name of the file {str(path)!r} is not UTF-8: rename it.") from None


def _check_words(loaded: models.Loaded, documents: Sequence[corpus.Document], length: int) -> None:
    """Texts of which the model's tokenizer leaves nothing say so before the work."""
    if documents and not any(corpus.cut(loaded, document, 0, length=length, most=1) for document in documents):
        raise TextError("No text has two tokens that the model knows: there is nothing to measure. Give longer ones.")


def _check_head(head: str, heads: Sequence[int], name: str) -> None:
    layer, number = split_head(head)
    if layer >= len(heads) or number >= heads[layer]:
        raise AtlasError(
            f"There is no head {head}: {name} has {len(heads)} layers with up to {max(heads)} heads, "
            "both counted from 0."
        )


def _held(model: str, given: Path | None, asked: list[str]) -> HeadAtlas | None:
    """The atlas of a file, or the one in the package; None if it has to be measured, as some options say."""
    if given is not None and asked:
        raise AtlasError(
            f"--atlas shows what was measured, and {', '.join(asked)} would measure: leave one of them out."
        )
    if given is not None:
        return HeadAtlas.load(given)
    if asked:
        return None
    inside = resources.files("headscope.heads.atlas") / "shipped" / f"{model}.parquet"
    if not re.fullmatch(r"[\w-]+", model) or not inside.is_file():
        return None
    with resources.as_file(inside) as path:
        return HeadAtlas.load(path)


def _measure(given: _Given, plan: Plan) -> tuple[HeadAtlas, Sequence[corpus.Document]]:
    """Profile the model; with several processes each does its share. Gives the texts, too."""
    texts, out = given.texts, given.out
    _check_names([*texts, *given.treebanks])
    if Path("-") in texts and processes() > 1:
        raise AtlasError(
            f"{processes()} processes cannot read one pipe: put the text into a file, and give --text FILE."
        )
    piped = read_pipe() if Path("-") in texts else None
    files = [path for path in texts if path != Path("-")]
    documents = corpus.documents_of(files, text=piped) if texts else None
    corpus.check_different(documents or [])  # what cannot be used is said before the work
    examples = _frames() | {str(path): read_conllu(path) for path in given.treebanks}
    _check_relation(given.by, examples)
    loaded = models.load(given.model)
    if given.head is not None:
        _check_head(given.head, head_counts(loaded), loaded.name)
    if given.by == "gradient" and not loaded.causal:
        raise AtlasError(
            "--by gradient: a model without a next token has none; --by worth draws what its heads are worth."
        )
    _check_words(loaded, documents or [], plan.length)
    shards = None if out is None else out.with_name(out.name + ".shards")
    if shards is not None:
        _forget_ended(shards)
    with terminal.running("measuring heads", shown=rank() == 0) as tell:
        found = profile(loaded, texts=documents, relations=examples, plan=plan, shards=shards, on_progress=tell)
    if out is not None and shards is not None:
        if rank() == 0:
            HeadAtlas.load(found.save(out))  # can it be read? only then may what it was made of go
            _remove(shards)
            terminal.print_line(f"Atlas: {out}")
        else:
            (shards / f"done-{rank()}").touch()
    return found, documents or ()


def _forget_ended(shards: Path) -> None:
    """Who ended in a killed run has not ended in this one: the first process forgets all, the others themselves."""
    for path in shards.glob("done-*" if rank() == 0 else f"done-{rank()}"):
        path.unlink(missing_ok=True)


def _remove(shards: Path, patience: float = 60.0) -> None:
    """Remove finished shards when no other process reads them any more; leave them, and say so, after a minute."""
    until = time.monotonic() + patience
    waiting = [shards / f"done-{number}" for number in range(1, processes())]
    while not all(path.exists() for path in waiting):
        if time.monotonic() > until:
            terminal.print_line(f"Some processes are still at work: {shards} stays. Remove it when they have ended.")
            return
        time.sleep(0.1)
    shutil.rmtree(shards, ignore_errors=True)


def _one_head(atlas: HeadAtlas, head: str, model: str, documents: Sequence[corpus.Document]) -> None:
    """All about one head; its examples need the model, and are left out where it is not here.

    ``documents`` are the texts that were just read; none, if the atlas was there before.
    """
    _check_head(head, atlas.heads, atlas.name)
    layer, number = split_head(head)
    terminal_heads.print_head(atlas, layer, number)
    try:
        loaded = models.load(model)
    except HeadscopeError as error:
        terminal.print_line(f"Its examples in words need the model: {error}", error=True)
        return
    if weights_hash(loaded.model) != atlas.info["model"]["weights"]:
        told = f"Its examples in words are left out: {model} has other weights than the atlas was made of."
        terminal.print_line(told, error=True)
        return
    _examples(atlas, loaded, layer, number, documents)


def _frames() -> dict[str, list[Example]]:
    """The sentences that come with the package."""
    from headscope.heads.relations import chinese_sentences, english_sentences

    return {"English frames": english_sentences(), "Chinese frames": chinese_sentences()}


def _examples(atlas: HeadAtlas, loaded: models.Loaded, layer: int, head: int, given: Sequence[corpus.Document]) -> None:
    """Examples from the texts and sentences that the atlas was made of, as far as they are still here."""
    from headscope.heads.examples import pair_examples, token_examples

    with terminal.running("reading examples") as _:
        documents = list(islice(_texts_of(atlas, given), 4))
        if not documents:
            terminal.print_line(
                "The atlas' texts are not here, or have changed: examples are from texts of this machine."
            )
        best, worst = token_examples(loaded, documents or corpus.default_documents(), layer, head)
    terminal_heads.print_examples(best, worst)
    scored = [row for row in atlas.relation_scores() if (row.layer, row.head) == (layer, head) and not row.too_fixed]
    for row in sorted(scored, key=lambda row: row.baseline - row.accuracy)[:1]:
        asked = [e for e in _sentences_of(atlas) if e.half == 1 and any(p.relation == row.relation for p in e.pairs)]
        looks = pair_examples(loaded, asked[::3][:24], row.relation, layer, head, reverse=row.direction != row.relation)
        if looks:
            terminal_heads.print_pairs(looks, with_arrow(row.direction))


def _texts_of(atlas: HeadAtlas, given: Sequence[corpus.Document]) -> Iterator[corpus.Document]:
    """Those of the atlas' texts that are at hand or can be read again, and are as they were."""
    known = {document.name: document for document in (*corpus.default_documents(), *given)}
    for name, held in atlas.info["texts"].items():
        document = known.get(name) or corpus.documents_of([Path(name)])[0]
        with suppress(TextError):
            if corpus.digest(document) == held:
                yield document


def _sentences_of(atlas: HeadAtlas) -> list[Example]:
    """The sentences of the atlas' collections; of treebanks, those whose files are still here."""
    frames = _frames()
    found: list[Example] = []
    for name in atlas.info["examples"]:
        with suppress(TreebankError, MissingExtra):
            found += frames[name] if name in frames else read_conllu(name)
    return found
