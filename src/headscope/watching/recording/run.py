"""What was recorded: sites, calls, and the run that the steps of a generation make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.errors import RecordingError
from headscope.ops.matrix import AttentionMatrix
from headscope.watching.recording.site import Captured, SiteCalls

__all__ = ["Answer", "Call", "Layers", "Run", "Site", "layers_of"]

Layers = int | str | Iterable[int | str] | None
"""Attention sites by number in the order of first calls, or by module name; None: all."""


def layers_of(layers: Layers) -> tuple[int | str, ...] | None:
    """One or several sites as a tuple; None for all. Raises ValueError for what is no number and no name."""
    if layers is None:
        return None
    found = (layers,) if isinstance(layers, (int, str)) or not isinstance(layers, Iterable) else tuple(layers)
    wrong = [layer for layer in found if isinstance(layer, bool) or not isinstance(layer, (int, str))]
    if wrong:
        raise ValueError(f"a layer is {wrong[0]!r}: wanted its number, counted from 0, or its module's name.")
    return found


@dataclass(frozen=True)
class Site:
    """An attention site: the n-th call of a module within one forward, over all the forwards of its run."""

    name: str
    occurrence: int
    way: str
    proof: float | None  # how far P @ V, rebuilt, was from what the model returned; None: unproved
    shape: torch.Size  # (B, H, L, S)
    edited: bool


@dataclass(frozen=True, eq=False)
class Call:
    """One raw attention call."""

    site: SiteCalls
    index: int

    @property
    def name(self) -> str:
        """The module's name."""
        return self.site.name

    @property
    def shape(self) -> torch.Size:
        """(B, H, L, S) of this call."""
        part = self.site.parts[self.index]
        return torch.Size((*self.site.shape[:2], part.num_rows, part.num_keys))

    def matrix(self) -> AttentionMatrix:
        """Its attention weights."""
        return self.site.call_matrix(self.index)


@dataclass(frozen=True)
class Answer:
    """What ``reduce=`` gave for one call."""

    name: str
    occurrence: int
    shape: torch.Size
    values: Any


class Run(Sequence[AttentionMatrix]):
    """One forward, or the steps of one generation: attention sites in the order of their first calls."""

    def __init__(self, sites: Iterable[SiteCalls] = (), valid: Tensor | None = None) -> None:
        self.calls_of_sites = list(sites)
        self.valid = valid
        self.witness: SiteCalls | None = None  # a self-attention that nobody asked for, where only cross-attention is
        self._matrices: dict[int, tuple[torch.Size, AttentionMatrix]] = {}

    def __len__(self) -> int:
        return len(self.calls_of_sites)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self[i] for i in range(len(self))[which]]
        index = self._find(which) if isinstance(which, str) else range(len(self))[which]
        site = self.calls_of_sites[index]
        held = self._matrices.get(index)
        if held is None or held[0] != site.shape:
            self._matrices[index] = held = (site.shape, site.matrix())
        return held[1]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Names, ways in, shapes and proofs."""
        return tuple(Site(s.name, s.occurrence, s.way, s.proof, s.shape, s.edited) for s in self.calls_of_sites)

    def _find(self, name: str) -> int:
        found = [i for i, site in enumerate(self.calls_of_sites) if site.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            raise RecordingError(
                f"{name!r} was called {len(found)} times in a forward: use one of the numbers {found}."
            )
        names = [site.name for site in self.calls_of_sites]
        listed = ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
        raise RecordingError(f"no attention site is called {name!r}; there are {len(names)}: {listed}")

    def join(self, calls: list[Captured], valid: Tensor | None, witness: Captured | None = None) -> bool:
        """Take a forward's calls if they, or its witness, go on where this run is; otherwise leave it as it is."""
        known = {(site.name, site.occurrence): site for site in self.calls_of_sites}
        plans: list[tuple[SiteCalls | None, Captured, tuple[str, int]]] = []
        for call in calls:
            site = known.get((call.name, call.occurrence))
            if site is not None:
                how = site.continues(call)
                if how is None:
                    return False
                plans.append((site, call, how))
            else:
                plans.append((None, call, ("new", 0)))
        if witness is not None and self.witness is not None:
            how = self.witness.continues(witness)
            if how is None:
                return False
            plans.append((self.witness, witness, how))
        kinds = {how[0] for _, _, how in plans}
        if not kinds & {"grow", "cut", "new"}:
            return False
        cut = [site.rejected(shared) for site, _, (kind, shared) in plans if site is not None and kind == "cut"]
        for joined, call, (kind, shared) in plans:
            if joined is None:
                self.calls_of_sites.append(SiteCalls.of(call))
            else:
                joined.add(call, kind, shared, max(cut, default=0))
        self.valid = _longer(self.valid, valid)
        return True


def _longer(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Which positions are text, told by two steps: the second of a sliding window knows its own part alone."""
    if before is None or now is None or before.shape[0] != now.shape[0]:
        return before if now is None else now
    both = now.clone()
    both[:, : before.shape[1]] |= before[:, : now.shape[1]]
    return both
