"""The command `headscope`: what the heads of a real model attend to in your own text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from headscope import models
from headscope.commands.forbid import add_forbid
from headscope.commands.heads import add_heads
from headscope.commands.pipe import is_piped, read_pipe
from headscope.commands.train import add_commands
from headscope.errors import HeadscopeError, TextError, is_out_of_memory
from headscope.files import check_writable
from headscope.models.tokens import Tokens, tokenize
from headscope.views import data as output
from headscope.views.links import View, ask, head_of
from headscope.views.terminal import console as terminal
from headscope.views.terminal.links import print_view
from headscope.views.terminal.models import print_models
from headscope.views.words import label
from headscope.watching.recording import Recording
from headscope.watching.texts import record_text

DEFAULT_MODEL = "smollm2"
DEFAULT_TEXT = "The animal didn't cross the street because it was too tired."

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See what the attention heads of a real model look at, in your own text.\n\nBegin with: headscope see",
)

_SEE = """Show which words look at which, in every head of a model.

For a few words of the text (or those that you name) you see the words that they look at, and the heads that do so:
13.8 is layer 13, head 8, both counted from 0. Shares add up to 100% for each head and word.

\b
Examples:
  headscope see "The cup fell off the table because it was wet."
  headscope see --from it --to animal        which heads link "it" to "animal"?
  headscope see --head 13.8                  where does one head look, word by word?
  headscope see --figure heads.png           every head as a small map
  headscope see --file story.txt --from she#2
  headscope see --model minilm --json > answer.json
  cat story.txt | headscope see -

