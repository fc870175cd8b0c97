"""The source tree is what docs/structure.md says, and data flows one way through it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "headscope"
PAGE = (ROOT / "docs" / "structure.md").read_text("utf-8")
LISTED = re.findall(r"^(\S+\.py) {2,}\S", PAGE.split("```")[1], re.MULTILINE)
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
HOMES = {
    "transformers": {"models.py", "seam/huggingface.py"},
    "matplotlib": {"figures.py", "charts.py", "atlas_figures.py"},
    "rich": {"terminal.py", "terminal_heads.py", "terminal_links.py"},
    "typer": {"cli.py", "commands.py", "forbid_command.py", "heads_command.py"},
    "pyarrow": {"atlas_file.py"},
    "conllu": {"relations/treebank.py"},
    "tensorboard": {"training/logs.py"},
}


def tree(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text("utf-8"))


def file_of(module: str) -> str | None:
    """The file of a module of headscope; None if the name is not a module."""
    inner = "/".join(module.split(".")[1:])
    for file in (f"{inner}.py", f"{inner}/__init__.py".lstrip("/")):
        if file in LISTED or file in FILES:
            return file
    return None


def imported(file: str, module: ast.Module) -> set[str]:
    """Full names of the modules that a file imports anywhere, `from a import b` as a or a.b."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = ["headscope", *file.split("/")[:-1]]
                base = package[: len(package) - node.level + 1]
                origin = ".".join([*base, *([node.module] if node.module else [])])
            else:
                origin = node.module or ""
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                ours = origin.split(".")[0] == "headscope"
                names.add(inner if ours and file_of(inner) else origin)
    return names


def files_imported(file: str, module: ast.Module) -> set[str]:
    ours = {name for name in imported(file, module) if name.split(".")[0] == "headscope"}
    return {found for name in ours if (found := file_of(name))}


def test_the_page_lists_each_file_once_and_no_other() -> None:
    assert sorted(LISTED) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_from_files_above_it(file: str) -> None:
    above = set(LISTED[: LISTED.index(file)])
    assert files_imported(file, tree(file)) - above == set()


def test_imports_of_every_form_are_seen() -> None:
    module = ast.parse(
        "import headscope.tokens\n"
        "from . import call\n"
        "from ..masks.mask import Mask\n"
        "if TYPE_CHECKING:\n    from headscope.errors import TextError\n"
        "def f():\n    from headscope import attention, matrix\n"
    )
    assert files_imported("seam/sdpa.py", module) == {
        "tokens.py",
        "seam/call.py",
        "masks/mask.py",
        "errors.py",
        "__init__.py",
        "matrix.py",
    }


@pytest.mark.parametrize("file", FILES)
def test_files_and_functions_stay_small(file: str) -> None:
    text = (SOURCE / file).read_text("utf-8")
    assert len(text.splitlines()) <= 400
    long = {
        node.name: length
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert long == {}


@pytest.mark.parametrize("package", HOMES)
def test_an_optional_dependency_is_imported_in_its_own_file_only(package: str) -> None:
    users = {file for file in FILES if any(name.split(".")[0] == package for name in imported(file, tree(file)))}
    assert users <= HOMES[package]


@pytest.mark.parametrize("module", ["headscope", "headscope.models", "headscope.tokens"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = ["transformers", "matplotlib", "rich", "typer", "pandas"]
    program = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
