"""The positions of a call's rows and keys in the whole text, while it is generated step by step."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace

from torch import Tensor

from headscope.ops.scores import Scores
from headscope.watching.hooks import AttentionCall, Forward, unwatched
from headscope.watching.recording.continuation import (
    continuation,
    first_position,
    without_unused_slots,
)


@dataclass(frozen=True)
class Position:
    """Positions of a call's first query and first key in the text; not ``known`` where nothing says what they are.

    Virtual tokens before the text have positions below 0.
    """

    first_row: int
    first_key: int
    known: bool = True
    num_virtual: int = 0


@dataclass(frozen=True, eq=False)
class _LastCall:
    """The last call of a site: its keys, its position, and how many rows it had."""

    key: Tensor
    position: Position
    rows: int


class Tracker:
    """Follows each attention site through the steps of a generation, by the content of its keys."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, str, int], _LastCall] = {}
        self._continuing: weakref.WeakSet[Forward] = weakref.WeakSet()  # forwards that brought a text new keys
        self._rejected: dict[tuple[int, str, int], int] = {}  # rows of rejected drafts at each site, so far

    def position(self, call: AttentionCall, forward: Forward) -> Position:
        """The position of this call.

        Queries of self-attention are the last of its keys; those of cross-attention begin at 0.

        The same keys are continued by more rows of cross-attention in a forward in which some self-attention was
        continued; otherwise they are the same text run again.
        """
        site = (threading.get_ident(), call.name, call.occurrence)
        with unwatched():
            last = self._last.get(site)
            earlier = None if last is None else last.key
            scores = without_unused_slots(call, earlier)
            rows = scores.shape[2]
            how = None if earlier is None else continuation(earlier, scores.key, rows)
            if last is None or how is None or (how.is_cross and forward not in self._continuing):
                self._rejected.pop(site, None)
                again = last is not None and how is not None and not call.is_cross and rows == last.rows
                position = last.position if last is not None and again else _position(call, forward, scores, last)
            elif how.is_cross:
                rejected = max((n for (thread, *_), n in self._rejected.items() if thread == site[0]), default=0)
                first_row = last.position.first_row + last.rows - (rejected - self._rejected.get(site, 0))
                position = replace(last.position, first_row=first_row)
                self._rejected[site] = rejected
            else:
                self._rejected[site] = self._rejected.get(site, 0) + how.rejected
                first_key = last.position.first_key + how.dropped
                first_row = first_key + scores.shape[3] - rows
                position = replace(last.position, first_row=first_row, first_key=first_key)
                self._continuing.add(forward)
            self._last[site] = _LastCall(scores.key.detach().clone(), position, rows)
        return position


def _position(call: AttentionCall, forward: Forward, scores: Scores, last: _LastCall | None) -> Position:
    """The position of a call that continues none, with its used keys.

    It is not known in three cases. Torch's function has more keys than queries and no mask: they may be a text that was
    begun before, or another one. The site had other keys before, of which a sliding cache may have dropped some, a ring
    buffer written over some, or a beam search reordered some. There are virtual tokens, and keys besides the text's.
    """
    _, _, rows, keys = scores.shape
    virtual = forward.virtual.number
    if call.is_cross:
        return Position(0, 0, virtual == 0)
    first_row = max(0, keys - rows) if call.way == "headscope" else first_position(scores)
    unclear = call.way == "sdpa" and scores.mask is None and rows < keys
    lost = last is not None and rows < keys and (last.position.first_key > 0 or keys < last.key.shape[2] + rows)
    if virtual is None or first_row is None or unclear or lost:
        return Position(keys - rows, 0, known=False)
    known = not virtual or (forward.virtual.text_shape is not None and keys == forward.virtual.text_shape[1])
    return Position(first_row - virtual, -virtual, known, virtual)
