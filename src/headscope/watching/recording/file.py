"""The recording's file: safetensors with a versioned header; read as hostile until checked.

The format is described in docs/recording-format.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headscope.errors import RecordingError
from headscope.files import safetensors_kind, whole_file
from headscope.models.tokens import Tokens, Word
from headscope.ops.masks.codec import decode, encode
from headscope.ops.positions import Alibi, alibi
from headscope.ops.scores import make_scores
from headscope.watching.recording.site import CallRows, Site

FORMAT = "headscope-recording"
VERSION = 4
KIND = safetensors_kind("a recording", FORMAT)
_HEADER_LIMIT = 100 * 1024 * 1024
_TENSOR_NAME = re.compile(r"(query|key|value|output|logsumexp|mask|bias|sinks|valid)\.\d{1,9}")
_ROUNDED = ("query", "key", "value", "output")
_SAFE_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,4096}")


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds: runs as their sites and valid positions, the text, and the modules that were not seen."""

    runs: list[tuple[list[Site], Tensor | None]]
    tokens: Any
    unseen: tuple[str, ...]


def save(contents: Contents, path: Path, dtype: torch.dtype | None = None, *, force: bool = False) -> None:
    """Write a recording to ``path``: all of it or nothing; queries, keys, values and outputs in ``dtype``.

    Raises:
        RecordingError: nowhere to write, or a number too large for ``dtype``. ValueError: no floating dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: numbers are kept as torch.float16, bfloat16, float32 or float64.")
    writer = _Writer(dtype)
    runs = [
        {"valid": writer.keep("valid", valid), "sites": [writer.site(s) for s in sites]}
        for sites, valid in contents.runs
    ]
    header = {"runs": runs, "unseen": list(contents.unseen), "tokens": _tokens_out(contents.tokens)}
    metadata = {"format": FORMAT, "version": str(VERSION), "recording": json.dumps(header)}
    with whole_file(path, KIND, force=force, error=RecordingError) as scratch:
        save_file(writer.tensors, scratch, metadata=metadata)


class _Writer:
    """Names the tensors; a shared tensor has one name."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that an id is not used twice

    def keep(self, kind: str, tensor: Tensor | None) -> str | None:
        """The name under which a tensor is stored."""
        if tensor is None:
            return None
        if id(tensor) not in self._names:
            name = f"{kind}.{len(self.tensors)}"
            whole, dtype = tensor.detach().cpu(), self.dtype if kind in _ROUNDED else None
            self.tensors[name] = rounded = whole.contiguous().to(dtype, copy=True)
            if dtype is not None and bool((rounded.isinf() & ~whole.isinf()).any()):
                raise RecordingError(
                    f"a {kind} holds {whole.abs().max():.3g}, more than {dtype} can: save it as torch.bfloat16, or "
                    "without dtype=."
                )
            self._names[id(tensor)] = name
            self._alive.append(tensor)
        return self._names[id(tensor)]

    def site(self, site: Site) -> dict[str, Any]:
        """A site as plain data."""
        scores = site.scores()
        return {
            "name": site.name,
            "occurrence": site.occurrence,
            "way": site.way,
            "scale": site.scale,
            "softcap": site.softcap,
            "dropout_p": site.dropout_p,
            "edited": site.edited,
            "query": self.keep("query", scores.query),
            "key": self.keep("key", scores.key),
            "value": self.keep("value", site.value()),
            "sinks": self.keep("sinks", site.sinks),
            "calls": [self.call(call, exact=self.dtype in (None, scores.query.dtype)) for call in site.calls],
        }

    def bias(self, bias: Tensor | Alibi | None) -> Any:
        """A tensor's name, or a rule and the name of its slopes."""
        return {"alibi": self.keep("bias", bias.slopes)} if isinstance(bias, Alibi) else self.keep("bias", bias)

    def call(self, call: CallRows, exact: bool) -> dict[str, Any]:
        """One call as plain data; what is rounded (not ``exact``) has lost its proof."""
        return {
            "rows": [call.first_row, call.num_rows],
            "keys": [call.first_key, call.num_keys],
            "mask": encode(call.mask, lambda tensor: str(self.keep("mask", tensor))),
            "bias": self.bias(call.bias),
            "proof": call.proof if exact else None,
            "rounded_proof": call.rounded_proof if exact else None,
            "output": self.keep("output", call.output),
            "logsumexp": self.keep("logsumexp", call.logsumexp if exact else None),
        }


