"""The pre-training objective against its reference values, and what may not change it.

The values are those of docs/model.md: two episodes of three patches each, one of them unusable.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from training.objectives import (
    ObjectiveConfig,
    contrastive_terms,
    nce_loss,
    omega_loss,
    public_code_terms,
    reconstruction_loss,
)

ALL = torch.ones(2, 3, dtype=torch.bool)
FIVE = torch.tensor([[True, True, True], [True, False, True]])
# (usable, NCE without and with the positive, omega lower and full), by scope; sums over anchors
REFERENCE = {
    ("five", "batch"): (-2.888544254, 2.372499596, 3.165388778, 7.222423133),
    ("five", "episode"): (-7.635561851, 1.472800718, 0.756175518, 2.061025181),
    ("all", "batch"): (-1.459208427, 3.534950324, 4.588431589, 9.855964644),
    ("all", "episode"): (None, None, 1.829481827, 4.171895563),
}


def patches(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    i, d = np.arange(6)[:, None], np.arange(4)[None]
    v, z = np.sin(1 + 0.7 * i + 0.3 * d * (i + 1)), np.cos(0.5 + 0.4 * i * (d + 1))
    v, z = (torch.tensor(a, dtype=dtype).view(2, 3, 4) for a in (v, z))
    return v.requires_grad_(), z.requires_grad_()


def terms(usable: Tensor = FIVE, **switches: Any) -> tuple[float, float]:
    v, z = patches()
    config = ObjectiveConfig(**{"tau": 0.5, "reduction": "sum"} | switches)
    nce, omega = contrastive_terms(v, z, usable, config)
    return nce.item(), omega.item()


@pytest.mark.parametrize(("usable", "scope"), list(REFERENCE))
def test_reference_values(usable: str, scope: str) -> None:
    mask = FIVE if usable == "five" else ALL
    excluded, included, lower, full = REFERENCE[usable, scope]
    scopes = {"nce_scope": scope, "omega_scope": scope}
    if excluded is not None:
        nce = terms(mask, nce_denominator="exclude", **scopes)[0]
        assert nce == pytest.approx(excluded, abs=1e-6)
        nce = terms(mask, nce_denominator="include", **scopes)[0]
        assert nce == pytest.approx(included, abs=1e-6)
    assert terms(mask, omega_mask="lower", **scopes)[1] == pytest.approx(lower, abs=1e-6)
    assert terms(mask, omega_mask="full", **scopes)[1] == pytest.approx(full, abs=1e-6)
    upper = terms(mask, omega_mask="upper", **scopes)[1]
    assert upper == pytest.approx(full - lower, abs=1e-6)


def test_reductions() -> None:
    nce, omega = terms()
    mean = terms(reduction="anchor_mean")
    # Three and two usable patches: all five are anchors, in both scopes.
    assert mean == pytest.approx((nce / 5, omega / 5), abs=1e-9)
    assert terms(reduction="pair_mean") == pytest.approx((nce / 5, omega / 25), abs=1e-9)


def test_the_defaults_are_the_readings_that_the_docs_argue_for() -> None:
    assert ObjectiveConfig() == ObjectiveConfig(
        lambda_nce=1, lambda_omega=1, lambda_recon=1, tau=0.02, nce_denominator="exclude",
        nce_scope="batch", omega_scope="episode", omega_mask="lower", omega_grad="stop",
        reduction="anchor_mean", recon="next_step_sum", pad_hours="mask", unusable_patches="drop",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("switch", "nce_changes", "omega_changes"),
    [
        ({"nce_denominator": "include"}, True, False),  # M1
        ({"nce_scope": "episode"}, True, False),  # M2
        ({"omega_scope": "batch"}, False, True),  # M3
        ({"omega_mask": "full"}, False, True),  # M4
        ({"omega_mask": "upper"}, False, True),
        ({"omega_grad": "flow"}, False, False),  # M5: gradients only
        ({"reduction": "anchor_mean"}, True, True),  # M6
        ({"tau": 0.02}, True, True),
        ({"recon": "same_step_mean"}, False, False),  # M9, M11: the other term
        ({"pad_hours": "keep"}, False, False),
        ({"unusable_patches": "keep"}, True, True),
    ],
)
def test_a_switch_changes_its_own_term_alone(
    switch: dict[str, Any], nce_changes: bool, omega_changes: bool
) -> None:
    before, after = terms(), terms(**switch)
    assert [a != b for a, b in zip(before, after, strict=True)] == [nce_changes, omega_changes]


def test_the_published_code() -> None:
    v, z = patches()
    nce, omega = public_code_terms(v, z, FIVE, 0.5)
    assert nce.item() == pytest.approx(0.578104127, abs=1e-6)
    assert omega.item() == pytest.approx(0.494305454, abs=1e-6)
    triangular = public_code_terms(v, z, FIVE, 0.5, triangular=True)[1]
    assert triangular.item() == pytest.approx(0.836576253, abs=1e-6)
    kept = terms(unusable_patches="keep", omega_mask="full")
    assert kept == pytest.approx((nce.item(), omega.item()), abs=1e-12)


# Reconstruction.


def cells() -> tuple[Tensor, Tensor]:
    index = torch.arange(24, dtype=torch.float64).view(2, 4, 3)
    return (0.5 * index).sin(), (0.3 * index).cos()


def test_reconstruction_of_the_next_hour() -> None:
    x, guess = cells()
    # The reference pairs a guess with its own hour; here it stands at the hour it was decoded from.
    decoded = torch.roll(guess, -1, dims=1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    loss = reconstruction_loss(x, decoded, mask, ObjectiveConfig())
    assert loss.item() == pytest.approx(2.076328604, abs=1e-6)
    decoded[:, -1] = 1e9  # decoded from the last hour: there is nothing to compare it with
    assert reconstruction_loss(x, decoded, mask, ObjectiveConfig()).item() == loss.item()


def test_reconstruction_of_the_same_hour() -> None:
    x, guess = cells()
    mask = torch.ones(2, 4, dtype=torch.bool)
    config = ObjectiveConfig(recon="same_step_mean")
    expected = (x - guess).square().mean().item()
    assert reconstruction_loss(x, guess, mask, config).item() == pytest.approx(expected)
    assert reconstruction_loss(x, guess + 100, mask, config).item() == 10


@pytest.mark.parametrize("recon", ["next_step_sum", "same_step_mean"])
def test_padded_hours_count_only_when_kept(recon: str) -> None:
    x, guess = cells()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    junk_x, junk_guess = x.clone(), guess.clone()
    junk_x[1, 2:], junk_guess[1, 2:] = 3.0, -4.0
    masked, kept = (ObjectiveConfig(recon=recon, pad_hours=p) for p in ("mask", "keep"))
    values = [
        [reconstruction_loss(*pair, mask, config).item() for config in (masked, kept)]
        for pair in ((x, guess), (junk_x, junk_guess))
    ]
    assert values[0][0] == values[1][0]
    assert values[0][1] != values[1][1]


def test_each_episode_is_averaged_over_its_valid_hours() -> None:
    x, decoded = cells()
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    errors = (x[:, 1:] - decoded[:, :-1]).square().sum(-1)
    expected = (errors[0].sum() / 4 + errors[1, 0] / 2) / 2
    loss = reconstruction_loss(x, decoded, mask, ObjectiveConfig())
    assert loss.item() == pytest.approx(expected.item())
    # Stays without any hour drop out of the mean.
    none = torch.zeros(1, 4, dtype=torch.bool)
    widened = [torch.cat([a, a[:1]]) for a in (x, decoded)]
    again = reconstruction_loss(*widened, torch.cat([mask, none]), ObjectiveConfig())
    assert again.item() == pytest.approx(expected.item())
    assert reconstruction_loss(x[:1], decoded[:1], none, ObjectiveConfig()).item() == 0


# Invariances.


@pytest.mark.parametrize(
    "switches", [{}, {"omega_mask": "full", "omega_scope": "batch", "nce_denominator": "include"}]
)
def test_the_order_of_episodes_does_not_matter(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    v, z = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    usable = torch.rand(4, 6) < 0.7
    config = ObjectiveConfig(tau=0.1, **switches)
    order = torch.tensor([2, 0, 3, 1])
    one = contrastive_terms(v, z, usable, config)
    other = contrastive_terms(v[order], z[order], usable[order], config)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", ["batch", "episode"])
def test_unusable_patches_and_padding_have_no_say(scope: str) -> None:
    config = ObjectiveConfig(tau=0.5, nce_scope=scope, omega_scope=scope)
    v, z = patches()
    one = contrastive_terms(v, z, FIVE, config)
    one[0].add(one[1]).backward()
    gradients = v.grad.clone(), z.grad.clone()
    assert not gradients[0][~FIVE].any()
    assert not gradients[1][~FIVE].any()

    def padded(x: Tensor) -> Tensor:
        x = torch.where(FIVE[..., None], x.detach(), torch.full_like(x, 1e6))
        return torch.nn.functional.pad(x, (0, 0, 0, 2), value=-7.0)

    other = contrastive_terms(padded(v), padded(z), torch.nn.functional.pad(FIVE, (0, 2)), config)
    assert [t.item() for t in one] == [t.item() for t in other]


@pytest.mark.parametrize("unusable_patches", ["drop", "keep"])
def test_no_usable_patch_gives_zero_and_finite_gradients(unusable_patches: str) -> None:
    v, z = patches()
    config = ObjectiveConfig(unusable_patches=unusable_patches)
    nce, omega = contrastive_terms(v, z, torch.zeros_like(FIVE), config)
    assert (nce.item(), omega.item()) == (0, 0)
    (nce + omega).backward()
    assert torch.isfinite(v.grad).all()


@pytest.mark.parametrize("scope", ["batch", "episode"])
@pytest.mark.parametrize("denominator", ["exclude", "include"])
@pytest.mark.parametrize("reduction", ["anchor_mean", "sum", "pair_mean"])
def test_episodes_of_a_single_patch(scope: str, denominator: str, reduction: str) -> None:
    config = ObjectiveConfig(
        nce_scope=scope, omega_scope=scope, nce_denominator=denominator, reduction=reduction
    )
    for usable in ([[1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 1]]):
        v, z = patches()
        nce, omega = contrastive_terms(v, z, torch.tensor(usable).bool(), config)
        assert math.isfinite(nce.item())
        assert math.isfinite(omega.item())
        (nce + omega).backward()
        assert torch.isfinite(v.grad).all()
        assert z.grad is None or torch.isfinite(z.grad).all()


def test_an_anchor_without_candidates_is_left_out() -> None:
    """The second episode has one usable patch: in episode scope it is no anchor at all."""
    usable = torch.tensor([[True, True, True], [True, False, False]])
    scopes = {"nce_scope": "episode", "omega_scope": "episode", "reduction": "anchor_mean"}
    v, z = patches()
    config = ObjectiveConfig(tau=0.5, **scopes)
    alone = contrastive_terms(v[:1], z[:1], usable[:1], config)
    assert terms(usable, **scopes) == pytest.approx([t.item() for t in alone], abs=1e-12)


def test_omega_is_a_weight_unless_gradients_shall_flow() -> None:
    for omega_grad, flows in (("stop", False), ("flow", True)):
        v, z = patches()
        config = ObjectiveConfig(tau=0.5, omega_grad=omega_grad)
        episode = torch.tensor([0, 0, 0, 1, 1, 1])
        omega_loss(v.flatten(0, 1), z.flatten(0, 1), episode, config).backward()
        assert v.grad.any()
        assert (z.grad is not None and bool(z.grad.any())) == flows
        nce_loss(v.flatten(0, 1), z.flatten(0, 1), episode, config).backward()
        assert z.grad.any()


def test_cosines_do_not_see_the_length_and_stay_in_fp32() -> None:
    v, z = patches()
    config = ObjectiveConfig(tau=0.5)
    plain = contrastive_terms(v, z, FIVE, config)
    scaled = contrastive_terms(5 * v, 0.1 * z, FIVE, config)
    torch.testing.assert_close(plain, scaled, rtol=1e-12, atol=1e-12)
    half = contrastive_terms(v.bfloat16(), z.bfloat16(), FIVE, config)
    assert {t.dtype for t in half} == {torch.float32}
    assert half[0].item() == pytest.approx(plain[0].item(), abs=0.05)


def test_autocast_does_not_reach_the_cosines() -> None:
    """At tau = 0.02 the rounding of bf16 near 1 is a fifth of a unit of the logits."""
    v, z = (x.detach().float() for x in patches())
    config = ObjectiveConfig(tau=0.02)
    exact = contrastive_terms(v, z, FIVE, config)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_terms(v, z, FIVE, config) == exact


def test_random_patches_have_the_expected_size() -> None:
    torch.manual_seed(0)
    v, z = torch.randn(2, 1, 40, 768)
    nce, _ = contrastive_terms(v, z, torch.ones(1, 40, dtype=torch.bool), ObjectiveConfig())
    assert nce.item() == pytest.approx(5.2, abs=0.5)


@pytest.mark.parametrize("switch", [{"nce_scope": "episode"}, {"unusable_patches": "keep"}])
def test_a_queue_without_use_is_refused(switch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="queue_patches"):
        ObjectiveConfig(queue_patches=8, **switch)
    assert ObjectiveConfig(queue_patches=8).queue_patches == 8
