"""What was recorded: calls, and the run that the steps of a generation make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.errors import RecordingError
from headscope.ops.matrix import AttentionMatrix
from headscope.watching.recording.site import CallRows, Site

Layers = int | str | Iterable[int | str] | None
"""Attention sites by number in the order of first calls, or by module name; None: all."""


def layers_of(layers: Layers) -> tuple[int | str, ...] | None:
    """One or several sites as a tuple; None for all. Raises ValueError for what is no number and no name."""
    if layers is None:
        return None
    chosen = (layers,) if isinstance(layers, (int, str)) or not isinstance(layers, Iterable) else tuple(layers)
    wrong = [layer for layer in chosen if isinstance(layer, bool) or not isinstance(layer, (int, str))]
    if wrong:
        raise ValueError(f"a layer is {wrong[0]!r}: wanted its number, counted from 0, or its module's name.")
    return chosen


@dataclass(frozen=True, eq=False)
class Call:
    """One raw attention call of a site."""

    site: Site
    rows: CallRows

    @property
    def name(self) -> str:
        """The module's name."""
        return self.site.name

    @property
    def shape(self) -> torch.Size:
        """(B, H, L, S) of this call."""
        return torch.Size((*self.site.shape[:2], self.rows.num_rows, self.rows.num_keys))

    def matrix(self) -> AttentionMatrix:
        """Its attention weights."""
        return AttentionMatrix._from_scores(self.site.call_scores(self.rows), self.rows.logsumexp)


@dataclass(frozen=True)
class Answer:
    """What ``reduce=`` gave for one call."""

    name: str
    occurrence: int
    shape: torch.Size
    values: Any


class Run(Sequence[AttentionMatrix]):
    """One forward, or the steps of one generation: attention sites in the order of their first calls."""

    def __init__(self, sites: Iterable[Site] = (), valid: Tensor | None = None) -> None:
        self.sites = list(sites)
        self.valid = valid
        self.witness: Site | None = None  # a self-attention outside ``layers``, where all sites are cross-attention
        self._matrices: dict[int, tuple[CallRows, AttentionMatrix]] = {}  # with the last call that each includes

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self[i] for i in range(len(self))[which]]
        index = self._find(which) if isinstance(which, str) else range(len(self))[which]
        site = self.sites[index]
        last, matrix = self._matrices.get(index, (None, None))
        if matrix is None or last is not site.calls[-1]:
            matrix = site.matrix()
            self._matrices[index] = site.calls[-1], matrix
        return matrix

    def _find(self, name: str) -> int:
        numbers = [i for i, site in enumerate(self.sites) if site.name == name]
        if len(numbers) == 1:
            return numbers[0]
        if numbers:
            raise RecordingError(
                f"{name!r} was called {len(numbers)} times in a forward: use one of the numbers {numbers}."
            )
        names = [site.name for site in self.sites]
        listed = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        raise RecordingError(f"no attention site is called {name!r}; there are {len(names)}: {listed}")

    def last_key(self, name: str, occurrence: int) -> Tensor | None:
        """The keys of a site's last call, if it had one in this run."""
        sites = [site for site in (*self.sites, self.witness) if site is not None]
        return next((s.last_key for s in sites if (s.name, s.occurrence) == (name, occurrence)), None)

    def join(self, calls: list[Site], valid: Tensor | None, witness: Site | None = None) -> bool:
        """Take a forward's calls if they, or its witness, continue this run; otherwise leave it as it is."""
        sites = {(site.name, site.occurrence): site for site in self.sites}
        pairs = [(sites.get((call.name, call.occurrence)), call) for call in calls]
        if witness is not None and self.witness is not None:
            pairs.append((self.witness, witness))
        joins = []
        for site, call in pairs:
            how = None if site is None else site.continues(call)
            if site is not None and how is None:
                return False
            joins.append((site, call, how))
        if all(how is not None and how.is_cross for _, _, how in joins):
            return False
        rejected = max((how.rejected for _, _, how in joins if how is not None), default=0)
        for site, call, how in joins:
            if site is None or how is None:
                self.sites.append(call)
            else:
                site.add(call, how, rejected)
        self.valid = _longer(self.valid, valid)
        return True


def _longer(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Which positions are text, from two steps: the second of a sliding window knows its own part alone."""
    if before is None or now is None or before.shape[0] != now.shape[0]:
        return before if now is None else now
    both = now.clone()
    both[:, : before.shape[1]] |= before[:, : now.shape[1]]
    return both
