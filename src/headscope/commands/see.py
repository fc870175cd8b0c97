"""The command `headscope see`: which words each head of a model attends to, in your own text."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from headscope import models
from headscope.commands.models import DEFAULT_MODEL, pull_default
from headscope.commands.outputs import Force, Output, check_outputs, figure_output
from headscope.commands.pipe import is_piped, text_of
from headscope.commands.words import StartToken, command_for, load_with_words
from headscope.models.tokens import Tokens
from headscope.views.data import links_as_data, print_json
from headscope.views.links import TextLinks, find_links, head_of
from headscope.views.terminal import console as terminal
from headscope.views.terminal.links import print_links
from headscope.views.words import label
from headscope.watching.recording import Recording
from headscope.watching.recording import file as recording_file
from headscope.watching.texts import record_text

DEFAULT_TEXT = "The animal didn't cross the street because it was too tired."

app = typer.Typer(rich_markup_mode=None)

_SEE = """Show which words look at which, in every head of a model.

For a few words of the text (or those that you name) you see the words that they look at, and the heads that do so:
13.8 is layer 13, head 8, both counted from 0. Shares add up to 100 % for each head and word.

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
        "--from",
        metavar="WORD",
        help="The word or phrase that looks; it#2 is the second it. May be given several times.",
    ),
]
To = Annotated[
    str | None,
    typer.Option("--to", metavar="WORD", help="Only links to this word or phrase: the heads that make them."),
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="LAYER.HEAD",
        help="Only this head, as 13.8 (layer 13, head 8, from 0): where each word looks.",
    ),
]
Top = Annotated[
    int | None,
    typer.Option(
        "--top",
        metavar="N",
        min=1,
        help="How many words for each word, and how many heads for each pair; 5 and 4 if every head is shown.",
    ),
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
    Path | None,
    typer.Option(
        "--save", metavar="FILE", help="Save the queries and keys of all heads; headscope.Recording.load reads them."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "-v", "--verbose", help="Also how long each stage took, the memory, and how the text was cut into words."
    ),
]


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
    start_token: StartToken = "auto",
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Show which words look at which; the help text is above."""
    if text is not None and file is not None:
        raise typer.BadParameter("give a text or --file, not both.")
    stages = terminal.Stages(shown=not as_json)
    check_outputs(
        [Output("--save", save, recording_file.KIND), *figure_output(figure)], [file, Path(model)], force=force
    )
    argument = "-" if text is None and file is None and is_piped() else text
    text = text_of(argument, file, DEFAULT_TEXT)
    pull_default(model, stages)
    with stages.stage("loading the model"):
        wanted = [*(from_ or []), *([] if to is None else [to])]
        loaded, found = load_with_words(model, text, wanted, start_token)
    tokens, sources = found.tokens, found.words[: len(from_ or [])]
    target = None if to is None else found.words[-1]
    with stages.stage("running it") as on_progress:
        recording = record_text(loaded, tokens, on_progress=on_progress)
    one_head = None if head is None else head_of(head, recording)
    with stages.stage("reading the heads") as on_progress:
        view = find_links(
            recording,
            tokens,
            sources,
            target=target,
            head=one_head,
            top=top,
            causal=loaded.causal,
            on_progress=on_progress,
        )
    view = replace(view, notes=(*found.notes, *view.notes))
    if as_json:
        print_json(links_as_data(view, model=loaded.name, source=loaded.source))
    else:
        print_links(
            view,
            model=loaded.name,
            causal=loaded.causal,
            command=command_for("see", None if argument == DEFAULT_TEXT else argument, file, model, start_token),
        )
    _write(recording, tokens, view, loaded.name, figure, save, stages, named=bool(wanted), force=force, quiet=as_json)
    if verbose:
        terminal.print_stages(stages, _facts(loaded, tokens))


def _write(
    recording: Recording,
    tokens: Tokens,
    view: TextLinks,
    model: str,
    figure: Path | None,
    save: Path | None,
    stages: terminal.Stages,
    *,
    named: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Write the figure and the recording; print their paths, on the error stream if the output is JSON.

    If words were ``named``, the figure marks their links.
    """
    if figure is not None:
        from headscope.views.figures import maps as figures

        with stages.stage("drawing") as on_progress:
            links = view.links if named else ()
            if view.head is None:
                drawn = figures.thumbnails(
                    recording, tokens, figure, links=links, model=model, force=force, on_progress=on_progress
                )
            else:
                drawn = figures.head_map(recording, tokens, view.head, figure, links=links, model=model, force=force)
        terminal.print_line(f"Figure: {figure}", error=quiet)
        if drawn.missing:
            terminal.print_line(
                f"No installed font has {len(drawn.missing)} of the text's characters ({drawn.missing[:20]}), so the "
                "figure shows boxes for them. Install one that has them, for Chinese Noto Sans CJK.",
                error=True,
            )
    if save is not None:
        with stages.stage("saving"):
            recording.save(save, force=force)
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
