"""Tuning strategies: what learns, what may not move, what is there at the start and in the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.model import LLM4EHR
from training import finetune as finetuning
from training.config import FinetuneConfig
from training.finetune import finetune
from training.heads import task_losses
from training.tuning import merge, set_train_mode, with_heads

Make = Callable[..., Network]
ADAPTER = {"strategy": "adapter", "width": 8}
LORA = {"strategy": "lora", "rank": 4}
TUNINGS: dict[str, Any] = {
    "linear": "linear",
    "end_to_end": "end_to_end",
    "adapter": ADAPTER,
    "adapter_norms": ADAPTER | {"train_norms": True},
    "prefix": {"strategy": "prompt", "position": "prefix"},
    "suffix": {"strategy": "prompt", "position": "suffix"},
    "kv": {"strategy": "prompt", "position": "kv"},
    "lora": LORA,
    "lora_encoder": LORA | {"train_series_encoder": True},
    "adapter_encoder": ADAPTER | {"train_series_encoder": True},
    "kv_encoder": {"strategy": "prompt", "position": "kv", "train_series_encoder": True},
}
# What learns besides the heads: a part of the name of each such weight.
LEARNS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "end_to_end": ("backbone.", "series_encoder."),
    "adapter": (".adapter.",),
    "adapter_norms": (".adapter.", "norm", "Norm", "ln_"),
    "prefix": ("prompt.",),
    "suffix": ("prompt.",),
    "kv": ("prompt.",),
    "lora": ("lora_",),
    "lora_encoder": ("lora_", "series_encoder."),
    "adapter_encoder": (".adapter.", "series_encoder."),
    "kv_encoder": ("prompt.", "series_encoder."),
}
WORDS = ("wte.", "embed_tokens.", "word_embeddings.")  # there, but never looked up


def learns(name: str, tuning: str) -> bool:
    if name.startswith("series_encoder.") and "series_encoder." not in LEARNS[tuning]:
        return False
    return name.startswith("heads.") or (
        any(part in name for part in LEARNS[tuning]) and not any(word in name for word in WORDS)
    )


def config_of(tuning: str, **changes: Any) -> FinetuneConfig:
    body = {
        "run": "run", "pretrained": "pretrained", "tuning": TUNINGS[tuning],
        "data": {"sources": [{"store": "store", "splits": ["a"]}]},
        "tasks": {"mortality": 1.0, "phenotyping": 1.0},
    }  # fmt: skip
    return FinetuneConfig.model_validate(body | changes)


def stays(n: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Series, events and mask of a long and a short stay."""
    torch.manual_seed(1)
    mask = torch.arange(n) < torch.tensor([[n], [8]])
    return torch.randn(2, n, 46), torch.rand(2, n, 9), mask


def states_of(model: LLM4EHR) -> Tensor:
    """What heads are trained on: all hours, or the read-out of a suffix."""
    series, events, mask = stays()
    if model.config.prompt is not None and model.config.prompt.position == "suffix":
        return model.encode_with_suffix(series, events, mask)[1]
    return model.encode_hours(series, events, mask)[mask]


def loss_of(model: LLM4EHR) -> Tensor:
    torch.manual_seed(3)
    outputs = model.predict(states_of(model))
    return torch.stack([(x - torch.randn_like(x)).square().mean() for x in outputs.values()]).sum()


def optimiser_of(model: LLM4EHR) -> torch.optim.Optimizer:
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learning, lr=0.01, weight_decay=0.1)


def train(
    model: LLM4EHR,
    config: FinetuneConfig,
    optimiser: torch.optim.Optimizer | None = None,
    steps: int = 2,
) -> None:
    optimiser = optimiser or optimiser_of(model)
    for _ in range(steps):
        set_train_mode(model, config.tuning)
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    model.eval()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def untuned(family: str, tiny_network: Make) -> Network:
    """As pre-training leaves it: batch norm, whose running statistics must not move either."""
    return tiny_network(family, heads={}, ts_norm="batch")


