"""A figure's file: its format by its extension, and how it is written."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from headscope.files import FileKind, kind_by_start, whole_file

EXTENSIONS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<svg", ".pdf": b"%PDF-"}  # and what each file has at its start


def figure_kind(path: Path) -> FileKind:
    """The kind of figure that a name asks for; call it before the work.

    Raises:
        ValueError: The name ends in something else than .png, .svg or .pdf.
    """
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        ending = repr(path.suffix) if path.suffix else "no extension"
        raise ValueError(f"{path} has {ending}: a figure is .png, .svg or .pdf, by the end of its name.")
    return kind_by_start(f"a {extension} figure", EXTENSIONS[extension])


def save_figure(figure: Figure, path: Path, *, force: bool = False) -> Path:
    """Write a figure, whole or not at all.

    Raises:
        ValueError: Another extension.
        HeadscopeError: The file cannot be written, or another kind of file is there and ``force`` is False.
    """
    kind = figure_kind(path)
    FigureCanvasAgg(figure)
    with whole_file(path, kind, force=force) as scratch:
        figure.savefig(scratch, format=path.suffix[1:].lower(), facecolor="white")
    return path
