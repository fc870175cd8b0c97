"""Answers as figures: every head as a thumbnail, or one head's map with the words beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from torch import Tensor

from headscope.models.tokens import Tokens
from headscope.ops.matrix import AttentionMatrix
from headscope.views.figures.file import figure_kind, save_figure
from headscope.views.figures.fonts import Fonts
from headscope.views.links import Head, Link
from headscope.views.words import FEW_WORDS, percent, shown_name, word_map
from headscope.watching.recording import Recording

_BINS = 64  # a thumbnail has at most so many rows and columns
_INCH = 0.62  # a thumbnail with its gap
_LABELLED = 60  # up to so many words stand on a map's axes, each
_WORDS = LinearSegmentedColormap.from_list("words", ["#ffffff", "#c6dbef", "#4292c6", "#08519c", "#041f45"])
_SPECIAL = LinearSegmentedColormap.from_list("special", ["#ffffff", "#bdbdbd", "#404040"])
_HIDDEN = "#f3f0ea"  # what the mask hides
_FRAME = "#d95f02"
_TICKS = [0, 0.05, 0.25, 0.5, 1]


@dataclass(frozen=True)
class Drawn:
    """A figure that was written.

    Attributes:
        path: Where it is.
        missing: Characters of the text that no installed font has; boxes stand for them.
    """

    path: Path
    missing: str


def thumbnails(
    recording: Recording,
    tokens: Tokens,
    path: str | Path,
    *,
    links: Sequence[Link] = (),
    model: str = "",
    force: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Every head of a model over one text, in one figure: layers are rows, heads are columns.

    Each thumbnail is a head's map: a row for each word that looks, a column for each word that is
    looked at. The grey strip at its left is the weight on special tokens. A text of more than 64 words
    is cut into 64 parts, each drawn as if it were one word.

    Args:
        recording: The model's run over the text.
        tokens: The text.
        path: Where to write it: .png, .svg or .pdf.
        links: Links that are framed.
        model: The model's name, for the title.
        force: Whether a file of another kind may be overwritten.
        on_progress: Called after each layer with how many are done, and of how many.

    Raises:
        ValueError: Another extension.
        HeadscopeError: The file cannot be written.
    """
    path = Path(path)
    figure_kind(path)
    layers, heads = len(recording), max(int(site.shape[1]) for site in recording.sites)
    count = len(tokens.words)
    side = min(_BINS, count)
    strip = max(1, round(side / 14))
    first = strip + max(1, round(side / 24))  # where the map begins, beside the strip
    gap = max(2, round(side / 6))
    tall, wide = side + gap, first + side + gap
    mosaic, strips = _mosaic(recording, tokens, (tall, wide), (strip, first), on_progress)
    fonts = Fonts(tokens.text)
    broad, high = heads * _INCH * wide / tall, layers * _INCH
    title = _title(model, f"{layers} layers × {heads} heads")
    lines = _caption(tokens, recording, fonts, side if count > _BINS else 0, links)
    figure, axes = _page((0.65, 0.45, broad, high), title, lines, fonts)
    image = _draw(axes, mosaic, strips)
    index = {word.start: i * side // count for i, word in enumerate(tokens.words)}
    for link in links:
        y, x = link.layer * tall, link.head * wide
        _frame(axes, x - 1, y - 1, first + side + 2, side + 2, 1.0)
        _frame(axes, x + first + index[link.target.start], y + index[link.source.start], 1, 1, 0.5)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_yticks([layer * tall + side / 2 - 0.5 for layer in range(layers)], [str(i) for i in range(layers)])
    axes.set_xticks([head * wide + first + side / 2 - 0.5 for head in range(heads)], [str(i) for i in range(heads)])
    axes.tick_params(length=0, labelsize=8, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.set_ylabel("layer", fontsize=9)
    axes.set_xlabel("head", fontsize=9)
    axes.xaxis.set_label_position("top")
    _bar(figure, axes, image)
    return Drawn(_write(figure, path, fonts, force), fonts.missing)


def head_map(
    recording: Recording,
    tokens: Tokens,
    head: Head,
    path: str | Path,
    *,
    links: Sequence[Link] = (),
    model: str = "",
    force: bool = False,
) -> Drawn:
    """One head's map, with the words on both axes if they are at most 60.

    Args:
        recording: The model's run over the text.
        tokens: The text.
        head: Which head.
        path: Where to write it: .png, .svg or .pdf.
        links: Links that are framed.
        model: The model's name, for the title.
        force: Whether a file of another kind may be overwritten.

    Raises:
        ValueError: Another extension.
        HeadscopeError: The file cannot be written.
    """
    path = Path(path)
    figure_kind(path)
    count = len(tokens.words)
    fonts = Fonts(tokens.text)
    if count <= FEW_WORDS:
        full = word_map(recording[head.layer], tokens, head.head)
        main, on_special = _hidden_blank(full[:, :count], recording[head.layer]), full[:, count]
    else:
        maps, special_shares = _small_maps(recording[head.layer], tokens, 4 * _BINS)
        main, on_special = maps[head.head], special_shares[head.head]
    side = main.shape[0]
    strip, gap = max(1, side // 40), max(1, side // 60)
    whole = torch.full((side, side + strip + gap), torch.nan)
    beside = whole.clone()
    whole[:, strip + gap :] = main
    beside[:, :strip] = on_special[:, None]
    inch = min(8.0, max(4.0, 0.24 * side))
    names = [fonts.shown(shown_name(tokens, word), i) for i, word in enumerate(tokens.words)]
    room = 0.35 + (max(fonts.inches(name, 8) for name in names) if count <= _LABELLED else 0)
    special = " ".join(dict.fromkeys(p for p, s in zip(tokens.pieces, tokens.special, strict=True) if s))
    above = 0.35 + max(room, fonts.inches(special, 8))
    lines = _caption(tokens, recording, fonts, side if count > FEW_WORDS else 0, links)
    broad = inch * (side + strip + gap) / side
    figure, axes = _page((room + 0.3, above, broad, inch), _title(model, f"head {head}"), lines, fonts)
    image = _draw(axes, whole, beside)
    index = {word.start: i * side // count for i, word in enumerate(tokens.words)}
    for link in links:
        _frame(axes, strip + gap + index[link.target.start], index[link.source.start], 1, 1, 1.5)
    _name_axes(axes, names if count <= _LABELLED else [], side, strip, strip + gap, special)
    _bar(figure, axes, image)
    return Drawn(_write(figure, path, fonts, force), fonts.missing)


def _mosaic(
    recording: Recording,
    tokens: Tokens,
    cell: tuple[int, int],
    offsets: tuple[int, int],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """All small maps beside each other, and their strips; ``cell``: rows and columns of each with its gap."""
    layers, heads = len(recording), max(int(site.shape[1]) for site in recording.sites)
    (tall, wide), (strip, first) = cell, offsets
    mosaic = torch.full((layers * tall, heads * wide), torch.nan)
    strips = mosaic.clone()
    for layer in range(layers):
        for head, (one, beside) in enumerate(zip(*_small_maps(recording[layer], tokens, _BINS), strict=True)):
            y, x, side = layer * tall, head * wide, len(one)
            mosaic[y : y + side, x + first : x + first + side] = one
            strips[y : y + side, x : x + strip] = beside[:, None]
        if on_progress is not None:
            on_progress(layer + 1, layers)
    return mosaic, strips


def _small_maps(matrix: AttentionMatrix, tokens: Tokens, parts: int) -> tuple[Tensor, Tensor]:
    """The maps of a layer's heads [H, n, n], and the weight on special tokens [H, n].

    A word is a row and a column; a text of more words than `parts` is cut into so many parts, each taken
    as if it were one word.
    """
    words = torch.tensor(tokens.word_ids())
    count = min(parts, len(tokens.words))
    ids = torch.where(words >= 0, words * count // len(tokens.words), -1)
    columns = torch.where(torch.tensor(tokens.special), count, ids)
    pooled = matrix.pool(ids, columns, "mass")[0].float()
    special = pooled[..., count] if pooled.shape[-1] > count else pooled.new_zeros(pooled.shape[:2])
    return _hidden_blank(pooled[..., :count], matrix), special


def _hidden_blank(maps: Tensor, matrix: AttentionMatrix) -> Tensor:
    """NaN above the diagonal where no word may look ahead."""
    mask = matrix.operands.mask
    if mask is not None and mask.is_causal:
        hidden = torch.ones(maps.shape[-2:], dtype=torch.bool).triu(1)
        return maps.masked_fill(hidden, torch.nan)
    return maps


def _draw(axes: Any, words: Tensor, special: Tensor) -> Any:
    inside = ~(words.isnan() & special.isnan())
    rows = inside.any(1, keepdim=True)
    hidden = torch.where(rows & _within(inside) & words.isnan() & special.isnan(), 1.0, torch.nan)
    options = {"interpolation": "nearest", "aspect": "auto"}
    axes.imshow(hidden.numpy(), cmap=LinearSegmentedColormap.from_list("hidden", [_HIDDEN] * 2), **options)
    axes.imshow(special.numpy(), cmap=_SPECIAL, norm=PowerNorm(0.5, 0, 1), **options)
    return axes.imshow(words.numpy(), cmap=_WORDS, norm=PowerNorm(0.5, 0, 1), **options)


def _within(inside: Tensor) -> Tensor:
    """Columns that hold a weight in some row: not the gaps between maps."""
    return inside.any(0, keepdim=True)


def _frame(axes: Any, x: float, y: float, width: float, height: float, line: float) -> None:
    """A frame around cells, from the one at (x, y)."""
    axes.add_patch(
        Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=_FRAME, linewidth=line, clip_on=False)
    )


def _name_axes(axes: Any, names: Sequence[str], side: int, strip: int, first: int, special: str) -> None:
    axes.set_ylabel("the word that looks", fontsize=9)
    axes.set_xlabel("the word that is looked at", fontsize=9)
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labelsize=8, top=True, labeltop=True, bottom=False, labelbottom=False)
    start = [((strip - 1) / 2, special)] if special else []
    if names:
        axes.set_yticks(range(side), names)
        ticks = [*start, *((first + i, name) for i, name in enumerate(names))]
    else:
        axes.set_yticks([])
        ticks = start
    axes.set_xticks([at for at, _ in ticks], [name for _, name in ticks], rotation=90)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _title(model: str, what: str) -> str:
    return f"{model}: {what}" if model else what[0].upper() + what[1:]


def _caption(tokens: Tokens, recording: Recording, fonts: Fonts, parts: int, links: Sequence[Link]) -> list[str]:
    text = " ".join(tokens.text.split())
    text = text if len(text) <= 160 else text[:159] + "…"
    quoted = f"“{fonts.drawable(text)}”"
    special = " and ".join(dict.fromkeys(p for p, s in zip(tokens.pieces, tokens.special, strict=True) if s))
    read = "Rows: words that look, from the top. Columns: words looked at, from the left. "
    if parts:
        read = f"The text is cut into {parts} equal parts, and a part drawn as if it were a word. " + read
    read += f"Grey strip: the weight on {special}." if special else ""
    if links:
        pairs = dict.fromkeys(f"{shown_name(tokens, k.source)} → {shown_name(tokens, k.target)}" for k in links)
        read += f" Framed: {', '.join(list(pairs)[:8])}{' …' if len(pairs) > 8 else ''}, where they are strongest."
    if recording.proof is None:
        check = "Not checked: these weights × values could not be compared with the model's own attention output."
    else:
        check = f"Checked: these weights × values give the model's own attention output (error {recording.proof:.0e})."
    return [quoted, read, check]


def _page(
    room: tuple[float, float, float, float], title: str, lines: Sequence[str], fonts: Fonts
) -> tuple[Figure, Any]:
    """A figure with its title and lines at the top; axes with some room left and above, so wide and high (inches)."""
    left, above, broad, high = room
    width = max(6.0, left + broad + 1.0)
    titles = fonts.wrapped(title, width - 0.5, 12, "bold")
    wrapped = [part for line in lines for part in fonts.wrapped(line, width - 0.5, 7.5)]
    below = 0.35 + 0.2 * len(titles)
    top = below + 0.05 + 0.165 * len(wrapped) + above
    height = top + high + 0.3
    figure = Figure(figsize=(width, height), dpi=150)
    heading: dict[str, Any] = {"fontsize": 12, "fontweight": "bold", "va": "top"}
    figure.text(0.25 / width, 1 - 0.21 / height, "\n".join(titles), **heading)
    style: dict[str, Any] = {"fontsize": 7.5, "va": "top", "linespacing": 1.5, "color": "#333333"}
    figure.text(0.25 / width, 1 - below / height, "\n".join(wrapped), **style)
    return figure, figure.add_axes((left / width, 0.3 / height, broad / width, high / height))


def _bar(figure: Figure, axes: Any, image: Any) -> None:
    """The colour bar, at the right of the axes' upper end."""
    width, height = figure.get_size_inches()
    box = axes.get_position()
    rectangle = (box.x1 + 0.25 / width, box.y1 - 1.8 / height, 0.12 / width, 1.6 / height)
    bar = figure.colorbar(image, cax=figure.add_axes(rectangle), ticks=_TICKS)
    bar.ax.set_yticklabels([percent(tick) for tick in _TICKS], fontsize=7)
    bar.ax.set_title("share", fontsize=8)


def _write(figure: Figure, path: Path, fonts: Fonts, force: bool) -> Path:
    for text in figure.findobj(Text):
        text.set_fontfamily(fonts.families)
        text.set_parse_math(False)
    return save_figure(figure, path, force=force)
