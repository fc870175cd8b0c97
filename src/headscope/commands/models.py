"""The commands that keep pretrained models: `headscope pull`, `models` and `remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from headscope import models
from headscope.views.terminal import console as terminal
from headscope.views.terminal.models import print_models

DEFAULT_MODEL = "smollm2"

app = typer.Typer(rich_markup_mode=None)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2 or minilm.")] = DEFAULT_MODEL,
) -> None:
    """Fetch a model, once, into the cache folder. `headscope models` lists them; `headscope remove` undoes it."""
    _pull(name, terminal.Stages())


@app.command(name="models")
def list_models() -> None:
    """List the models that can be pulled: size, licence, source, and which are here."""
    print_models(models.available())


@app.command()
def remove(name: Annotated[str, typer.Argument(help="A model that was pulled.")]) -> None:
    """Remove a pulled model from the cache folder: the undo of `headscope pull`."""
    freed = models.remove(name)
    if freed:
        terminal.print_line(f"{name} is removed; {freed / 1e6:.0f} MB are free again.")
    else:
        terminal.print_line(f"{name} was not here.")


def pull_default(model: str, stages: terminal.Stages | None = None) -> None:
    """Fetch the default model if it is wanted and not here: the first run should work."""
    folders = {entry.name: entry.path for entry in models.available()}
    if model == DEFAULT_MODEL and folders[model] is None:
        terminal.print_line(f"The model {model} is not here yet; it is fetched once.", error=True)
        _pull(model, stages or terminal.Stages())


def _pull(name: str, stages: terminal.Stages) -> None:
    with stages.stage(f"pulling {name}"):
        models.pull(name, on_progress=lambda line: terminal.print_line(line, error=True))
