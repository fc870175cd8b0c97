"""What the tests of the commands share: the two real models, loaded once."""

from typing import Any

import pytest

from headscope import models


@pytest.fixture
def loaded_models(smollm2: models.Loaded, minilm: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded already are not loaded again for each command."""
    loaded = {"smollm2": smollm2, "minilm": minilm}
    load = models.load

    def load_once(name: str, *, start_token: str = "auto", **options: Any) -> models.Loaded:
        if start_token == "auto" and name in loaded:
            return loaded[name]
        return load(name, start_token=start_token, **options)

    monkeypatch.setattr(models, "load", load_once)
