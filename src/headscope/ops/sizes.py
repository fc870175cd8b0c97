"""Numbers of bytes as people write them."""

from __future__ import annotations

import re


def parse_bytes(limit: int | str) -> int:
    """A number of bytes, from a number or from text such as "4 GiB". Raises ValueError for other text."""
    if isinstance(limit, int):
        return limit
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)i?B\s*", limit)
    if not match:
        raise ValueError(f"limit is {limit!r}: give bytes as a number, or text such as '512 MiB'.")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def format_bytes(count: int | float) -> str:
    """A number of bytes with its largest unit.

    >>> format_bytes(3 << 30)
    '3 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
