"""Faults in what is said about heads."""

from pathlib import Path

import pytest

from headscope import models
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.relations import english_sentences
from tests.commands.runner import command


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test; no line is broken."""

    def load(name: str) -> None:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(("model", "head"), [("smollm2", "13.8"), ("minilm", "3.1"), ("minilm", "0.0")])
def test_examples_of_a_head_are_part_of_the_atlas(model: str, head: str) -> None:
    """They took 84 s: the model was loaded and run over the corpus again."""
    done = command("heads", "--model", model, "--head", head)
    assert done.exit_code == 0, done.output
    first, *lines = done.stdout.splitlines()
    assert first.startswith(f"{model} {head}: ")
    assert "no role." in first or lines[1].split()[0] == "role"
    assert sum(" tokens; python:" in line or " tokens; licence:" in line for line in lines) == 8
    sentences = {example.text for example in english_sentences()}
    shown = " ".join(done.stdout.split())
    assert sum(f" {sentence}" in shown for sentence in sentences) >= 6
    assert "entropy" not in done.stdout
    assert lines[-1].endswith(f"--head {head} --all")
    everything = command("heads", "--model", model, "--head", head, "--all").stdout
    assert len(everything.splitlines()) > 2 * len(lines)
    assert "entropy_share" in everything


@pytest.mark.usefixtures("no_model")
def test_examples_of_a_saved_atlas_need_no_model(tiny_atlas: HeadAtlas, tmp_path: Path) -> None:
    path = tiny_atlas.save(tmp_path / "a.parquet")
    done = command("heads", "--atlas", str(path), "--head", "1.3")
    assert done.exit_code == 0, done.output
    for example in tiny_atlas.measurements.token_examples.largest[1, 3]:
        assert f" tokens; {example.document})" in done.stdout
    assert f"All its measures: headscope heads --atlas {path} --head 1.3 --all" in done.stdout
