"""The hook for our own attention(): recorded weights are those of its operands, and nothing of it is replaced."""

import subprocess
import sys

import pytest
import torch

from headscope import MultiHeadAttention, masks, record
from headscope.ops.kernels import fused
from tests.watching.small_models import E, L, assert_close, assert_untouched


def test_own_attention_gives_the_weights_of_its_operands() -> None:
    layer, x = MultiHeadAttention(E, 3), torch.randn(2, L, E)
    with torch.no_grad(), record(layer) as outer, record(layer) as recording:
        layer(x, mask=masks.causal())
    assert [site.way for site in recording.sites] == [site.way for site in outer.sites] == ["headscope"]
    assert_close(recording[0].dense(), layer.matrix(x, mask=masks.causal()).dense())


def test_own_attention_is_observed_only_while_a_record_lasts() -> None:
    product, layer = fused.product, MultiHeadAttention(E, 3)
    with record(layer), record(layer):
        assert len(fused.observers) == 1
        assert fused.product is product
    assert_untouched(layer)


@pytest.mark.slow
def test_compiled_layer_is_one_graph_before_and_after_a_record() -> None:
    program = (
        "import torch, headscope\n"
        "layer, x = headscope.MultiHeadAttention(16, 4), torch.randn(2, 7, 16)\n"
        "compiled = torch.compile(layer, fullgraph=True, backend='eager')\n"
        "before = compiled(x)\n"
        "with headscope.record(layer):\n"
        "    layer(x)\n"
        "assert torch.equal(compiled(x), before) and torch.equal(layer(x), before)\n"
    )  # in a process of its own, since the shape checks of the tests cannot be compiled
    subprocess.run([sys.executable, "-c", program], check=True)