def load(path: Path) -> Contents:
    """Read a recording; its tensors are mapped from the file, not copied."""
    if not path.is_file():
        raise RecordingError(f"{path} is not there. Recordings are written by recording.save(path) or see --save.")
    _check_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            names = set(file.keys())
            wrong = [name for name in names if not _TENSOR_NAME.fullmatch(name)]
            if wrong:
                raise RecordingError(f"{path} holds a tensor with a name that no recording has: {wrong[0][:40]!r}.")
            header = json.loads(metadata["recording"], parse_constant=_no_number)
            tensors = {name: file.get_tensor(name) for name in names}
        return _Reader(tensors).contents(header)
    except SafetensorError as error:
        raise RecordingError(f"{path} is damaged or not a recording: {error}. Record again.") from error
    except OSError as error:
        raise RecordingError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        RuntimeError,
    ) as error:
        raise RecordingError(
            f"{path} contradicts itself ({type(error).__name__}: {str(error)[:200]}). "
            "It was damaged or not written by Headscope."
        ) from error


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise RecordingError(
            f"{path} is cut short or not a recording: it has {size} bytes and its header alone should have {length}."
        )
    if length > _HEADER_LIMIT:
        raise RecordingError(f"{path} has a header of {length} bytes; a recording's has at most {_HEADER_LIMIT}.")


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise RecordingError(f"{path} is a safetensors file, but not a recording: its format is not {FORMAT!r}.")
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise RecordingError(
            f"{path} is a recording of version {version[:20]!r}, this Headscope reads version {VERSION}: "
            "use the Headscope that wrote it, or record again."
        )


