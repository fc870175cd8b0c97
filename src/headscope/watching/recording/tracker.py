"""The positions of a call's rows and keys in the whole text, while it is generated step by step."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import Tensor

from headscope.watching.hooks import AttentionCall, Forward, unwatched
from headscope.watching.recording.continuation import follows, without_blank_cache

__all__ = ["Position", "Tracker"]


@dataclass(frozen=True)
class Position:
    """Absolute positions of a call's first query and first key."""

    first_row: int
    first_key: int


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
            scores = without_blank_cache(call.scores)
            _, _, rows, keys = scores.shape
            last = self._last.get(site)
            how = None if last is None else follows(last.key, last.position.first_key > 0, scores.key, rows)
            if last is None or how is None or (how[0] == "cross" and forward not in self._continuing):
                self._rejected.pop(site, None)
                position = Position(0 if call.is_cross else max(0, keys - rows), 0)
            elif how[0] == "cross":
                rejected = max((n for (thread, *_), n in self._rejected.items() if thread == site[0]), default=0)
                position = Position(last.position.first_row + last.rows - (rejected - self._rejected.get(site, 0)), 0)
                self._rejected[site] = rejected
            elif how[0] == "cut":
                position = Position(keys - rows, 0)
                self._rejected[site] = self._rejected.get(site, 0) + last.key.shape[2] - how[1]
            else:
                first_key = last.position.first_key + last.key.shape[2] - how[1]
                position = Position(first_key + how[1], first_key)
            if how is not None and how[0] != "cross":
                self._continuing.add(forward)
            self._last[site] = _LastCall(scores.key.detach().clone(), position, rows)
        return position
