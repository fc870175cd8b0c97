"""The command `headscope` itself: the table of its commands, `--version`, and how errors are reported.

A command's module is imported when the command runs or is asked for its own help: `headscope --help` loads no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headscope.errors import HeadscopeError, is_out_of_memory
from headscope.views.terminal import console as terminal

COMMANDS = {  # name: its module in this folder, and the first line of its help
    "see": ("see", "Show which words look at which, in every head of a model."),
    "heads": ("heads", "Profile every head of a model: what it does, with evidence, and what it is worth."),
    "forbid": ("forbid", "Stop a word from looking at another, and see what the model then expects next."),
    "knock-out": ("forbid", "The same as forbid, by the name that it has in Python."),
    "train": ("train", "Train a small Transformer, and test it on data that it was not trained on."),
    "experiment": ("experiment", "Questions that training answers."),
    "pull": ("models", "Fetch a model, once, into the cache folder."),
    "models": ("models", "List the models that can be pulled: size, licence, source, and which are here."),
    "remove": ("models", "Remove a pulled model from the cache folder: the undo of `headscope pull`."),
}


class _Commands(Mapping[str, Any]):
    """The commands by name, each imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        module = import_module(f"headscope.commands.{COMMANDS[name][0]}")
        return typer.main.get_group(module.app).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Group(TyperGroup):
    """Lists the commands without importing them; reports the errors of the one that runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: Any) -> Any:
        with _errors_reported():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="See what the attention heads of a real model look at, in your own text.\n\nBegin with: headscope see",
)


def main() -> None:
    """Run the command; the entry point."""
    app()


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


@contextmanager
def _errors_reported() -> Iterator[None]:
    """An expected error becomes one message and exit code 1; Ctrl-C becomes exit code 130."""
    try:
        yield
        sys.stdout.flush()  # a full disk is an error here, and not when Python ends
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
    except BrokenPipeError:  # the reader of the output has gone, as in: headscope see | head
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