@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_is_not_tuned_stays_to_the_last_bit(untuned: Network, tuning: str) -> None:
    config = config_of(tuning, dropout=0.1)
    model = with_heads(untuned, config).model
    before = copied(model)
    train(model, config)
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    expected = {n for n in before if learns(n, tuning)}
    # Attention does not feel a bias of its keys: whether one moves is left to rounding.
    assert {n for n in moved ^ expected if not n.endswith(("key.bias", "k_proj.bias"))} == set()
    statistics = {name for name, _ in model.named_buffers()}
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= moved - statistics


@torch.no_grad()
@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_start_is_the_pretrained_network(untuned: Network, tuning: str) -> None:
    model = with_heads(untuned, config_of(tuning)).model.eval()
    series, events, mask = stays()
    v = model.encode_hours(series, events, mask)[mask]
    away = (v - untuned.model.encode_hours(series, events, mask)[mask]).abs().max()
    if tuning in ("linear", "end_to_end") or tuning.startswith("lora"):
        assert away == 0
    elif tuning == "suffix":
        assert away < 1e-5
    elif tuning.startswith("adapter"):
        assert 0 < away < 1e-3
    else:
        assert away > 1e-3  # hours attend to the prompt


@pytest.mark.parametrize("tuning", TUNINGS)
def test_frozen_modules_stay_in_eval_mode(tiny_network: Make, tuning: str) -> None:
    config = config_of(tuning, dropout=0.5)
    model = with_heads(tiny_network(heads={}, ts_norm="batch"), config).model
    set_train_mode(model, config.tuning)
    whole = tuning == "end_to_end"
    assert all(m.training == whole for m in model.backbone.modules() if isinstance(m, nn.Dropout))
    encoder = whole or tuning.endswith("_encoder")
    assert all(m.training == encoder for m in model.series_encoder.modules())
    assert model.heads.training


def test_dropout_of_lora_is_on_in_training_alone(tiny_network: Make) -> None:
    config = config_of("lora")
    tuning = config.tuning.model_copy(update={"dropout": 0.5})
    config = config.model_copy(update={"tuning": tuning})
    model = with_heads(tiny_network(heads={}), config).model
    set_train_mode(model, config.tuning)
    on = {n for n, m in model.backbone.named_modules() if isinstance(m, nn.Dropout) and m.training}
    assert on
    assert all("lora_dropout" in name for name in on)
    model.eval()
    assert not any(m.training for m in model.modules())


# LoRA.


def test_merged_weights_answer_like_the_updates(untuned: Network) -> None:
    config = config_of("lora")
    network = with_heads(untuned, config)
    train(network.model, config, steps=5)
    kept = copied(network.model)
    with torch.no_grad():
        states = states_of(network.model)
    merged = merge(network).model
    with torch.no_grad():
        away = (states_of(merged) - states).abs().max()
    assert away < 1e-6 * states.abs().max()
    assert merged.state_dict().keys() - copied(untuned.model).keys() == {
        n for n in kept if n.startswith("heads.")
    }
    changed = {
        name
        for name, weight in untuned.model.state_dict().items()
        if not torch.equal(weight, merged.state_dict()[name])
    }
    ends = ("c_attn.weight", "q_proj.weight", "v_proj.weight", "query.weight", "value.weight")
    assert len(changed) == (2 if "c_attn" in str(changed) else 4)
    assert all(name.endswith(ends) for name in changed)


def test_a_merged_network_is_an_ordinary_one(tiny_network: Make, tmp_path: Path) -> None:
    """Stored without loss, although its attention is not what bfloat16 can hold any more."""
    pretrained = tiny_network(heads={})
    for weight in pretrained.model.backbone.parameters():
        weight.data = weight.data.bfloat16().float()
    config = config_of("lora")
    network = with_heads(pretrained, config)
    train(network.model, config)
    merged = merge(network)
    save_network(tmp_path, merged)
    with torch.no_grad():
        assert torch.equal(states_of(load_network(tmp_path).model), states_of(merged.model))


