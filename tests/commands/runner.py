"""Runs the command in this process."""

from typer.testing import CliRunner, Result

from headscope.commands.app import app


def command(*words: str, stdin: str | bytes | None = None) -> Result:
    """What `headscope` with these words printed, and its exit code."""
    return CliRunner().invoke(app, list(words), input=stdin)
