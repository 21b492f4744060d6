"""Forward passes as lists of operations: the same bits, or the modules themselves."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from llm4ehr.episode import Episode
from service.engine.backends import recorded as module
from service.engine.backends.recorded import recorded
from tests.backends import (
    N_HOURS,
    NETWORKS,
    STEPS,
    Make,
    Stay,
    backend_of,
    computed,
    features_of,
    same_bits,
    tuned,
)

_INPUTS = (torch.arange(12.0).view(4, 3), torch.ones(4, 3))


class Small(nn.Module):
    """Views, a constant, a result that nobody uses, an output that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5))
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        scale = torch.arange(5.0).exp().view(5, 1).view(5)
        first, _ = self.inner(x * 2 + y).split([2, 3], dim=1)
        return self.inner(x)[:, None].view(4, 5).view(2, 10) * scale.repeat(2), first + 1, y


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger=module.__name__)
    return caplog


def test_a_record_does_what_the_modules_do_without_them(log: pytest.LogCaptureFixture) -> None:
    model = Small().eval()
    again = recorded(model, _INPUTS)
    calls = model.calls
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = torch.randn(4, 3), torch.randn(4, 3)
        with torch.inference_mode():
            made = again(*inputs)
            assert model.calls == calls
            expected = model(*inputs)
        model.calls = calls
        assert [m.numpy().tobytes() for m in made] == [e.numpy().tobytes() for e in expected]
    assert not log.records


def test_an_operation_can_be_replaced() -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * torch.relu(x)

    seen = []

    def counted(x: Tensor) -> Tensor:
        seen.append(len(x))
        return torch.relu(x)

    run = recorded(lambda x: (x.relu() + 1,), _INPUTS[:1], {torch.ops.aten.relu.default: counted})
    run(-_INPUTS[0])
    assert seen == [4, 4]  # once to compare
    other = recorded(lambda x: (x.relu(),), _INPUTS[:1], {torch.ops.aten.relu.default: doubled})
    assert torch.equal(other(_INPUTS[0])[0], _INPUTS[0])  # other bits: not used


def _looks(x: Tensor) -> tuple[Tensor, ...]:
    return (x + 1 if x.max() > 0 else x - 1,)


def _writes(x: Tensor) -> tuple[Tensor, ...]:
    return ((x + 1).mul_(2),)


@pytest.mark.parametrize("run", [_looks, _writes])
def test_what_cannot_be_recorded_runs_as_it_is(
    log: pytest.LogCaptureFixture, run: module.Pass
) -> None:
    assert recorded(run, _INPUTS[:1]) is run
    (record,) = log.records
    assert "cannot be recorded" in record.getMessage()


@pytest.mark.parametrize("pair", NETWORKS, ids="-".join)
def test_every_backbone_is_recorded(
    tiny_network: Make,
    random_episode: Stay,
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
    pair: tuple[str, str],
) -> None:
    """And gives the bits of its modules at every hour, not only at that of the record."""
    network = tuned(tiny_network, *pair)
    stay: Episode = random_episode(1, N_HOURS)
    with_records = computed(backend_of(network), features_of(network, stay), STEPS)
    assert not log.records
    monkeypatch.setattr(
        "service.engine.backends.torch_cpu.recorded", lambda run, inputs, replace: run
    )
    by_modules = computed(backend_of(network), features_of(network, stay), STEPS)
    assert same_bits(with_records, by_modules)
