"""What the tests of the commands share: the two real models, loaded once."""

import pytest

from headscope import models


@pytest.fixture
def loaded_models(smollm2: models.Loaded, minilm: models.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded already are not loaded again for each command."""
    loaded = {"smollm2": smollm2, "minilm": minilm}
    load = models.load
    monkeypatch.setattr(models, "load", lambda name: loaded[name] if name in loaded else load(name))
