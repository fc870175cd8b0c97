"""What the pages say is so: their code runs, their output is what comes out, no option is left out."""

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from headscope import models
from headscope.commands import app as cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "src" / "headscope").rglob("*.py")
    if path.name != "__main__.py"
)
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_code_of_the_readme_runs(smollm2: models.Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks(ROOT / "README.md", "python")):
        exec(compile(code, f"README.md, block {number}", "exec"), names)
    with torch.no_grad():
        plain = names["loaded"].model(input_ids=names["ids"]).logits
    changed = names["changed"]
    assert changed.shape == plain.shape
    assert (changed - plain).abs().max() > 0.1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "0.68"
    assert out[1] == "torch.Size([1, 9, 14]) torch.Size([1, 9, 14, 3])"
    assert re.fullmatch(r"rebuilt to \de-0[67]", out[2])


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "README.md"], ids=lambda p: p.name)
def test_the_code_of_the_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    assert page.read_text("utf-8").startswith("# ")


def test_the_output_in_the_readme_is_what_comes_out(smollm2: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = blocks(ROOT / "README.md", "console")
    prompt, _, wanted = block.partition("\n")
    monkeypatch.setattr(models, "load", lambda name, **options: smollm2)
    monkeypatch.setenv("COLUMNS", "80")
    done = CliRunner().invoke(cli.app, prompt.removeprefix("$ headscope ").split())
    lines = "\n".join(line.rstrip() for line in done.stdout.replace("\N{NO-BREAK SPACE}", " ").rstrip().splitlines())
    # Another processor may round otherwise: the words and heads are compared, not the last digit.
    assert re.sub(r"\d+\s%|\de-\d\d", "#", lines) == re.sub(r"\d+\s%|\de-\d\d", "#", wanted.rstrip())


def test_each_option_is_in_the_page_and_no_other() -> None:
    page = (ROOT / "docs" / "see.md").read_text("utf-8")
    listed = re.findall(r"^\| `(--[a-z-]+)` \|", page, re.MULTILINE)
    options = [max(p.opts, key=len) for p in COMMANDS["see"].params if p.opts[0].startswith("-")]
    assert sorted(listed) == sorted([*options, "--help"])


def test_each_option_of_the_atlas_is_in_its_page_and_no_other() -> None:
    page = (ROOT / "docs" / "heads.md").read_text("utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| `--")]
    listed = [name for row in rows for name in re.findall(r"`(--[a-z-]+)[ `]", row.split("|")[1])]
    options = [max(p.opts, key=len) for p in COMMANDS["heads"].params if "--worth" not in p.opts]
    assert sorted(listed) == sorted([*options, "--no-worth"])


def test_each_command_is_in_the_page() -> None:
    page = (ROOT / "docs" / "see.md").read_text("utf-8")
    assert [name for name in COMMANDS if f"`headscope {name}`" not in page] == []


def test_each_entry_of_the_json_is_in_its_page(smollm2: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    monkeypatch.setattr(models, "load", lambda name, **options: smollm2)
    answer = json.loads(CliRunner().invoke(cli.app, ["see", "a cat", "--json"]).stdout)
    page = (ROOT / "docs" / "json.md").read_text("utf-8")
    parts = [answer, answer["model"], *(answer[k][0] for k in ("tokens", "words", "links", "unlisted"))]
    parts += [answer["selection"], answer["links"][0]["from"], answer["links"][0]["distance"]]
    assert [key for part in parts for key in part if f"`{key}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8"))
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_measure_and_role_is_on_its_page() -> None:
    from headscope.heads.atlas.measuring import columns_of
    from headscope.heads.measures import standard
    from headscope.heads.relations import constructed_relations
    from headscope.heads.roles import ROLES

    page = (ROOT / "docs" / "heads.md").read_text("utf-8")
    plain = {re.sub(r"[+-]\d+", "", column.name.removesuffix("_raw")) for column in columns_of(standard())}
    assert [name for name in plain if f"`{name}" not in page] == []
    for role in ROLES:
        assert f"| {role.name} | `{role.column}` | {role.threshold} | {role.source} |" in page
    assert [name for name in constructed_relations() if f"`{name}`" not in page] == []
