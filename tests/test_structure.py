"""The floor plan of src/headscope: eight folders, imports that go one way, optional dependencies at home."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

import headscope

SOURCE = Path(__file__).parent.parent / "src" / "headscope"
GROUND = {"errors.py", "files.py", "distributed.py"}
FOLDERS = ("ops", "nn", "models", "watching", "heads", "training", "views", "commands")
STRANGERS = ({"nn", "models"}, {"heads", "training"})  # side by side: neither imports the other
HOMES = {  # an optional dependency and the folders that may import it
    "transformers": {"models", "watching/hooks"},
    "tokenizers": {"models"},
    "gguf": {"models"},
    "filelock": {"models"},
    "matplotlib": {"views/figures"},
    "rich": {"views/terminal"},
    "typer": {"commands"},
    "pyarrow": {"heads/atlas"},
    "conllu": {"heads/relations"},
    "torch.utils.tensorboard": {"training"},
}
TESTS = Path(__file__).parent
ASSERTING = {"raises", "warns", "fail", "gradcheck", "gradgradcheck"}  # and whatever is called assert…
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


def tree(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text("utf-8"))


def file_of(module: str) -> str | None:
    """The file of a module of headscope; None if the name is not a module."""
    inner = "/".join(module.split(".")[1:])
    return next((file for file in (f"{inner}.py", f"{inner}/__init__.py".lstrip("/")) if file in FILES), None)


def imported(file: str, module: ast.Module) -> set[str]:
    """Full names of the modules that a file imports anywhere, `from a import b` as a or a.b."""
    names: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["headscope", *file.split("/")[:-1]][: -node.level + 1 or None] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                names.add(inner if origin.split(".")[0] == "headscope" and file_of(inner) else origin)
    return names


def files_imported(file: str, module: ast.Module) -> set[str]:
    ours = {name for name in imported(file, module) if name.split(".")[0] == "headscope"}
    return {path for name in ours if (path := file_of(name))}


def folder(file: str) -> str:
    """The first folder of a path; the file itself if it lies in none."""
    return file.split("/")[0]


def allowed(importer: str, imported_file: str) -> bool:
    """Whether the rule of the folders allows this import."""
    if importer in ("__init__.py", "__main__.py"):
        return True
    here, there = folder(importer), folder(imported_file)
    if here not in FOLDERS or there not in FOLDERS:
        return there in GROUND
    if here == there:
        return True
    return FOLDERS.index(there) < FOLDERS.index(here) and {here, there} not in STRANGERS


def test_the_source_is_eight_folders_and_a_handful_of_files() -> None:
    entries = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert entries == {*FOLDERS, *GROUND, "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("file", FILES)
def test_a_folder_imports_only_from_folders_to_its_left(file: str) -> None:
    assert {other for other in files_imported(file, tree(file)) if not allowed(file, other)} == set()


def test_no_imports_go_in_a_circle() -> None:
    packages = {file for file in FILES if file.endswith("__init__.py")}
    graph = {file: files_imported(file, tree(file)) - {file, "__init__.py"} for file in FILES}
    for file in FILES:  # importing a file runs the __init__ of its folders, which must not need that file's importers
        graph[file] -= {package for package in packages if file.startswith(package.removesuffix("__init__.py"))}
    circle: list[str] = []
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = error.args[1]
    assert circle == []


def test_the_rule_refuses_what_it_should() -> None:
    assert allowed("nn/multihead.py", "ops/matrix.py")
    assert allowed("ops/matrix.py", "errors.py")
    assert not allowed("ops/matrix.py", "nn/multihead.py")
    assert not allowed("models/loading.py", "nn/multihead.py")
    assert not allowed("training/loop.py", "heads/roles.py")
    assert not allowed("views/words.py", "__init__.py")
    assert all(not allowed(f"{left}/a.py", f"{right}/b.py") for left, right in pairwise(FOLDERS))


def test_imports_of_every_form_are_seen() -> None:
    module = ast.parse(
        "import headscope.models.tokens\n"
        "from . import call\n"
        "from ...ops.masks.mask import Mask\n"
        "if TYPE_CHECKING:\n    from headscope.errors import TextError\n"
        "def f():\n    from headscope.ops import attention, matrix\n"
    )
    assert files_imported("watching/hooks/sdpa.py", module) == {
        "models/tokens.py",
        "watching/hooks/call.py",
        "ops/masks/mask.py",
        "errors.py",
        "ops/__init__.py",
        "ops/matrix.py",
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


@pytest.mark.parametrize("file", FILES)
def test_a_module_says_in_its_first_line_what_belongs_there(file: str) -> None:
    first = (ast.get_docstring(tree(file)) or "").split("\n")[0]
    assert len(first.split()) >= 3, f"{file} begins with {first!r}"


@pytest.mark.parametrize("package", HOMES)
def test_an_optional_dependency_is_imported_in_its_own_folder_only(package: str) -> None:
    users = {file for file in FILES if any(f"{name}.".startswith(f"{package}.") for name in imported(file, tree(file)))}
    assert users
    assert {file for file in users if not any(file.startswith(f"{home}/") for home in HOMES[package])} == set()


def test_no_package_exports_a_function_by_the_name_of_a_module() -> None:
    packages = [headscope, *map(importlib.import_module, package_names())]
    clashes = []
    for package in packages:
        modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if name in modules and value is not sys.modules[f"{package.__name__}.{name}"]:
                clashes.append(f"{package.__name__}.{name}")
    assert clashes == []


def package_names() -> list[str]:
    return sorted(
        f"headscope.{path.parent.relative_to(SOURCE).as_posix().replace('/', '.')}"
        for path in SOURCE.rglob("__init__.py")
        if path.parent != SOURCE
    )


def loaded_by(program: str, packages: list[str]) -> str:
    """Which of these packages a new Python has loaded after this program."""
    program = f"import sys\n{program}\nprint([name for name in {packages} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_headscope_loads_nothing() -> None:
    assert loaded_by("import headscope", ["torch", "numpy", "jaxtyping", *HOMES]) == "[]"


def test_importing_models_and_tokens_loads_nothing_heavy() -> None:
    assert loaded_by("import headscope.models", [*HOMES, "pandas"]) == "[]"


def test_the_names_of_headscope_are_those_that_type_checkers_see() -> None:
    (block,) = (node for node in tree("__init__.py").body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(typed) == headscope.__all__
    for name, module in typed.items():
        assert getattr(headscope, name) is getattr(importlib.import_module(str(module)), name)


def test_names_and_folders_of_headscope_are_attributes() -> None:
    assert {*headscope.__all__, *FOLDERS, "errors"} <= set(dir(headscope))
    program = (
        "import headscope; from headscope import masks\n"
        "assert masks is headscope.masks is sys.modules['headscope.ops.masks']\n"
        "assert headscope.training.train.__module__ == 'headscope.training.loop'"
    )
    assert loaded_by(program, ["torch"]) == "['torch']"
    with pytest.raises(AttributeError, match="module 'headscope' has no attribute 'mask'"):
        headscope.mask  # noqa: B018


Function = ast.FunctionDef | ast.AsyncFunctionDef


def called(function: Function) -> set[str]:
    """Last names of what a function calls."""
    calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}


def without_assertion(modules: dict[str, ast.Module]) -> set[str]:
    """Tests that assert nothing, neither themselves nor by a function of the tests that they call."""
    functions = [(file, n) for file, module in modules.items() for n in ast.walk(module) if isinstance(n, Function)]
    asserting = set(ASSERTING)
    while True:
        more = {
            function.name
            for _, function in functions
            if any(isinstance(node, ast.Assert) for node in ast.walk(function))
            or any(name in asserting or name.startswith("assert") for name in called(function))
        }
        if more <= asserting:
            break
        asserting |= more
    return {f"{file}::{f.name}" for file, f in functions if f.name.startswith("test_") and f.name not in asserting}


def test_every_test_asserts_something() -> None:
    modules = {path.relative_to(TESTS).as_posix(): ast.parse(path.read_text("utf-8")) for path in TESTS.rglob("*.py")}
    assert without_assertion(modules) == set()


def test_a_test_that_asserts_nothing_is_found() -> None:
    module = ast.parse(
        "def check(x):\n    assert x\n"
        "def make(x):\n    return x\n"
        "def test_by_a_helper():\n    check(make(1))\n"
        "def test_by_raises():\n    with pytest.raises(ValueError):\n        make(1)\n"
        "def test_by_torch():\n    torch.testing.assert_close(1, 1)\n"
        "def test_nothing():\n    make(1)\n"
    )
    assert without_assertion({"test_a.py": module}) == {"test_a.py::test_nothing"}
