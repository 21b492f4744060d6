"""Heads on a pre-trained encoder: all tasks jointly, one encoder, hour by hour."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.model import LLM4EHR, Task
from training.calibrate import fit_calibration, uncalibrated
from training.checkpoint import learning_state, load_learning_state
from training.config import FinetuneConfig
from training.dataset import LABEL_COLUMNS, Batch, FeatureSet, batches, build_features, subsample
from training.evaluation.held_out import write_held_out
from training.fewshot import few_shot
from training.heads import Targets, predict, selection_score, task_losses
from training.loop import Trainer, device
from training.processes import agreed, even, join, total
from training.readout import ReadoutOptions, TaskModule
from training.run_folder import RunFolder
from training.sources import LeakageError, Source, is_another, open_sources, origins
from training.trackers import check_trackers
from training.tuning import merge, set_train_mode, with_heads

_NOTE_TASK = {"length_of_stay": "remaining_los"}  # what stores may call a task in label_notes


def finetune(config: FinetuneConfig) -> Network:
    """Run, resume or, if it is finished, load a fine-tuning.

    The best epoch on the validation fold is kept, or the last one where the configuration says so.
    Raises ValueError where a store has the name of other data that the encoder was pre-trained on.
    """
    check_trackers(config.trackers)
    processes = join()
    sources = open_sources(config.data.sources, training=True)
    pretrained = load_network(config.pretrained)
    run = RunFolder(config.run, "finetune", config)
    if run.finished:
        return load_network(config.run)
    pretraining = _pretraining(config.pretrained, sources)
    torch.manual_seed(config.seed)
    network = with_heads(pretrained, config)
    model = network.model.to(device())
    if config.optim.compile:
        model.backbone.model.compile(dynamic=True)
    with processes.main_process_first():
        features = build_features(
            sources,
            network.preprocessing,
            network.vocabulary,
            config.data.cache,
            config.label_options,
            config.max_hours,
        )
    train, held_out = split(features, config)
    options = ReadoutOptions.of(config, model.config.patch_hours)
    trainer = Trainer(
        TaskModule(model, options),
        parameter_groups(model, config),
        config.optim,
        run,
        lambda epoch: _epoch_batches(features, train, config, epoch),
        _loader(features, config, model),
        config.trackers,
    )

    def step(batch: Batch, trainer: Trainer) -> dict[str, Tensor]:
        set_train_mode(model, config.tuning)
        targets = Targets.of(batch, options)
        losses = task_losses(trainer.module(batch), targets, config.los_scale)
        loss = torch.stack([config.tasks[t] * losses[t] for t in config.tasks]).sum()
        trainer.backward(loss)
        return {"loss": total(loss)} | {task: total(cost) for task, cost in losses.items()}

    def validate(precision: str) -> tuple[dict[Task, Tensor], Targets]:
        load = _validation_loader(features, config, model, trainer.device)
        return predict(trainer.module, options, load, held_out, precision)

    best_file = config.run / "best.safetensors"
    selects = bool(len(held_out)) and config.select_by != "last"

    def after_epoch(epoch: int) -> bool:
        outputs, targets = validate(config.optim.precision)
        score = selection_score(config.select_by, outputs, targets, config.tasks, config.los_scale)
        score = agreed(score, trainer.device)  # or one process might stop, and others go on
        if math.isnan(score):  # one class alone is held out: no epoch is better than another
            score = -math.inf
        trainer.accelerator.log({"validation_score": score}, step=trainer.step)
        history: list[float] = trainer.extra.setdefault("scores", [])
        if not history or score > max(history):
            state = learning_state(trainer.module)
            if processes.is_main_process:
                save_file(state, best_file)
        history.append(score)
        return epoch - int(np.argmax(history)) < config.patience

    trainer.fit(step, after_epoch if selects else None)
    processes.wait_for_everyone()
    if selects:
        load_learning_state(trainer.module, load_file(best_file))
    # In the precision that answers are given in.
    fitted = fit_calibration(config, *validate("fp32")) if len(held_out) else uncalibrated(config)
    whole = trainer.whole(model, lambda: with_heads(pretrained, config).model)
    network = merge(replace(network, model=whole))
    if processes.is_main_process:
        save_network(config.run, network)
        (config.run / "pretrained.json").write_text(json.dumps(pretraining, indent=2))
        (config.run / "subjects.json").write_text(
            json.dumps(sorted({features.subjects[i] for i in (*train, *held_out)}))
        )
        if len(held_out):
            write_held_out(config.run / "held_out", config, sources, network, fitted)
        run.finish(
            {
                **origins(sources),
                "label_notes": label_notes(sources, list(config.tasks)),
                "preprocessing_digest": network.preprocessing_digest,
                "vocabulary_digest": network.vocabulary.digest,
                "episodes": len(train),
                "validation_episodes": len(held_out),
                "labelled": labelled(features, train, list(config.tasks)),
                "steps": trainer.step,
                "validation_scores": [
                    s if np.isfinite(s) else None for s in trainer.extra.get("scores", [])
                ],
                **fitted,
            }
        )
    processes.wait_for_everyone()  # what comes next may read the run
    return network


def _pretraining(folder: Path, sources: Sequence[Source]) -> dict[str, Any]:
    """Configuration and result of the pre-training, checked against what is read now."""
    pretraining = {
        "config": json.loads((folder / "pretrain.json").read_text()),
        "result": json.loads((folder / "result.json").read_text()),
    }
    for source in sources:
        if is_another(source.store.info, pretraining["result"]["stores"]):
            raise ValueError(
                f"{source.store.path}: called {source.name!r} like another store, which the "
                "encoder was pre-trained on; name it with `prepare --name`"
            )
    return pretraining


def split(
    features: FeatureSet, config: FinetuneConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Stays to train on and stays held out. Few-shot and `max_episodes` draw from the former."""
    fold = features.fold(config.data.n_folds)
    held_out = np.flatnonzero(fold == config.data.validation_fold)
    train = np.flatnonzero(fold != config.data.validation_fold)
    check_apart([features.subjects[i] for i in train], [features.subjects[i] for i in held_out])
    if config.data.fraction < 1:
        died = np.array([_died(features, i) for i in range(len(features))])
        train = few_shot(
            train,
            config.data.fraction,
            config.seed,
            deaths=died if {"mortality", "decompensation"} & config.tasks.keys() else None,
            phenotypes=features.phenotypes if "phenotyping" in config.tasks else None,
        )
    return subsample(train, config.data.max_episodes, config.seed), held_out


