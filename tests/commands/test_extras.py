"""A missing package of an extra: one sentence that ends in the pip command, from Python and from the command."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

import headscope
from headscope.commands.app import app
from headscope.errors import HeadscopeError, MissingExtra
from headscope.heads.atlas import HeadAtlas
from headscope.heads.relations.sentences.treebank import read_conllu
from headscope.training import head_counts
from headscope.training.logs import tensorboard

CONLLU = "1\tSit\tsit\tVERB\t_\t_\t0\troot\t_\t_\n\n"


class Use(NamedTuple):
    """What needs a package, in Python and in the command; in a folder with a.gguf and a.conllu."""

    purpose: str
    extra: str
    call: Callable[[], object]
    command: str


def _import_figures() -> object:
    from headscope.views.figures import maps

    return maps


def _open_log() -> object:
    with tensorboard(Path("logs")) as log:
        return log


USES = {
    "transformers": Use("Pretrained models", "models", lambda: headscope.load("a.gguf"), "see --model a.gguf"),
    "tokenizers": Use("Pretrained models", "models", lambda: headscope.load("a.gguf"), "forbid --model a.gguf"),
    "gguf": Use("Pretrained models", "models", lambda: headscope.load("a.gguf"), "pull smollm2"),
    "filelock": Use("Pretrained models", "models", lambda: headscope.pull("minilm"), "pull minilm"),
    "matplotlib": Use("Figures", "figures", _import_figures, "see --figure a.png"),
    "pyarrow": Use(
        "Atlas files and tables", "atlas", lambda: HeadAtlas.load(Path("a.parquet")), "heads --model minilm"
    ),
    "conllu": Use("Treebanks", "atlas", lambda: read_conllu("a.conllu"), "heads --model a.gguf --treebank a.conllu"),
}


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes a package one that is not installed, until the test ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path / "cache"))
    Path("a.gguf").touch()
    Path("a.conllu").write_text(CONLLU, "utf-8")

    def block(package: str) -> None:
        needed_at_import = ("headscope.views.figures", "torch.utils.tensorboard")  # matplotlib, tensorboard
        for name in [name for name in sys.modules if name.startswith(needed_at_import)]:
            monkeypatch.delitem(sys.modules, name)
        if hasattr(headscope.views, "figures"):
            monkeypatch.delattr(headscope.views, "figures")
        monkeypatch.setitem(sys.modules, package, None)

    return block


def sentence(package: str) -> str:
    purpose, extra, *_ = USES[package]
    return f"{purpose} need the package {package}, which is not installed. Run: pip install 'headscope[{extra}]'"


@pytest.mark.parametrize("package", USES)
def test_python_names_the_missing_extra(package: str, block: Callable[[str], None]) -> None:
    block(package)
    with pytest.raises(MissingExtra) as caught:
        USES[package].call()
    assert str(caught.value) == sentence(package)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("package", USES)
def test_the_command_names_the_missing_extra(package: str, block: Callable[[str], None]) -> None:
    block(package)
    done = CliRunner().invoke(app, USES[package].command.split())
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"Error: {sentence(package)}\n"


def test_experiment_without_matplotlib_writes_the_rest(
    block: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = SimpleNamespace(markdown=lambda: "# One head or many")
    monkeypatch.setattr(head_counts, "compare_head_counts", lambda *_, **__: report)
    block("matplotlib")
    done = CliRunner().invoke(app, ["experiment", "one-or-many", "--quick"])
    assert done.exit_code == 0
    assert done.stderr == f"{sentence('matplotlib')}\n"
    assert done.stdout.endswith("one-or-many.md, one-or-many.json, one-or-many.csv\n")


def test_tensorboard_logs_name_the_missing_extra(block: Callable[[str], None]) -> None:
    block("tensorboard")
    with pytest.raises(HeadscopeError, match=r"TensorBoard logs need .* pip install 'headscope\[train\]'$"):
        _open_log()
