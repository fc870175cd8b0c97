"""The command line: `headscope see`, `heads`, `forbid`, `train`, `experiment`, and what keeps models."""

from headscope.commands.app import main

__all__ = ["main"]