def test_merging_leaves_other_networks_alone(tiny_network: Make) -> None:
    network = with_heads(tiny_network(heads={}), config_of("adapter"))
    before = copied(network.model)
    assert merge(network) is network
    after = network.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Checkpoints.


@pytest.mark.parametrize("tuning", ["adapter", "prefix", "kv", "lora"])
def test_a_stopped_run_goes_on_to_the_same_bits(tiny_network: Make, tuning: str) -> None:
    """Weights and moments of a checkpoint fit what is built anew."""
    config = config_of(tuning)

    def start() -> tuple[LLM4EHR, torch.optim.Optimizer]:
        torch.manual_seed(4)
        model = with_heads(tiny_network(heads={}), config).model
        return model, optimiser_of(model)

    whole, optimiser = start()
    train(whole, config, optimiser, steps=2)
    kept, moments = copied(whole), copy.deepcopy(optimiser.state_dict())
    train(whole, config, optimiser, steps=2)
    resumed, optimiser = start()
    resumed.load_state_dict(kept)
    optimiser.load_state_dict(moments)
    train(resumed, config, optimiser, steps=2)
    after = whole.state_dict()
    assert after.keys() == kept.keys() == resumed.state_dict().keys()
    assert all(torch.equal(tensor, after[n]) for n, tensor in resumed.state_dict().items())
    assert not all(torch.equal(kept[name], after[name]) for name in kept)


# Refused.


def test_a_prompt_needs_room_beside_the_hours(tiny_network: Make) -> None:
    pretrained = tiny_network(heads={})  # 256 positions
    for tuning in ("prefix", "suffix"):
        with_heads(pretrained, config_of(tuning, max_hours=236))
        with pytest.raises(ValueError, match="at most 236 hours"):
            with_heads(pretrained, config_of(tuning, max_hours=237))
    with_heads(pretrained, config_of("kv", max_hours=256))


def test_a_suffix_beside_an_event_stream_is_refused(tiny_network: Make) -> None:
    pretrained = tiny_network(heads={}, events="stream")
    with_heads(pretrained, config_of("kv"))
    with pytest.raises(ValueError, match="event stream"):
        with_heads(pretrained, config_of("suffix"))


def test_the_pretrained_network_is_left_alone(tiny_network: Make) -> None:
    pretrained = tiny_network(heads={})
    before, config = copied(pretrained.model), pretrained.model.config
    for tuning in TUNINGS:
        made = with_heads(pretrained, config_of(tuning))
        train(made.model, config_of(tuning))
    assert pretrained.model.config == config
    assert all(torch.equal(t, before[n]) for n, t in pretrained.model.state_dict().items())


# A whole run.


@pytest.mark.parametrize("tuning", ["adapter_norms", "prefix", "suffix", "kv", "lora_encoder"])
def test_a_run_with_each_strategy_goes_on_where_it_stopped(
    pretrained: Path,
    store_2012: Path,
    tmp_path: Path,
    tuning: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the same files; and what they hold is the network that was returned."""

    def config(run: str) -> FinetuneConfig:
        return config_of(
            tuning,
            run=tmp_path / run,
            pretrained=pretrained,
            data={
                "sources": [{"store": store_2012, "splits": ["a", "b"]}],
                "cache": tmp_path / "features", "n_folds": 2, "validation_fold": 1,
            },
            tasks={"mortality": 1.0, "decompensation": 1.0},
            optim={"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 2},
        )  # fmt: skip

    calls = 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return task_losses(*arguments)

    network = finetune(config("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "task_losses", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(config("stopped"))
    finetune(config("stopped"))
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "stopped")]
    assert weights[0] == weights[1]
    before = load_network(pretrained).model.state_dict()
    after = load_network(tmp_path / "whole").model.state_dict()
    assert all(torch.equal(tensor, after[n]) for n, tensor in network.model.state_dict().items())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {"c_attn.weight" if part == "lora_" else part for part in LEARNS[tuning]}
    assert all(any(part in name for part in parts) for name in moved)
    assert not any("lora" in name or "base_layer" in name for name in after)
