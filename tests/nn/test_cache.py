"""Caches: chunks give one forward pass, windows drop positions, wrong use is refused."""

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from headscope import (
    KVCache,
    MultiHeadAttention,
    SlidingWindowCache,
    masks,
    positions,
)
from tests.nn.modules import B, E, H, L, S, module_of, x_of

POSITIONS: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "rotary": positions.rotary,
    "alibi": lambda: positions.alibi([0.5, 0.25, 0.125]),
}


@pytest.mark.parametrize("chunks", [[1] * L, [3, 4], [1, 5, 1], [L]], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_cache_in_chunks_of_any_size_gives_one_forward_pass(position: str, chunks: list[int]) -> None:
    module, x = module_of(E, H, num_kv_heads=1, position=POSITIONS[position]()), x_of()
    cache = KVCache(L)
    with torch.no_grad():
        parts = [module(part, mask=masks.causal(), cache=cache) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x, mask=masks.causal()))
    assert cache.length == L
    assert cache.nbytes == 2 * B * L * 4 * 8


@pytest.mark.parametrize("window", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("chunks", [[1] * 23, [3, 9, 1, 1, 9], [23], [2] * 11 + [1]], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_sliding_window_cache_stores_only_the_window(position: str, chunks: list[int], window: int) -> None:
    module, x = module_of(E, H, position=POSITIONS[position]()), x_of(23)
    cache = SlidingWindowCache(window)
    with torch.no_grad():
        parts = [module(part, mask=masks.causal(), cache=cache) for part in x.split(chunks, 1)]
        whole = module(x, mask=masks.sliding_window(window - 1))
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert cache.nbytes == 2 * B * H * 2 * window * 4 * 8


HIDING: dict[str, masks.Mask] = {
    "the first": ~masks.prefix(1),
    "some": ~masks.keys([0, 4, 5, 12]),
    "a prefix": masks.causal() & masks.prefix(5),
    "in one head": ~(masks.heads([1]) & masks.keys([8])),
}


@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("chunks", [[1] * 23, [3, 9, 1, 1, 9]], ids=str)
def test_mask_counts_keys_that_the_window_has_dropped(hiding: str, chunks: list[int]) -> None:
    module, x, cache = module_of(E, H), x_of(23), SlidingWindowCache(4)
    with torch.no_grad():
        mask = masks.causal() & HIDING[hiding]
        parts = [module(part, mask=mask, cache=cache) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x, mask=masks.sliding_window(3) & HIDING[hiding]))


def test_cache_projects_a_source_once() -> None:
    module, x, source = module_of(E, H), x_of(), x_of(S, seed=2)
    cache = KVCache(1)
    with torch.no_grad():
        wanted = module(x, source)
        first = module(x[:, :2], source, cache=cache)
        rest = module(x[:, 2:], torch.full_like(source, torch.nan), cache=cache)
    torch.testing.assert_close(torch.cat((first, rest), 1), wanted)


def test_truncate_drops_the_last_positions() -> None:
    module, x = module_of(E, H), x_of()
    for cache in (KVCache(20), SlidingWindowCache(20)):
        with torch.no_grad():
            wanted = module(x, mask=masks.causal(), cache=cache)[:, 4:]
            cache.truncate(4)
            torch.testing.assert_close(module(x[:, 4:], mask=masks.causal(), cache=cache), wanted)
    cache.reset()
    assert (cache.length, cache.nbytes) == (0, 0)


def _full(module: MultiHeadAttention) -> None:
    module(x_of(), cache=KVCache(5))


def _other_batch(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), cache=cache)
    module(x_of()[:1], cache=cache)


def _other_layer(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), cache=cache)
    module_of(E, H)(x_of(), cache=cache)


def _other_source(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), x_of(S), cache=cache)
    module(x_of(), x_of(4), cache=cache)


def _other_source_batch(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), x_of(S), cache=cache)
    module(x_of()[:1], x_of(S)[:1], cache=cache)