def _died(features: FeatureSet, i: int) -> float:
    """Whether the patient of a stay died, as far as its labels tell; else NaN.

    Mortality may be asked of long stays only; then hours before death tell it of the others.
    """
    asked = [LABEL_COLUMNS.index(task) for task in ("mortality", "decompensation")]
    labels = features.labels[features.hours(i)][:, asked]
    known = labels[~np.isnan(labels)]
    return float(known.max() > 0) if known.size else float("nan")


def parameter_groups(model: LLM4EHR, config: FinetuneConfig) -> list[dict[str, Any]]:
    """What learns: the heads, and with a rate of its own everything else."""
    heads: list[nn.Parameter] = []
    encoder: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (heads if name.startswith("heads.") else encoder).append(parameter)
    groups: list[dict[str, Any]] = [{"params": heads}]
    if encoder:
        rate = config.encoder_learning_rate or config.optim.learning_rate
        groups.append({"params": encoder, "lr": rate})
    return groups


def _epoch_batches(
    features: FeatureSet, train: NDArray[np.int64], config: FinetuneConfig, epoch: int
) -> list[NDArray[np.int64]]:
    made = batches(features.lengths[train], config.optim.batch_size, config.seed, epoch)
    return [train[index] for index in even(made, config.optim.batch_size)]


def _loader(
    features: FeatureSet, config: FinetuneConfig, model: LLM4EHR
) -> Callable[[NDArray[np.int64], int, slice], Batch]:
    """How a batch to train on is made: as the network reads events, some of them hidden."""
    stream, fused = (model.config.events == kind for kind in ("stream", "fused"))

    def load(index: NDArray[np.int64], step: int, part: slice) -> Batch:
        hide = np.random.default_rng([config.seed, step]).random(len(index))
        return features.batch(
            index[part],
            model.max_tokens if stream else 0,
            with_events=fused,
            hide_events=hide[part] < config.modality_dropout,
        )

    return load


def _validation_loader(
    features: FeatureSet, config: FinetuneConfig, model: LLM4EHR, on: torch.device
) -> Callable[[NDArray[np.int64]], Batch]:
    """The same for held-out stays: nothing is hidden."""
    shown = config.model_copy(update={"modality_dropout": 0.0})
    load = _loader(features, shown, model)
    return lambda index: load(index, 0, slice(0, len(index))).to(on)


def check_apart(train: Sequence[str], held_out: Sequence[str]) -> None:
    """Raise LeakageError if a patient is on both sides: epochs and calibration would be chosen on
    patients that were trained on."""
    if both := set(train) & set(held_out):
        raise LeakageError(f"{len(both)} patients are both trained on and held out")


def label_notes(sources: Sequence[Source], tasks: Sequence[Task]) -> dict[str, str]:
    """How each data set labels each task that it labels here: "data set: task" -> note."""
    notes: dict[str, str] = {}
    for source in sources:
        of = {_NOTE_TASK.get(key, key): note for key, note in source.store.info.label_notes.items()}
        taken = (task for task in tasks if source.labels_taken(task) and task in of)
        notes |= {f"{source.name}: {task}": of[task] for task in taken}
    return notes


def labelled(
    features: FeatureSet, index: NDArray[np.int64], tasks: Sequence[Task]
) -> dict[str, dict[str, int]]:
    """Number of the given stays with a label: task -> data set -> stays."""
    counts: dict[str, dict[str, int]] = {}
    for task in tasks:
        known = [
            not np.isnan(
                features.phenotypes[i]
                if task == "phenotyping"
                else features.labels[features.hours(i), LABEL_COLUMNS.index(task)]
            ).all()
            for i in index
        ]
        names = np.array([features.sources[i] for i in index])[known]
        counts[task] = dict(sorted(Counter(names.tolist()).items()))
    return counts
