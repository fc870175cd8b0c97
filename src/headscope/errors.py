"""The errors that Headscope raises.

Each says what came, what was wanted and what to do. All derive from `HeadscopeError`, so
`except HeadscopeError` catches exactly the errors of this library. Arguments of the
wrong shape or value raise `ValueError`, as everywhere in Python.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class HeadscopeError(Exception):
    """Base of all errors that Headscope raises about a model, a text or a file.

    >>> issubclass(TextError, HeadscopeError)
    True
    """


class TextError(HeadscopeError):
    """A text that cannot be tokenized, or a word that is missing or occurs twice."""


class ModelNotFound(HeadscopeError):
    """A model that is not on this machine: an unknown name, not pulled yet, or the hub is unreachable."""


class DownloadError(HeadscopeError):
    """A pull that failed: no connection, a wrong checksum, or a full disk."""


class UnsupportedAttention(HeadscopeError):
    """An attention call of a kind that cannot be recorded or edited faithfully."""


class NothingSeen(HeadscopeError):
    """A model ran inside record or edit without an attention call."""


class RecordingError(HeadscopeError):
    """A recording that cannot be read or written, or does not contain what was wanted."""


class ProofError(HeadscopeError):
    """The rebuilt weights times the values do not match what the model's attention returned."""


class EditError(HeadscopeError):
    """An edit that cannot be applied to this model, or would not take effect."""


class TreebankError(HeadscopeError):
    """A treebank file that is not in CoNLL-U format, with the number of the wrong line."""


class AtlasError(HeadscopeError):
    """An atlas that cannot be read or merged, or does not contain what was wanted."""


class MissingExtra(HeadscopeError, ImportError):
    """An optional package that is not installed, with the command that installs it."""


@contextmanager
def optional_imports(extra: str, purpose: str) -> Iterator[None]:
    """Imports of packages that only one extra of headscope installs.

    Args:
        extra: The extra, as in ``pip install 'headscope[extra]'``.
        purpose: What needs the packages, in the plural.

    Raises:
        MissingExtra: One of the packages is not installed.

    >>> with optional_imports("figures", "Figures"):
    ...     import no_such_package
    Traceback (most recent call last):
    headscope.errors.MissingExtra: Figures need the package no_such_package, which is not installed. \
Run: pip install 'headscope[figures]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "of that extra").partition(".")[0]
        raise MissingExtra(
            f"{purpose} need the package {package}, which is not installed. Run: pip install 'headscope[{extra}]'"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch on the CPU raises a plain RuntimeError for it."""
    message = str(error).lower()
    phrases = ("out of memory", "can't allocate", "cannot allocate", "not enough memory", "unable to mmap")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in message for phrase in phrases)
    )
