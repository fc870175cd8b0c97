"""The reductions of measures against dense matrices: the strongest key, near keys, shared products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headscope import AttentionMatrix, masks
from headscope.heads.measures.products import Distance, Product, SharedProduct
from headscope.heads.measures.strongest import MaxAmong, Strongest
from headscope.ops.kernels import tiles
from headscope.ops.masks import Mask
from headscope.ops.reductions import Block, Entropy, Offsets, Reduction

MASKS = {
    "none": None,
    "causal": masks.causal(),
    "padding": masks.padding([37, 23]),
    "window": masks.sliding_window(11, 5),
    "documents": masks.causal() & masks.documents(torch.arange(37) // 13),
}
RADIUS = 3


def matrix_of(mask: Mask | None, size: int = 37, rows: int = 37) -> AttentionMatrix:
    """TextBatch 2, 6 heads on 3, of a few different scores: many are near, many far. The last ``rows`` rows."""
    random = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 6, size, 8, generator=random), torch.randn(2, 3, size, 8, generator=random)
    return AttentionMatrix(2 * query[:, :, -rows:], key, mask=mask)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 scores of 16 rows or fewer, so that the band crosses their edges."""
    monkeypatch.setattr(tiles, "_BLOCK", 128)
    monkeypatch.setattr(tiles, "_ROWS", 16)


def some_keys(size: int = 37) -> Tensor:
    """Keys that count, others in each text of the batch, [2, S]."""
    among = torch.ones(2, size, dtype=torch.bool)
    among[0, :2] = among[1, 5] = among[1, 20:23] = False
    return among


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_strongest_gives_the_largest_weights_and_the_offset_of_a_near_key(
    name: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks so narrow that keys near a row lie in the next block."""
    small_blocks(monkeypatch)
    matrix, among = matrix_of(MASKS[name]), some_keys()
    if known:
        matrix @ torch.ones(37, 1)
    wanted = (matrix.dense() * among[:, None, None]).max(-1)
    values, offsets, others, near_weights = matrix.reduce(Strongest(among, RADIUS))[0]
    torch.testing.assert_close(values, wanted.values)
    torch.testing.assert_close(others, (matrix.dense() * ~among[:, None, None]).amax(-1))
    distances = wanted.indices - torch.arange(37)
    near = (distances.abs() <= RADIUS) & (wanted.values > 0)
    assert 0.05 < near.float().mean() < 0.95
    assert torch.equal(offsets, distances.where(near, Strongest.FAR))
    torch.testing.assert_close(near_weights, matrix.reduce(Offsets(RADIUS))[0])


def test_strongest_of_the_last_rows_is_that_of_all_rows() -> None:
    """With more keys than rows, the position of a row is not its index."""
    matrix, among = matrix_of(masks.causal()), some_keys()
    whole, part = (m.reduce(Strongest(among, RADIUS))[0] for m in (matrix, matrix_of(masks.causal(), rows=20)))
    for all_rows, last_rows in zip(whole, part, strict=True):
        torch.testing.assert_close(last_rows, all_rows[:, :, 17:])


def test_strongest_has_no_offset_where_keys_share_the_largest_weight() -> None:
    """Uniform attention has no strongest key, nor has a row with its largest weight on a near and on a far key."""
    zeros = torch.zeros(1, 1, 9, 2)
    everything = torch.ones(1, 9, dtype=torch.bool)
    offsets = AttentionMatrix(zeros, zeros, mask=masks.causal()).reduce(Strongest(everything, RADIUS))[0].offsets
    assert offsets[0, 0].tolist() == [0] + [Strongest.FAR] * 8  # the first row sees one key
    key = zeros.clone()
    key[0, 0, [0, 7], 0] = 5.0
    offsets = AttentionMatrix(zeros + 1, key).reduce(Strongest(everything, RADIUS))[0].offsets
    assert offsets[0, 0].tolist() == [Strongest.FAR] * 9
    key[0, 0, 0, 0] = 0.0
    offsets = AttentionMatrix(zeros + 1, key).reduce(Strongest(everything, RADIUS))[0].offsets
    assert offsets[0, 0].tolist() == [Strongest.FAR] * 4 + [3, 2, 1, 0, -1]


def test_reductions_do_not_write_into_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next reduction of the pass reads the same block."""
    small_blocks(monkeypatch)
    mixed: list[bool] = []

    def unchanged(kind: type[Reduction]) -> None:
        update = kind.update

        def checked(self: Reduction, state: object, block: Block) -> None:
            before = block.centered.clone(), block.weights.clone()
            update(self, state, block)
            assert torch.equal(block.centered, before[0])
            assert torch.equal(block.weights, before[1])
            mixed.append(block.mixed)

        monkeypatch.setattr(kind, "update", checked)

    unchanged(Strongest)
    unchanged(MaxAmong)
    among = some_keys()
    for mask in MASKS.values():
        strongest, largest = matrix_of(mask).reduce(Strongest(among, RADIUS), MaxAmong(among))
        torch.testing.assert_close(largest.values, strongest.values)
        wanted = (matrix_of(mask).dense() * among[:, None, None]).argmax(-1)
        assert torch.equal(largest.indices[strongest.values > 0], wanted[strongest.values > 0])
    assert set(mixed) == {True, False}


@pytest.mark.parametrize("name", MASKS)
def test_shared_product_gives_each_reduction_its_own_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For columns of one head or of all."""
    small_blocks(monkeypatch)
    products: list[Tensor] = []
    original = Block.product
    monkeypatch.setattr(Block, "product", lambda self, x: products.append(x) or original(self, x))
    random = torch.Generator().manual_seed(4)
    x, own = torch.randn(2, 1, 37, 4, generator=random), torch.randn(2, 6, 37, 2, generator=random)
    matrix, among = matrix_of(MASKS[name]), some_keys()
    far = Distance(torch.stack([among, ~among], -1))
    shared_results = matrix.reduce(SharedProduct([Product(x), far, Product(own)]))[0]
    products_of_shared = len(products)
    alone: list[Reduction] = [Product(x), far, Product(own)]
    for one, reduction in zip(shared_results, alone, strict=True):
        torch.testing.assert_close(one, matrix.reduce(reduction)[0])
    assert len(products) > products_of_shared
    dense = matrix.dense()
    torch.testing.assert_close(shared_results[0], dense @ x)
    torch.testing.assert_close(shared_results[2], dense @ own)
    apart = (torch.arange(37)[:, None] - torch.arange(37)).abs()
    for number, these in enumerate((among, ~among)):
        wanted = (dense * apart * these[:, None, None]).sum(-1)
        torch.testing.assert_close(shared_results[1][..., number], wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("size", [36, 37])
@pytest.mark.parametrize("known", [False, True])
def test_entropy_of_rows_that_are_no_multiple_of_four(size: int, known: bool) -> None:
    """Four rows share a product; other numbers of rows are computed one by one."""
    matrix = matrix_of(masks.causal(), size)
    if known:
        matrix @ torch.ones(size, 1)
    dense = matrix.dense()
    torch.testing.assert_close(matrix.reduce(Entropy())[0], -torch.xlogy(dense, dense).sum(-1), atol=1e-5, rtol=1e-5)
