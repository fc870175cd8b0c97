"""The positions of a call's rows and keys in the whole text, while it is generated step by step."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import Tensor

from headscope.ops.scores import Scores
from headscope.watching.hooks import AttentionCall, Forward, unwatched
from headscope.watching.recording.continuation import (
    continuation,
    first_position,
    overwritten,
    without_unused_slots,
)

__all__ = ["Position", "Tracker"]


@dataclass(frozen=True)
class Position:
    """Absolute positions of a call's first query and first key; not ``known`` where nothing says what they are."""

    first_row: int
    first_key: int
    known: bool = True


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
                position = _position(call, scores, earlier)
            elif how.is_cross:
                rejected = max((n for (thread, *_), n in self._rejected.items() if thread == site[0]), default=0)
                first_row = last.position.first_row + last.rows - (rejected - self._rejected.get(site, 0))
                position = Position(first_row, 0, last.position.known)
                self._rejected[site] = rejected
            else:
                self._rejected[site] = self._rejected.get(site, 0) + how.rejected
                first_key = last.position.first_key + how.dropped
                position = Position(first_key + scores.shape[3] - rows, first_key, last.position.known)
                self._continuing.add(forward)
            self._last[site] = _LastCall(scores.key.detach().clone(), position, rows)
        return position


def _position(call: AttentionCall, scores: Scores, earlier: Tensor | None) -> Position:
    """The position of a call that continues none, with its used keys.

    It is not known where torch's function has more keys than queries and no mask: they may be a text that was begun
    before, or another one. Nor where a full cache is written to again from its start.
    """
    _, _, rows, keys = scores.shape
    if call.is_cross or call.way == "headscope":
        return Position(0 if call.is_cross else max(0, keys - rows), 0)
    first_row = first_position(scores)
    unclear = call.way == "sdpa" and scores.mask is None and rows < keys
    known = first_row is not None and not unclear and not (earlier is not None and overwritten(earlier, scores, rows))
    return Position(keys - rows if first_row is None else first_row, 0, known)
