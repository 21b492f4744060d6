"""Read-outs: one state a stay, one a patch, their labels, and that the rest is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.readout import ReadoutOptions, patch_labels, patch_states, stay_state

NAN = float("nan")
MASK = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])


def states() -> Tensor:
    return torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))


def test_one_state_a_stay() -> None:
    x = states()
    assert torch.equal(stay_state(x, MASK, "last_valid"), torch.stack([x[0, 6], x[1, 3]]))
    assert torch.equal(stay_state(x, MASK, "last_row"), x[:, 6])
    torch.testing.assert_close(stay_state(x, MASK, "mean")[1], x[1, :4].mean(0))
    assert torch.equal(stay_state(x, MASK, "max")[1], x[1, :4].amax(0))


def test_padding_has_no_say_in_what_is_read_from_the_hours_inside() -> None:
    x = states()
    junk = x.masked_fill(~MASK[..., None], 1e6)
    for how in ("last_valid", "mean", "max"):
        assert torch.equal(stay_state(x, MASK, how), stay_state(junk, MASK, how))


def test_a_patch_is_read_from_its_hours_so_far() -> None:
    x = states()
    made = patch_states(x, 5)
    for hour in range(7):
        begin = hour - hour % 5
        torch.testing.assert_close(made[:, hour], x[:, begin : hour + 1].mean(1))
    later = x.clone()
    later[:, 5:] = 99
    torch.testing.assert_close(patch_states(later, 5)[:, :5], made[:, :5])


def test_labels_of_patches() -> None:
    labels = torch.tensor([[NAN, 0, 1, 0, 0, 0, 0], [5, 4, NAN, 2, 9, 9, 9]], dtype=torch.float64)
    highest, lowest = (patch_labels(labels, MASK, 5, how) for how in ("max", "min"))
    expected_high = torch.tensor([[NAN] * 4 + [1, NAN, 0], [NAN] * 3 + [5, NAN, NAN, NAN]])
    expected_low = torch.tensor([[NAN] * 4 + [0, NAN, 0], [NAN] * 3 + [2, NAN, NAN, NAN]])
    torch.testing.assert_close(highest, expected_high.double(), equal_nan=True)
    torch.testing.assert_close(lowest, expected_low.double(), equal_nan=True)
    unknown = patch_labels(torch.full((2, 7), NAN), MASK, 5, "max")
    assert unknown.isnan().all()


@pytest.mark.parametrize(
    ("options", "deployable"),
    [
        (ReadoutOptions(), True),
        (ReadoutOptions(per_stay={"mortality": "max"}), False),
        (ReadoutOptions(by_patch=True), False),
    ],
)
def test_what_can_be_deployed(options: ReadoutOptions, deployable: bool) -> None:
    assert options.deployable == deployable
