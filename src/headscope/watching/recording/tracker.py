"""The positions of a call's rows and keys in the whole text, while it is generated step by step."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass

from torch import Tensor

from headscope.watching.hooks import AttentionCall, Forward, unwatched
from headscope.watching.recording.continuation import follows, without_blank_cache

__all__ = ["Place", "Tracker"]


@dataclass(frozen=True)
class Place:
    """Absolute positions of a call's first query and first key."""

    first_row: int
    first_key: int


class Tracker:
    """Follows each attention site through the steps of a generation, by the content of its keys."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, str, int], tuple[Tensor, Place, int]] = {}  # keys, place, rows of each site
        self._continuing: weakref.WeakSet[Forward] = weakref.WeakSet()  # forwards that brought a text new keys
        self._rejected: dict[tuple[int, str, int], int] = {}  # rows of rejected drafts at each site, so far

    def place(self, call: AttentionCall, forward: Forward) -> Place:
        """The place of this call.

        Queries of self-attention are the last of its keys; those of cross-attention begin at 0.

        The same keys are continued by more rows of cross-attention in a forward in which some self-attention was
        continued; otherwise they are the same text run again.
        """
        site = (threading.get_ident(), call.name, call.occurrence)
        with unwatched():
            scores = without_blank_cache(call.scores)
            _, _, rows, keys = scores.shape
            before = self._last.get(site)
            how = None if before is None else follows(before[0], before[1].first_key > 0, scores.key, rows)
            if before is None or how is None or (how[0] == "cross" and forward not in self._continuing):
                self._rejected.pop(site, None)
                place = Place(0 if call.is_cross else max(0, keys - rows), 0)
            elif how[0] == "cross":
                rejected = max((n for (thread, *_), n in self._rejected.items() if thread == site[0]), default=0)
                place = Place(before[1].first_row + before[2] - (rejected - self._rejected.get(site, 0)), 0)
                self._rejected[site] = rejected
            elif how[0] == "cut":
                place = Place(keys - rows, 0)
                self._rejected[site] = self._rejected.get(site, 0) + before[0].shape[2] - how[1]
            else:
                first_key = before[1].first_key + before[0].shape[2] - how[1]
                place = Place(first_key + how[1], first_key)
            if how is not None and how[0] != "cross":
                self._continuing.add(forward)
            self._last[site] = (scores.key.detach().clone(), place, rows)
        return place
