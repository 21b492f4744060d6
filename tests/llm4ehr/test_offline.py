"""Scoring whole stays: the same numbers whatever is scored beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from llm4ehr.bundle import Network
from llm4ehr.calibration import default_calibration
from llm4ehr.episode import Episode, empty_episode, featurise
from llm4ehr.offline import TOLERANCE, EpisodeScores, score_episodes

Make = Callable[..., Network]
Stay = Callable[..., Episode]
LENGTHS = (30, 1, 0, 48, 5, 48, 17)


@pytest.fixture(scope="module")
def stays(random_episode: Stay) -> list[Episode]:
    return [random_episode(seed, n) for seed, n in enumerate(LENGTHS)]


@torch.no_grad()
def direct(network: Network, episode: Episode) -> dict[str, np.ndarray]:
    """One stay through the network by itself."""
    features = featurise(episode, network.vocabulary, network.preprocessing, episode.n_hours)
    series, events = (torch.from_numpy(a)[None] for a in (features.series, features.events))
    mask = torch.ones(1, series.shape[1], dtype=torch.bool)
    v = network.model.encode_hours(series, events, mask)
    return {"hidden": v[0].numpy()} | {
        task: out[0].numpy() for task, out in network.model.predict(v).items()
    }


def test_scores_are_those_of_a_direct_forward(
    family: str, tiny_network: Make, stays: list[Episode]
) -> None:
    network = tiny_network(family)
    calibration = default_calibration(list(network.model.config.heads))
    for episode, scores in zip(stays, score_episodes(network, stays), strict=True):
        assert scores.episode_id == episode.episode_id
        if not episode.n_hours:
            continue
        alone = direct(network, episode)
        assert_allclose(scores.hidden, alone["hidden"], rtol=0, atol=TOLERANCE.hidden)
        answers = scores.answers(calibration)
        for task in network.model.config.heads:
            expected = calibration[task](alone[task], np.arange(len(alone[task])))
            atol = TOLERANCE.hours if task == "remaining_los" else TOLERANCE.probability
            assert_allclose(answers[task], expected, rtol=0, atol=atol)


def test_shapes_and_order(tiny_network: Make, stays: list[Episode]) -> None:
    network = tiny_network(heads={"mortality": 1, "phenotyping": 3})
    scores = list(score_episodes(network, stays, batch_hours=100))
    assert [s.episode_id for s in scores] == [e.episode_id for e in stays]
    for n, s in zip(LENGTHS, scores, strict=True):
        assert s.hidden.shape == (n, 16)
        assert s.observed.shape == (n, 11)
        assert {t: r.shape for t, r in s.raw.items()} == {
            "mortality": (n, 1),
            "phenotyping": (n, 3),
        }
    assert list(score_episodes(network, [])) == []


def test_stays_without_hours_give_no_rows(tiny_network: Make) -> None:
    network = tiny_network()
    empty = [empty_episode("a"), empty_episode("b", n_hours=2)]
    for batch_hours in (1, 100):
        none, two = score_episodes(network, empty, batch_hours)
        assert none.hidden.shape == (0, 16)
        assert none.raw["mortality"].shape == (0, 1)
        assert none.observed.shape == (0, 11)
        assert none.answers(default_calibration(list(none.raw)))["mortality"].shape == (0, 1)
        assert two.hidden.shape == (2, 16)
        assert np.isfinite(two.hidden).all()


def assert_close(a: EpisodeScores, b: EpisodeScores) -> None:
    assert_allclose(a.hidden, b.hidden, rtol=0, atol=TOLERANCE.hidden)
    calibration = default_calibration(list(a.raw))
    one, other = a.answers(calibration), b.answers(calibration)
    for task in one:
        atol = TOLERANCE.hours if task == "remaining_los" else TOLERANCE.probability
        assert_allclose(one[task], other[task], rtol=0, atol=atol)
    assert_array_equal(a.observed, b.observed)


def test_batch_size_and_neighbours_do_not_matter(
    family: str, tiny_network: Make, stays: list[Episode]
) -> None:
    network = tiny_network(family)
    together = list(score_episodes(network, stays))
    for batch_hours in (1, 60, 150):
        for a, b in zip(together, score_episodes(network, stays, batch_hours), strict=True):
            assert_close(a, b)
    backwards = list(score_episodes(network, stays[::-1]))[::-1]
    for a, b in zip(together, backwards, strict=True):
        assert_close(a, b)


def test_a_prefix_scores_like_the_beginning_of_the_stay(
    family: str, tiny_network: Make, stays: list[Episode]
) -> None:
    network = tiny_network(family)
    whole = next(score_episodes(network, [stays[3]]))
    early = next(score_episodes(network, [replace(stays[3], n_hours=20)]))
    assert_allclose(early.hidden, whole.hidden[:20], rtol=0, atol=TOLERANCE.hidden)


def test_hours_beyond_the_last_are_left_out(tiny_network: Make, random_episode: Stay) -> None:
    (scores,) = score_episodes(tiny_network(), [random_episode(3, 230)])
    assert scores.hidden.shape == (200, 16)


def test_scoring_leaves_the_model_in_eval_mode(tiny_network: Make, stays: list[Episode]) -> None:
    network = tiny_network(frozen=False)
    network.model.train()
    first, second = (next(score_episodes(network, stays[:1])).hidden for _ in range(2))
    assert_array_equal(first, second)  # no dropout
    assert not network.model.training