def _text_into_a_source(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), x_of(S), cache=cache)
    module(x_of(), cache=cache)


def _source_into_a_text(module: MultiHeadAttention) -> None:
    cache = KVCache(20)
    module(x_of(), cache=cache)
    module(x_of(), x_of(S), cache=cache)


def _gone(module: MultiHeadAttention) -> None:
    cache = SlidingWindowCache(3)
    module(x_of(), mask=masks.causal(), cache=cache)
    cache.truncate(1)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (_full, "room for 5 positions; 0 are used and 7 come"),
        (_other_batch, "holds batch 2, 3 heads of 4, torch.float64; what comes is batch 1"),
        (_other_layer, "belongs to another attention module"),
        (_other_source, "holds 11 positions of a source, batch 2, but the source has 4, batch 2"),
        (_other_source_batch, "holds 11 positions of a source, batch 2, but the source has 11, batch 1"),
        (_text_into_a_source, r"holds a source \(cross-attention\)"),
        (_source_into_a_text, "holds the text itself, but the source has 11"),
        (_gone, r"truncate\(1\): of 7 positions only the last"),
        (lambda m: KVCache(0), "KVCache got room for 0 positions: at least 1"),
        (lambda m: KVCache(5).truncate(3), r"truncate\(3\): the cache has 0 positions"),
    ],
)
def test_cache_refuses_wrong_use(wrong: Callable[[MultiHeadAttention], object], text: str) -> None:
    module = module_of(E, H)
    with torch.no_grad(), pytest.raises(ValueError, match=text):
        wrong(module)


def test_cache_refuses_gradients() -> None:
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        module_of(E, H)(x_of(), cache=KVCache(20))


def test_full_cache_stays_unchanged() -> None:
    module, cache = module_of(E, H), KVCache(8)
    with torch.no_grad():
        module(x_of(), mask=masks.causal(), cache=cache)
        with pytest.raises(ValueError, match="room for 8 positions; 7 are used and 7 come"):
            module(x_of(), cache=cache)
    assert cache.length == 7


@pytest.mark.parametrize("cache", [KVCache(20), SlidingWindowCache(4)], ids=["all", "window"])
def test_failed_call_leaves_the_cache_unchanged(cache: KVCache) -> None:
    module, x = module_of(E, H), x_of()
    with torch.no_grad():
        module(x[:, :3], mask=masks.causal(), cache=cache)
        with pytest.raises(ValueError, match=r"padding"):
            module(x[:, 3:], mask=masks.causal() & masks.padding([4, 4, 4]), cache=cache)
        assert cache.length == 3
        last = module(x[:, 3:], mask=masks.causal(), cache=cache)
        mask = masks.causal() if cache.window is None else masks.sliding_window(cache.window - 1)
        torch.testing.assert_close(last, module(x, mask=mask)[:, 3:])


def test_refused_cache_is_not_bound_to_the_module() -> None:
    cache, x = KVCache(20), x_of()
    with pytest.raises(ValueError, match="keeps no gradients"):
        module_of(E, H)(x, cache=cache)
    with torch.no_grad():
        module_of(E, H)(x, mask=masks.causal(), cache=cache)
    assert cache.length == L


@pytest.mark.parametrize("make", [lambda: KVCache(20), lambda: SlidingWindowCache(4)], ids=["all", "window"])
def test_cache_and_training_work_after_inference_mode(make: Callable[[], KVCache]) -> None:
    module, x, cache = module_of(E, 2, position=positions.rotary()), x_of(), make()
    with torch.inference_mode():
        module(x[:, :3], mask=masks.causal(), cache=cache)
    with torch.no_grad():
        last = module(x[:, 3:], mask=masks.causal(), cache=cache)
        mask = masks.causal() if cache.window is None else masks.sliding_window(cache.window - 1)
        torch.testing.assert_close(last, module(x, mask=mask)[:, 3:])
    module(x).sum().backward()
    assert module.in_proj.weight.grad is not None


