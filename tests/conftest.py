"""What all tests share: a fixed seed, no hub, shape checks, and the two real models."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if importlib.util.find_spec("jaxtyping") and importlib.util.find_spec("beartype"):
    from jaxtyping import install_import_hook

    # Kept for the whole run: shapes in annotations are checked on every call, where tensors are computed.
    SHAPES_CHECKED = install_import_hook(["headscope.ops", "headscope.nn"], "beartype.beartype")

from hypothesis import settings

from headscope import HeadAtlas, models, profile
from tests import tiny
from tests import tiny_atlas as shared

# A person's run tries new cases each time; a run that guards the main branch tries the same ones.
settings.register_profile("same-cases", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("same-cases")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261122)


@pytest.fixture(scope="session")
def smollm2() -> models.Loaded:
    """SmolLM2-135M-Instruct: a decoder of 30 layers with 9 heads."""
    models.pull("smollm2")
    return models.load("smollm2")


@pytest.fixture(scope="session")
def minilm() -> models.Loaded:
    """all-MiniLM-L6-v2: an encoder of 6 layers with 12 heads."""
    models.pull("minilm")
    return models.load("minilm")


@pytest.fixture(scope="session")
def tiny_decoder() -> models.Loaded:
    """A random decoder of 2 layers with 6 heads that reads letters."""
    return models.Loaded("tiny", tiny.llama(), shared.letter_tokenizer(), 0, 64, True, "a test")


@pytest.fixture(scope="session")
def tiny_atlas(tiny_decoder: models.Loaded) -> HeadAtlas:
    """Its atlas of five short texts; read only."""
    texts, relations = shared.documents(), shared.few_sentences()
    return profile(tiny_decoder, texts=texts, relations=relations, plan=shared.PLAN)


@pytest.fixture(scope="session")
def tiny_folder(tiny_decoder: models.Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in a folder, with the texts beside it."""
    path = tmp_path_factory.mktemp("model")
    return shared.write_folder(path, tiny_decoder.model, tiny_decoder.tokenizer)
