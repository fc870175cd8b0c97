"""Tests and intervals for counts in clusters, against values worked out by hand."""

import math

import pytest
import torch

from headscope.heads.statistics import cluster_bootstrap, cluster_score_test, holm


def test_holm_gives_values_computed_by_hand() -> None:
    # Sorted: 0.005·4 = 0.02, 0.01·3 = 0.03, 0.03·2 = 0.06, then 0.04·1, raised to the 0.06 before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_stays_between_0_and_1_and_keeps_the_order() -> None:
    assert holm([0.9, 0.4, 0.6]) == [1.0, 1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([0.02, 0.02]) == [0.04, 0.04]


@pytest.mark.parametrize("wrong", [-0.25, 1.5, math.nan])
def test_holm_refuses_numbers_outside_0_to_1(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"p-value {wrong}"):
        holm([0.5, wrong])


def test_score_test_is_the_normal_tail_of_its_statistic() -> None:
    # T = (3 + 1 − 1) / √(9 + 1 + 1)
    score = 3 / math.sqrt(11)
    wanted = 0.25 / (0.5 * math.erfc(1)) * 0.5 * math.erfc(score / math.sqrt(2))
    got = cluster_score_test(torch.tensor([3, 1, -1]))
    assert got.item() == pytest.approx(wanted, rel=1e-12)
    assert cluster_score_test(torch.tensor([-3, -1, 1])).item() == 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12])
def test_score_test_is_never_below_the_exact_sign_test(count: int) -> None:
    """The exact p, over all choices of signs, is never above the bound."""
    generator = torch.Generator().manual_seed(count)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * count).reshape(-1, count)
    for size in (
        torch.ones(count).double(),
        torch.rand(count, generator=generator).double(),
        torch.arange(count) + 1.0,
    ):
        drawn = (signs * size).sum(-1)
        for sign in signs[:: max(1, len(signs) // 50)]:
            exact = (drawn >= (sign * size).sum() - 1e-9).double().mean()
            assert cluster_score_test(sign * size) >= exact - 1e-12


def test_score_test_of_agreeing_clusters_is_the_normal_tail_at_their_root() -> None:
    for count in (1, 4, 25):
        got = cluster_score_test(torch.full((count,), 0.7)).item()
        assert got == pytest.approx(min(1, 3.178 * 0.5 * math.erfc(math.sqrt(count / 2))), rel=1e-3)


def test_score_test_of_zeros_is_1() -> None:
    got = cluster_score_test(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    assert got.tolist() == pytest.approx([1.0, 0.5043], rel=1e-3)
    assert cluster_score_test(torch.zeros(3, 0)).tolist() == [1.0, 1.0, 1.0]


def test_score_test_keeps_its_level_under_the_null() -> None:
    generator = torch.Generator().manual_seed(5)
    differences = torch.randint(-3, 4, (4000, 24), generator=generator)
    rejected = (cluster_score_test(differences) < 0.05).double().mean().item()
    assert rejected < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


def test_bootstrap_interval_covers_a_known_ratio() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(200):
        pairs = torch.randint(3, 9, (40,), generator=generator).double()
        rates = 0.3 + 0.4 * torch.rand(40, generator=generator).double()  # a mean of 0.5
        hits = torch.binomial(pairs, rates, generator=generator)
        low, high = cluster_bootstrap(hits, pairs, 400)
        inside += low.item() <= 0.5 <= high.item()
    assert 180 <= inside <= 199  # 95 % of 200 are 190


def test_bootstrap_interval_is_wider_for_dependent_cases() -> None:
    independent, clustered = torch.zeros(200), torch.zeros(20)
    independent[:100] = 1  # 200 clusters of one case
    clustered[:10] = 10  # the same 200 cases in clusters of ten
    narrow = cluster_bootstrap(independent, torch.ones(200))
    wide = cluster_bootstrap(clustered, torch.full((20,), 10.0))
    ratio = ((wide[1] - wide[0]) / (narrow[1] - narrow[0])).item()
    assert ratio == pytest.approx(math.sqrt(10), rel=0.2)


def test_bootstrap_is_batched_and_repeatable() -> None:
    numerators = torch.tensor([[[1.0, 2, 3], [0, 0, 0]], [[2, 2, 2], [2, 4, 6]]])
    pairs = torch.tensor([2.0, 4, 6])
    low, high = cluster_bootstrap(numerators, pairs, 50, seed=3)
    assert low.shape == high.shape == (2, 2)
    torch.testing.assert_close(low[0], torch.tensor([0.5, 0.0]).double())
    torch.testing.assert_close(high[0], torch.tensor([0.5, 0.0]).double())
    torch.testing.assert_close(low[1, 1].item(), 1.0)
    assert low[1, 0] < 0.5 < high[1, 0]
    again = cluster_bootstrap(numerators[1, 0], pairs, 50, seed=3)
    assert (again[0], again[1]) == (low[1, 0], high[1, 0])


def test_bootstrap_leaves_out_empty_clusters() -> None:
    with_empty = cluster_bootstrap(torch.tensor([1.0, 0, 2]), torch.tensor([4.0, 0, 4]))
    without = cluster_bootstrap(torch.tensor([1.0, 2]), torch.tensor([4.0, 4]))
    assert with_empty == without
    low, high = cluster_bootstrap(torch.zeros(3, 2), torch.zeros(2))
    assert low.isnan().all()
    assert high.shape == (3,)


def test_bootstrap_refuses_other_shapes_and_levels() -> None:
    with pytest.raises(ValueError, match=r"numerators \(2, 3\) and denominators \(4,\)"):
        cluster_bootstrap(torch.zeros(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"level 1\.5 and 7 replicates"):
        cluster_bootstrap(torch.ones(3), torch.ones(3), 7, level=1.5)