@pytest.mark.parametrize("position", [None, positions.rotary()])
def test_equal_query_key_value_are_self_attention(position: positions.Rotary | None) -> None:
    """layer(x, x, x) once stored the first token's keys as a source, and used them for all later tokens."""
    torch.manual_seed(0)
    layer, x = MultiHeadAttention(16, 4, position=position).eval(), torch.randn(2, 7, 16)
    with torch.no_grad():
        plain = layer(x, mask=masks.causal())
        torch.testing.assert_close(layer(x, x, x, mask=masks.causal()), plain, atol=0, rtol=0)
        torch.testing.assert_close(layer.matrix(x, x).dense(), layer.matrix(x).dense(), atol=0, rtol=0)
    apart = [x[:, i : i + 1] for i in range(7)]
    with torch.no_grad():
        cache = KVCache(7)
        wanted = [layer(part, cache=cache) for part in apart]
        cache = KVCache(7)
        outputs = [layer(part, part, part, cache=cache) for part in apart]
    torch.testing.assert_close(torch.cat(outputs, 1), torch.cat(wanted, 1), atol=0, rtol=0)
    torch.testing.assert_close(torch.cat(outputs, 1), plain, atol=1e-5, rtol=1e-5)
    assert cache.length == 7


def test_sliding_window_cache_leaves_a_source_whole() -> None:
    torch.manual_seed(0)
    layer, x, source = MultiHeadAttention(16, 4).eval(), torch.randn(2, 3, 16), torch.randn(2, 9, 16)
    cache = SlidingWindowCache(3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, source, cache=cache), layer(x, source))


@pytest.mark.parametrize("copied", [lambda cache: pickle.loads(pickle.dumps(cache)), copy.deepcopy])
@pytest.mark.parametrize("make", [lambda: KVCache(20), lambda: SlidingWindowCache(4)])
def test_copy_of_a_cache_goes_on_as_the_cache_does(
    make: Callable[[], KVCache], copied: Callable[[KVCache], KVCache]
) -> None:
    module, cache = module_of(E, H), make()
    with torch.no_grad():
        module(x_of(), mask=masks.causal(), cache=cache)
        other = copied(cache)
        assert (other.length, other.nbytes) == (cache.length, cache.nbytes)
        outputs = [module(x_of(3, seed=5), mask=masks.causal(), cache=one) for one in (cache, other)]
        assert torch.equal(*outputs)
        with pytest.raises(ValueError, match="belongs to another attention module"):
            module_of(E, H)(x_of(1), cache=other)


def test_copy_of_a_source_cache_is_bound_by_its_first_call() -> None:
    module, cache = module_of(E, H), KVCache(1)
    with torch.no_grad():
        first = module(x_of(), x_of(S), cache=cache)
        other = pickle.loads(pickle.dumps(cache))
        assert torch.equal(module(x_of(), x_of(S), cache=other), first)
        with pytest.raises(ValueError, match="belongs to another attention module"):
            module_of(E, H)(x_of(), x_of(S), cache=other)


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 3]])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cache_without_a_length_grows(chunks: list[int], mode: Callable[[], AbstractContextManager[None]]) -> None:
    module, cache, x = module_of(E, H), KVCache(), x_of()
    with mode():
        outputs = [module(part, mask=masks.causal(), cache=cache) for part in x.split(chunks, 1)]
        torch.testing.assert_close(torch.cat(outputs, 1), module(x, mask=masks.causal()))
    assert cache.length == 7
    assert cache.nbytes <= 2 * 2 * B * 7 * E * 8
    with torch.no_grad():
        cache.truncate(2)
        again = module(x[:, 2:], mask=masks.causal(), cache=cache)
    torch.testing.assert_close(again, torch.cat(outputs, 1)[:, 2:])
