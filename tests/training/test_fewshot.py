"""Few-shot: reproducible, of the right size, with the deaths and the labels that training needs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.fewshot import few_shot


@pytest.mark.parametrize(("fraction", "size"), [(0.1, 817), (0.05, 408), (1.0, 8168)])
def test_the_sizes_of_the_paper(fraction: float, size: int) -> None:
    assert len(few_shot(np.arange(8168), fraction, 0)) == size


@given(
    n=st.integers(1, 60),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
    labels=st.integers(0, 5),
)
def test_a_part_of_the_stays_drawn_by_the_seed(
    n: int, fraction: float, seed: int, labels: int
) -> None:
    rng = np.random.default_rng(n)
    index = np.flatnonzero(rng.random(2 * n) < 0.5)
    if not index.size:
        return
    deaths = rng.choice([0.0, 1.0, np.nan], 2 * n)
    phenotypes = (rng.random((2 * n, labels)) < 0.2).astype(float)
    drawn = few_shot(index, fraction, seed, deaths, phenotypes)
    assert len(drawn) == max(round(fraction * len(index)), 1)
    assert np.all(np.diff(drawn) > 0)
    assert set(drawn) <= set(index)
    assert np.array_equal(drawn, few_shot(index, fraction, seed, deaths, phenotypes))
    # Exchanging stays for the labels leaves the number of deaths as it was drawn.
    plain = few_shot(index, fraction, seed, deaths)
    assert np.nansum(deaths[plain]) == np.nansum(deaths[drawn])
    assert (phenotypes[drawn] == 1).any(0).sum() >= (phenotypes[plain] == 1).any(0).sum()


def test_seeds_draw_differently() -> None:
    draws = {tuple(few_shot(np.arange(100), 0.1, seed)) for seed in range(5)}
    assert len(draws) == 5


def test_the_share_of_deaths_is_kept() -> None:
    deaths = np.zeros(1000)
    deaths[:130] = 1
    for seed in range(5):
        assert deaths[few_shot(np.arange(1000), 0.1, seed, deaths)].sum() == 13


def test_a_rare_death_is_among_the_drawn() -> None:
    deaths = np.zeros(100)
    deaths[7] = 1
    for seed in range(5):
        assert 7 in few_shot(np.arange(100), 0.05, seed, deaths)


def test_every_label_keeps_a_positive_where_there_is_room() -> None:
    phenotypes = np.zeros((200, 4))
    phenotypes[3, 0] = phenotypes[[3, 8], 1] = phenotypes[10:150, 2] = 1
    for seed in range(20):
        drawn = few_shot(np.arange(200), 0.05, seed, phenotypes=phenotypes)
        assert len(drawn) == 10
        assert phenotypes[drawn].any(0).tolist() == [True, True, True, False]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_a_fraction_is_a_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        few_shot(np.arange(3), fraction, 0)