class _Reader:
    """Plain data back to a recording; every number is checked by the operands' own checks."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, kind: str, name: Any) -> Tensor | None:
        """A stored tensor, which must be of its kind."""
        if name is None:
            return None
        if not isinstance(name, str) or not name.startswith(kind + "."):
            raise ValueError(f"{str(name)[:40]!r} is not a {kind}")
        return self.tensors[name]

    def must(self, kind: str, name: Any) -> Tensor:
        """The same; ValueError if it is missing."""
        tensor = self.get(kind, name)
        if tensor is None:
            raise ValueError(f"a {kind} is missing")
        return tensor

    def contents(self, header: Any) -> Contents:
        """All of the file."""
        runs = [([self.site(s) for s in run["sites"]], self.valid(run["valid"])) for run in header["runs"]]
        if any(not sites for sites, _ in runs):
            raise ValueError("a run without attention sites")
        return Contents(runs, _tokens_in(header["tokens"]), tuple(_text(name) for name in header["unseen"]))

    def valid(self, name: Any) -> Tensor | None:
        """Which positions are text."""
        valid = self.get("valid", name)
        if valid is not None and (valid.dim() != 2 or valid.dtype != torch.bool):
            raise ValueError(f"valid is {tuple(valid.shape)} of {valid.dtype}, not [B, S] bool")
        return valid

    def site(self, data: Any) -> Site:
        """A site, whose calls and joined operands must be consistent."""
        if data["way"] not in ("huggingface", "sdpa", "torch.nn", "headscope") or not data["calls"]:
            raise ValueError(f"a site of way {str(data['way'])[:20]!r} with {len(data['calls'])} calls")
        query, key = self.must("query", data["query"]), self.must("key", data["key"])
        if query.dim() != 4 or key.dim() != 4:
            raise ValueError(f"query {tuple(query.shape)} or key {tuple(key.shape)} without 4 axes")
        site = Site(
            _text(data["name"]),
            int(data["occurrence"]),
            data["way"],
            float(data["scale"]),
            None if data["softcap"] is None else float(data["softcap"]),
            self.get("sinks", data["sinks"]),
            key,
            self.get("value", data["value"]),
            [],
            float(data["dropout_p"]),
            bool(data["edited"]),
        )
        for call in data["calls"]:
            site.calls.append(self.call(call, query, site))
        if site.shape[2] != query.shape[2]:
            raise ValueError(f"calls with {site.shape[2]} rows, but {query.shape[2]} queries")
        scores = site.scores()
        make_scores(scores.query, scores.key, scores.mask, scores.bias, scores.scale, scores.softcap, scores.sinks)
        _check_kept(site)
        return site

    def bias(self, data: Any) -> Tensor | Alibi | None:
        """A bias, or the rule that it follows."""
        return alibi(self.must("bias", data["alibi"])) if isinstance(data, dict) else self.get("bias", data)

    def call(self, data: Any, query: Tensor, site: Site) -> CallRows:
        """The next call of a site."""
        first_row, rows = (int(n) for n in data["rows"])
        first_key, keys = (int(n) for n in data["keys"])
        if first_row != (site.shape[2] if site.calls else 0) or rows < 1 or first_row + rows > query.shape[2]:
            raise ValueError(f"{rows} rows from {first_row} that do not follow those before")
        if first_key < 0 or keys < 1 or first_key + keys > site.last_key.shape[2]:
            raise ValueError(f"{keys} keys from {first_key} of {site.last_key.shape[2]}")
        part = query[:, :, first_row : first_row + rows], site.last_key[:, :, first_key : first_key + keys]
        mask = decode(data["mask"], lambda name: self.must("mask", name))
        scores = make_scores(*part, mask, self.bias(data["bias"]), site.scale, site.softcap, site.sinks)
        proof, rounded = (None if data[name] is None else float(data[name]) for name in ("proof", "rounded_proof"))
        output, logsumexp = self.get("output", data["output"]), self.get("logsumexp", data["logsumexp"])
        place = (first_row, first_key, keys)
        return CallRows(scores.query, *place, scores.mask, scores.bias, proof, rounded, output, logsumexp)


def _check_kept(site: Site) -> None:
    """What was kept beside queries and keys has their shape."""
    value, key = site.value(), site.key()
    dtype = torch.float64 if key.dtype == torch.float64 else torch.float32
    if value is not None and (value.dim() != 4 or value.shape[:3] != key.shape[:3]):
        raise ValueError(f"values {tuple(value.shape)} for keys {tuple(key.shape)}")
    for call in site.calls:
        output, logsumexp, wanted = call.output, call.logsumexp, (*site.shape[:2], call.num_rows)
        if output is not None and (output.dim() != 4 or tuple(output.shape[:3]) != wanted):
            raise ValueError(f"an output {tuple(output.shape)} of {wanted} rows")
        if logsumexp is None:
            continue
        if tuple(logsumexp.shape) != wanted or logsumexp.dtype != dtype or bool(logsumexp.isinf().any()):
            raise ValueError(f"logsumexp {tuple(logsumexp.shape)} of {logsumexp.dtype} for {wanted} rows, or infinite")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not _SAFE_TEXT.fullmatch(value):
        raise ValueError("a name that is too long or holds control characters")
    return value


def _tokens_out(tokens: Any) -> Any:
    if not isinstance(tokens, Tokens):
        return None
    return {
        "text": tokens.text,
        "ids": list(tokens.ids),
        "pieces": list(tokens.pieces),
        "offsets": [list(span) for span in tokens.offsets],
        "special": list(tokens.special),
        "unknown": list(tokens.unknown),
        "words": [[w.text, w.start, w.end, list(w.tokens)] for w in tokens.words],
    }


def _tokens_in(data: Any) -> Tokens | None:
    if data is None:
        return None
    words = tuple(Word(str(t), int(a), int(b), tuple(int(i) for i in ids)) for t, a, b, ids in data["words"])
    count = len(data["ids"])
    lists = ("pieces", "offsets", "special", "unknown")
    if any(len(data[name]) != count for name in lists):
        raise ValueError("tokens whose lists have different lengths")
    if any(not 0 <= i < count for word in words for i in word.tokens):
        raise ValueError("a word of tokens that are not there")
    if any(not 0 <= word.start <= word.end <= len(data["text"]) for word in words):
        raise ValueError("a word that is not in the text")
    return Tokens(
        text=str(data["text"]),
        ids=tuple(int(i) for i in data["ids"]),
        pieces=tuple(str(p) for p in data["pieces"]),
        offsets=tuple((int(a), int(b)) for a, b in data["offsets"]),
        special=tuple(bool(s) for s in data["special"]),
        words=words,
        unknown=tuple(bool(u) for u in data["unknown"]),
    )
