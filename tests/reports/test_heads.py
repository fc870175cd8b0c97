"""Faults in what is said about heads."""

from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel, Wav2Vec2Config, WhisperConfig

from headscope import models
from headscope.errors import HeadscopeError
from headscope.heads.atlas.atlas import HeadAtlas
from headscope.heads.atlas.measuring import output_weight
from headscope.heads.atlas.profiler import Plan, profile
from headscope.heads.relations import english_sentences
from headscope.watching import record
from tests import tiny
from tests.commands.runner import command
from tests.nn.test_projections import LoRA
from tests.tiny_atlas import letter_tokenizer


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


@pytest.mark.parametrize("kind", ["whisper", "vit", "wav2vec2"])
@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_model_that_reads_no_text_is_refused_by_what_it_reads(
    kind: str, with_tokenizer: bool, tmp_path: Path
) -> None:
    """Whisper ended in a raw TypeError; ViT in the advice to save a tokenizer."""
    config = {
        "whisper": lambda: WhisperConfig(d_model=24, encoder_attention_heads=6, decoder_attention_heads=6),
        "vit": lambda: ViTConfig(hidden_size=24, num_attention_heads=6),
        "wav2vec2": lambda: Wav2Vec2Config(hidden_size=24, num_attention_heads=6),
    }[kind]()
    config.save_pretrained(tmp_path)  # it is refused before its weights are read
    if with_tokenizer:
        letter_tokenizer().save_pretrained(tmp_path)
    done = command("heads", "--model", str(tmp_path))
    assert done.exit_code == 1
    what = "images (pixel_values)" if kind == "vit" else "sound (input_"
    assert f"{tmp_path} reads {what}" in " ".join(done.stderr.split())
    assert "tokenizer" not in done.stderr


def test_a_model_of_your_own_that_reads_no_text_is_refused() -> None:
    model = ViTModel(ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=6, image_size=8, patch_size=4))
    with pytest.raises(HeadscopeError, match=r"ViTModel reads images \(pixel_values\) and not a text"):
        profile(model.eval(), letter_tokenizer(), ["The owl sat still."])


def test_a_model_that_needs_more_than_a_text_is_refused_in_a_sentence() -> None:
    class TwoInputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.llama()
            self.config = self.inner.config
            self.device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixels: torch.Tensor) -> None:
            raise AssertionError("called without pixels")

    with pytest.raises(HeadscopeError, match=r"TwoInputs\) cannot be run on a text alone \(.*'pixels'"):
        profile(TwoInputs().eval(), letter_tokenizer(), ["The owl sat still."])


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_heads_of_a_decoder_beside_an_encoder_are_left_out_with_a_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5 and BART were "2 layers, 8 heads" of 24, without a word."""
    monkeypatch.setenv("COLUMNS", "300")
    if kind == "bart":
        model, measured, total = tiny.bart(2, 3), 12, 48
    else:
        sizes = {"d_model": 24, "d_kv": 4, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_ff": 32}
        config = T5Config(**sizes, vocab_size=tiny.VOCABULARY)
        model, measured, total = T5ForConditionalGeneration(config).eval(), 8, 32
    plan = Plan(length=16, repeats=0, worth=0)
    atlas = profile(model, letter_tokenizer(), ["The owl sat still.", "It was old."], plan=plan)
    path = atlas.save(tmp_path / "a.parquet")
    shown = command("heads", "--atlas", str(path)).stdout
    assert shown.startswith(f"{type(model).__name__} (encoder): 2 layers, {measured} heads")
    assert (
        f"Of {total} heads the {measured} of the encoder are measured. The other {total - measured} are the decoder's"
        in shown
    )
    encoder = profile(model.get_encoder(), letter_tokenizer(), ["The owl sat still.", "It was old."], plan=plan)
    assert not any("decoder" in note for note in encoder.notes)


@pytest.mark.parametrize("adapted", [False, True])
def test_what_a_head_writes_counts_the_adapter_of_the_output_projection(adapted: bool) -> None:
    """A weight that was read beside its module left out LoRA, quantisation and pruning."""
    model = tiny.llama().eval()
    layer = model.model.layers[1].self_attn
    weight = layer.o_proj.weight.detach().clone()
    if adapted:
        layer.o_proj = LoRA(layer.o_proj)
        weight += (layer.o_proj.up @ layer.o_proj.down).detach()
    matrices: dict[str, torch.Tensor | None] = {}
    modules = dict(model.named_modules())
    ids = torch.randint(4, 30, (2, 7))
    plain = model(input_ids=ids).logits
    with (
        torch.no_grad(),
        record(model, on_call=lambda call: matrices.update({call.name: output_weight(modules, call)})),
    ):
        logits = model(input_ids=ids).logits
    found = matrices["model.layers.1.self_attn"]
    assert found is not None
    torch.testing.assert_close(found, weight, atol=1e-6, rtol=0)
    assert torch.equal(logits, plain)