A text that begins with a dash goes after two dashes: headscope see -- "- a list".
"""

Text = Annotated[str | None, typer.Argument(help="The text; - reads it from a pipe.", show_default=DEFAULT_TEXT)]
Model = Annotated[
    str, typer.Option("--model", metavar="NAME", help="smollm2, minilm, a folder, a .gguf file or a hub name.")
]
From = Annotated[
    list[str] | None,
    typer.Option(
        "--from", metavar="WORD", help="The word that looks; it#2 is the second it. May be given several times."
    ),
]
To = Annotated[
    str | None, typer.Option("--to", metavar="WORD", help="Only links to this word: the heads that make them.")
]
HeadOption = Annotated[
    str | None, typer.Option("--head", metavar="LAYER.HEAD", help="Only this head, as 13.8: where each word looks.")
]
Top = Annotated[
    int | None,
    typer.Option("--top", metavar="N", min=1, help="How many words for each word, and how many heads for each pair."),
]
AsJson = Annotated[bool, typer.Option("--json", help="The whole answer as JSON, on the standard output.")]
FigureOption = Annotated[
    Path | None,
    typer.Option(
        "--figure", metavar="FILE", help="Draw every head (with --head: that head) into a .png, .svg or .pdf."
    ),
]
File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="Read the text from a UTF-8 file.")]
Save = Annotated[
    Path | None, typer.Option("--save", metavar="FILE", help="Save the recording; Recording.load reads it in Python.")
]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Times, memory and counts.")]


def main() -> None:
    """Run the command; the entry point."""
    app()


@contextmanager
def _reported() -> Iterator[None]:
    """An error that is expected becomes one message and exit code 1; Ctrl-C becomes 130."""
    try:
        yield
        sys.stdout.flush()  # a disk that is full says so here, and not when Python ends
    except (HeadscopeError, ValueError) as error:
        terminal.print_error(str(error))
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        terminal.print_error(
            "There is not enough memory for this text with this model. Try a shorter one; heads: --length."
        )
        raise typer.Exit(1) from None
    except BrokenPipeError:  # the reader of our output has gone, as in: headscope see | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        terminal.print_error(f"{error.filename or 'The output'}: {error.strerror or error}.")
        if error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        terminal.print_line("Stopped.", error=True)
        raise typer.Exit(130) from None


@app.callback(invoke_without_command=True)
def _start(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        terminal.print_line(f"headscope {_version()}")
        raise typer.Exit()


def _version() -> str:
    try:
        return version("headscope")
    except PackageNotFoundError:
        return "(not installed)"


@app.command(help=_SEE)
def see(
    text: Text = None,
    model: Model = DEFAULT_MODEL,
    from_: From = None,
    to: To = None,
    head: HeadOption = None,
    top: Top = None,
    as_json: AsJson = False,
    figure: FigureOption = None,
    file: File = None,
    save: Save = None,
    verbose: Verbose = False,
) -> None:
    """Show which words look at which; the help text is above."""
    if text is not None and file is not None:
        raise typer.BadParameter("give a text or --file, not both.")
    with _reported():
        stages = terminal.Stages(shown=not as_json)
        read = _text(text, file)
        _check_outputs(figure, save)
        _pull_default(model, stages)
        with stages.stage("loading the model"):
            loaded = models.load(model)
        tokens = tokenize(read, loaded.tokenizer, start_token_id=loaded.start_token_id, limit=loaded.context)
        sources = [tokens.find(word) for word in from_ or []]
        target = None if to is None else tokens.find(to)
        with stages.stage("running it") as tell:
            recording = record_text(loaded, tokens, on_progress=tell)
        chosen = None if head is None else head_of(head, recording)
        with stages.stage("reading the heads") as tell:
            view = ask(
                recording, tokens, sources, target=target, head=chosen, top=top, causal=loaded.causal, on_layer=tell
            )
        if as_json:
            output.print_json(output.as_data(view, model=loaded.name, source=loaded.source))
        else:
            print_view(view, model=loaded.name, causal=loaded.causal)
        _write(recording, tokens, view, loaded.name, figure, save, stages, quiet=as_json)
        if verbose:
            terminal.print_stages(stages, _facts(loaded, tokens))


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2 or minilm.")] = DEFAULT_MODEL,
) -> None:
    """Fetch a model, once, into the cache folder. `headscope models` lists them; `headscope remove` undoes it."""
    with _reported():
        _pull(name, terminal.Stages())


@app.command(name="models")
def models_() -> None:
    """List the models that can be pulled: size, licence, source, and which are here."""
    with _reported():
        print_models(models.available())


@app.command()
def remove(name: Annotated[str, typer.Argument(help="A model that was pulled.")]) -> None:
    """Remove a pulled model from the cache folder: the undo of `headscope pull`."""
    with _reported():
        freed = models.remove(name)
        told = f"{name} is removed; {freed / 1e6:.0f} MB are free again." if freed else f"{name} was not here."
        terminal.print_line(told)


add_commands(app, _reported)
add_heads(app, _reported, lambda model: _pull_default(model))
add_forbid(app, _reported, lambda model: _pull_default(model))


def _text(text: str | None, file: Path | None) -> str:
    """The text that was given, that of the file, what comes through a pipe, or the default one."""
    if file is not None:
        try:
            return file.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TextError(f"{file} is not UTF-8 text: byte {error.start} cannot be read. Save it as UTF-8.") from None
        except OSError as error:
            raise TextError(f"Cannot read {file}: {error.strerror}.") from None
    if text == "-" or (text is None and is_piped()):
        return read_pipe()
    return DEFAULT_TEXT if text is None else text


def _check_outputs(figure: Path | None, save: Path | None) -> None:
    """Find out before the work is done whether the files can be made."""
    if figure is not None:
        from headscope.views.figures import maps as figures

        figures.check_extension(figure)
    for path in (figure, save):
        if path is not None:
            check_writable(path)


def _pull_default(model: str, stages: terminal.Stages | None = None) -> None:
    """Fetch the default model if it is wanted and not here: the first run should work."""
    here = {entry.name: entry.path for entry in models.available()}
    if model == DEFAULT_MODEL and here[model] is None:
        terminal.print_line(f"The model {model} is not here yet; it is fetched once.", error=True)
        _pull(model, stages or terminal.Stages())


def _pull(name: str, stages: terminal.Stages) -> None:
    with stages.stage(f"pulling {name}"):
        models.pull(name, report=lambda line: terminal.print_line(line, error=True))


def _write(
    recording: Recording,
    tokens: Tokens,
    view: View,
    model: str,
    figure: Path | None,
    save: Path | None,
    stages: terminal.Stages,
    *,
    quiet: bool,
) -> None:
    """The files that were asked for; their paths are told, on the error stream if the output is JSON."""
    if figure is not None:
        from headscope.views.figures import maps as figures

        with stages.stage("drawing") as tell:
            if view.head is None:
                drawn = figures.thumbnails(recording, tokens, figure, model=model, on_layer=tell)
            else:
                drawn = figures.head_map(recording, tokens, view.head, figure, model=model)
        terminal.print_line(f"Figure: {figure}", error=quiet)
        if drawn.missing:
            terminal.print_line(
                f"No installed font has {len(drawn.missing)} of the text's characters ({drawn.missing[:20]}), so the "
                "figure shows numbers for their words. Install one that has them, for Chinese Noto Sans CJK.",
                error=True,
            )
    if save is not None:
        with stages.stage("saving"):
            recording.save(save)
        terminal.print_line(f"Recording: {save}", error=quiet)


def _facts(loaded: models.Loaded, tokens: Tokens) -> dict[str, str]:
    facts = {
        "model": f"{loaded.name} ({loaded.source})",
        "text": f"{len(tokens)} tokens, {len(tokens.words)} words",
        "words": " ".join(label(tokens, word) for word in tokens.words[:20]),
    }
    try:
        import resource
    except ImportError:  # Windows
        return facts
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return facts | {"peak memory": f"{peak / 1e9:.2f} GB"}
