"""The command line: a file for each command, `headscope see`, `heads`, `forbid`, `train` and so on."""

from headscope.commands.app import main

__all__ = ["main"]
