"""Heads on a pre-trained encoder: all tasks jointly, one encoder, hour by hour."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.model import Task
from training.calibrate import fit_calibration
from training.config import FinetuneConfig
from training.dataset import LABEL_COLUMNS, FeatureSet, batches, build_features, subsample
from training.heads import Targets, predict, selection_score, task_losses
from training.loop import RunFolder, Trainer, device
from training.sources import LeakageError, Source, is_another, open_sources, origins
from training.tuning import with_heads

_NOTE_TASK = {"length_of_stay": "remaining_los"}  # what stores may call a task in label_notes


def finetune(config: FinetuneConfig) -> Network:
    """Run, resume or, if it is finished, load a fine-tuning.

    The best epoch on the validation fold is kept. Raises ValueError where a store has the name of
    other data that the encoder was pre-trained on.
    """
    sources = open_sources(config.data.sources, training=True)
    pretrained = load_network(config.pretrained)
    run = RunFolder(config.run, "finetune", config)
    if run.finished:
        return load_network(config.run)
    pretraining = {
        "config": json.loads((config.pretrained / "pretrain.json").read_text()),
        "result": json.loads((config.pretrained / "result.json").read_text()),
    }
    for source in sources:
        if is_another(source.store.info, pretraining["result"]["stores"]):
            raise ValueError(
                f"{source.store.path}: called {source.name!r} like another store, which the "
                "encoder was pre-trained on; name it with `prepare --name`"
            )
    torch.manual_seed(config.seed)
    network = with_heads(pretrained, config)
    model = network.model.to(device())
    features = build_features(
        sources, network.preprocessing, network.vocabulary, config.data.cache, config.label_options
    )
    fold = features.fold(config.data.n_folds)
    train = subsample(
        np.flatnonzero(fold != config.data.validation_fold), config.data.max_episodes, config.seed
    )
    held_out = np.flatnonzero(fold == config.data.validation_fold)
    check_apart([features.subjects[i] for i in train], [features.subjects[i] for i in held_out])
    best_file = config.run / "best.safetensors"

    def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
        made = batches(features.lengths[train], config.optim.batch_size, config.seed, epoch)
        return [train[index] for index in made]

    def step(index: NDArray[np.int64]) -> dict[str, Tensor]:
        if config.tuning.strategy == "linear":
            model.series_encoder.eval()  # batch norm would move its running statistics
        batch = features.batch(index, max_hours=config.max_hours).to(device())
        hide = (torch.rand(len(index)) < config.modality_dropout).to(device())
        v = model.encode_hours(batch.series, batch.events * ~hide[:, None, None], batch.hour_mask)
        losses = task_losses(model.predict(v[batch.hour_mask]), Targets.of(batch))
        total = torch.stack([config.tasks[t] * losses[t] for t in config.tasks]).sum()
        return {"loss": total} | losses

    def validate() -> tuple[dict[Task, Tensor], Targets]:
        return predict(model, features, held_out, config.max_hours, config.optim.precision)

    def after_epoch(epoch: int) -> bool:
        score = selection_score(config.select_by, *validate(), config.tasks)
        history: list[float] = trainer.extra.setdefault("scores", [])
        if not history or score > max(history):
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, best_file)
        history.append(score)
        return epoch - int(np.argmax(history)) < config.patience

    heads: list[nn.Parameter] = []
    encoder: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (heads if name.startswith("heads.") else encoder).append(parameter)
    groups: list[dict[str, Any]] = [{"params": heads}]
    if encoder:
        rate = config.encoder_learning_rate or config.optim.learning_rate
        groups.append({"params": encoder, "lr": rate})
    trainer = Trainer(model, groups, config.optim, run, epoch_batches)
    trainer.fit(step, after_epoch if len(held_out) else None)
    if len(held_out):
        model.load_state_dict(load_file(best_file))
    save_network(config.run, network)
    (config.run / "pretrained.json").write_text(json.dumps(pretraining, indent=2))
    (config.run / "subjects.json").write_text(
        json.dumps(sorted({features.subjects[i] for i in (*train, *held_out)}))
    )
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
            "platt": {},
            "thresholds": {},
            **(fit_calibration(*validate()) if len(held_out) else {}),
        }
    )
    return network


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
