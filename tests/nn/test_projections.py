"""The four projections: their weights are used only by calling the maps, and read and written as they are applied."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from headscope import MultiHeadAttention, masks, record
from headscope.nn.weights import projection_weights
from tests.nn.modules import E, H, S, module_of, x_of

PACKED = [True, False]
CALLS: dict[str, Callable[[MultiHeadAttention], Tensor]] = {
    "self-attention": lambda m: m(x_of(), mask=masks.causal()),
    "cross-attention": lambda m: m(x_of(), x_of(S, seed=2)),
    "three inputs": lambda m: m(x_of(), x_of(S, seed=2), x_of(S, seed=3)),
    "positions in query and key": lambda m: m(shifted := x_of() + 1, shifted, x_of()),
    "matrix": lambda m: m.matrix(x_of()).dense(),
    "matrix of cross-attention": lambda m: m.matrix(x_of(), x_of(S, seed=2)).dense(),
}


class LoRA(nn.Module):
    """A map with a low-rank addition, as adapters have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype) * 0.3)

    @property
    def weight(self) -> Tensor:
        """The weight of the map alone, as peft's layers give it."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T


def maps_of(module: MultiHeadAttention) -> list[str]:
    return ["in_proj", "out_proj"] if module.packed else ["q_proj", "k_proj", "v_proj", "out_proj"]


def merged(module: MultiHeadAttention) -> MultiHeadAttention:
    """The module with the low-rank addition of each map merged into it."""
    new = copy.deepcopy(module)
    for name in maps_of(module):
        lora = getattr(module, name)
        linear = copy.deepcopy(lora.base_layer)
        linear.weight.data += lora.up.data @ lora.down.data
        setattr(new, name, linear)
    return new


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("call", CALLS)
def test_adapter_has_its_effect_in_every_call(call: str, packed: bool) -> None:
    module = module_of(E, H, packed=packed)
    before = CALLS[call](module)
    for name in maps_of(module):
        setattr(module, name, LoRA(getattr(module, name)))
    after = CALLS[call](module)
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, CALLS[call](merged(module)))
    if "matrix" not in call:
        after.square().sum().backward()
        assert all(bool(getattr(module, name).up.grad.abs().sum() > 0) for name in maps_of(module))


def test_matrix_is_that_of_a_recording_with_an_adapter() -> None:
    module, x = module_of(E, H), x_of()
    module.in_proj = LoRA(module.in_proj)
    with torch.no_grad(), record(module) as recording:
        module(x)
    torch.testing.assert_close(module.matrix(x).dense(), recording[0].dense())


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize(
    ("call", "inputs"),
    [("self-attention", 1), ("cross-attention", 2), ("three inputs", 3), ("positions in query and key", 2)],
)
def test_hooks_see_each_map_once_for_each_different_input(call: str, inputs: int, packed: bool) -> None:
    module, seen = module_of(E, H, packed=packed), []
    for name in maps_of(module):
        getattr(module, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    CALLS[call](module)
    assert sorted(seen) == sorted(["in_proj"] * inputs + ["out_proj"] if packed else maps_of(module))


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1}, {"bias": False}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_three_maps_give_what_the_packed_map_gives(call: str, options: dict[str, object]) -> None:
    packed, three = module_of(E, H, **options), module_of(E, H, packed=False, **options)
    three.load_weights(packed.weights_as("huggingface"))
    assert not hasattr(three, "in_proj")
    torch.testing.assert_close(CALLS[call](three), CALLS[call](packed))
    if not options:
        back = MultiHeadAttention.from_torch(three.to_torch())
        torch.testing.assert_close(CALLS[call](back), CALLS[call](packed))


class Int8(nn.Module):
    """A map whose weight is whole numbers, with a scale per row, as quantised layers have it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (base.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("call", CALLS)
def test_quantised_map_is_used_in_every_call(call: str, packed: bool) -> None:
    module = module_of(E, H, packed=packed)
    expected = CALLS[call](module).detach()
    for name in maps_of(module):
        setattr(module, name, Int8(getattr(module, name)))
    out = CALLS[call](module).detach()
    assert 0 < (out - expected).abs().max() < 0.2
    with pytest.raises(ValueError, match="a projection is a Int8 that has no weight in floating point"):
        module.weights_as("linears")


class Doubled(nn.Module):
    """A parametrisation with an inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Squared(nn.Module):
    """A parametrisation without an inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "prune.identity": lambda layer: prune.identity(layer, "weight"),
    "prune.identity of the bias": lambda layer: prune.identity(layer, "bias"),
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight_norm": lambda layer: parametrizations.weight_norm(layer),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("change", CHANGES)
def test_load_weights_takes_effect_on_pruned_and_parametrised_maps(change: str, packed: bool) -> None:
    module, other, x = module_of(E, H, packed=packed), module_of(E, H), x_of()
    for part in other.parameters():
        nn.init.normal_(part, std=0.4)
    for name in maps_of(module):
        CHANGES[change](getattr(module, name))
    module(x)
    module.load_weights(other.weights_as("linears"))
    for layout in ("linears", "torch", "huggingface"):
        wanted, weights = other.weights_as(layout), module.weights_as(layout)
        assert sorted(weights) == sorted(wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(weights[name], tensor)
    for call in CALLS.values():
        torch.testing.assert_close(call(module), call(other))


def test_pruned_cells_stay_pruned() -> None:
    module, other, x = module_of(E, H), module_of(E, H), x_of()
    prune.l1_unstructured(module.in_proj, "weight", amount=0.5)
    module.load_weights({name: tensor + 1 for name, tensor in other.weights_as("torch").items()})
    weight = module.weights_as("torch")["in_proj_weight"]
    assert int((weight == 0).sum()) == weight.numel() // 2
    torch.testing.assert_close(module(x), MultiHeadAttention.from_torch(module.to_torch())(x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda m: setattr(m, "in_proj", LoRA(m.in_proj)),
            "LoRA that has down, up, base_layer.weight, base_layer.bias",
        ),
        (lambda m: setattr(m, "out_proj", LoRA(m.out_proj)), "LoRA that has down, up"),
    ],
)
def test_weights_of_an_adapter_are_refused(change: Callable[[MultiHeadAttention], object], text: str) -> None:
    module = module_of(E, H)
    weights = module.weights_as("linears")
    change(module)
    for use in (lambda: module.weights_as("linears"), lambda: module.load_weights(weights), module.to_torch):
        with pytest.raises(ValueError, match=text):
            use()


def test_load_weights_changes_nothing_if_a_parametrisation_has_no_inverse() -> None:
    module, weights = module_of(E, H), module_of(E, H).weights_as("linears")
    parametrize.register_parametrization(module.out_proj, "weight", Squared(), unsafe=True)
    before = {name: tensor.clone() for name, tensor in projection_weights(module).items()}
    with pytest.raises(ValueError, match="parametrised by Squared, which has no right_inverse"):
        module.load_weights({name: tensor + 1 for name, tensor in weights.items()})
    for name, tensor in projection_weights(module).items():
        assert torch.equal(tensor, before[name])


def test_exported_cross_attention_gives_the_same_output() -> None:
    module, x, key = module_of(E, H), x_of(), x_of(S, seed=2)
    exported = torch.export.export(module, (x, key)).module()
    torch.testing.assert_close(exported(x, key), module(x, key))
