"""Self-supervised pre-training: align hours with events in time, and predict the next hour."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from llm4ehr.backbone import Backbone, spec_from_config
from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.episode import EVENT_CHANNELS, N_VARIABLES, Preprocessing
from llm4ehr.model import LLM4EHR, ModelConfig
from llm4ehr.vocabulary import Vocabulary
from training.backbones import full_config, load_source
from training.config import ModelOptions, PretrainConfig
from training.contrast import PatchEncoder, PretrainStep
from training.dataset import (
    Batch,
    FeatureSet,
    batches,
    build_features,
    fit_preprocessing,
    subsample,
)
from training.event_cache import EventPatches, event_pass_is_frozen, write_event_patches
from training.loop import Trainer, autocast, device
from training.processes import even, join
from training.run_folder import RunFolder
from training.sources import open_sources, origins
from training.trackers import check_trackers

EVENT_PATCHES = "event_patches.npy"


def build_model(
    options: ModelOptions, preprocessing: Preprocessing, vocabulary: Vocabulary
) -> LLM4EHR:
    """A fresh model; clinical tokens start as the mean of their descriptor's sub-token rows."""
    backbone = options.backbone
    loaded = None
    if backbone.source is not None:
        loaded = load_source(
            backbone.source, attention_mode=backbone.attention_mode, frozen=backbone.frozen
        )
        spec = loaded.backbone.spec
    else:
        assert backbone.config is not None
        spec = spec_from_config(
            full_config(backbone.config), attention_mode=backbone.attention_mode, frozen=False
        )
    model = LLM4EHR(
        ModelConfig(
            backbone=spec,
            n_series=preprocessing.n_series,
            n_event_channels=len(vocabulary) * EVENT_CHANNELS,
            n_tokens=vocabulary.n_tokens,
            n_variables=N_VARIABLES,
            events=options.events,
            event_window=options.event_window,
            ts_norm=options.ts_norm,
            patch_hours=options.patch_hours,
            patch_head=options.patch_head,
            begin_token=loaded is not None and len(loaded.begin) > 0,
        )
    )
    if loaded is not None:
        model.backbone.load_state_dict(loaded.backbone.state_dict())
        if backbone.frozen:
            round_to_bfloat16(model.backbone)
        model.tokens.weight.data.copy_(loaded.embed_texts(vocabulary.descriptors()))
        model.begin.copy_(loaded.begin)
    model.tokens.weight.requires_grad_(options.train_new_tokens)
    return model


def round_to_bfloat16(backbone: Backbone) -> None:
    """Round frozen weights once, before anything is trained on top, so that a bundle can store them
    in half the space without changing a result."""
    for weight in backbone.parameters():
        weight.data = weight.data.bfloat16().float()


def pretrain(config: PretrainConfig) -> Network:
    """Run, resume or, if it is finished, load a pre-training; the network is in the run folder."""
    check_trackers(config.trackers)
    processes = join()
    sources = open_sources(config.data.sources, training=True)
    run = RunFolder(config.run, "pretrain", config)
    if run.finished:
        return load_network(config.run)
    torch.manual_seed(config.seed)
    with processes.main_process_first():
        preprocessing, vocabulary = fit_preprocessing(
            sources, config.preprocessing, config.data.max_codes
        )
        features = build_features(sources, preprocessing, vocabulary, config.data.cache)
    model = build_model(config.model, preprocessing, vocabulary).to(device())
    if config.optim.compile:
        model.backbone.model.compile(dynamic=True)
    chosen = training_episodes(features, config)

    def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
        made = batches(features.lengths[chosen], config.optim.batch_size, config.seed, epoch)
        return [chosen[index] for index in even(made, config.optim.batch_size)]

    encoder = PatchEncoder(model, config.objective)
    load = _loader(features, config, model, run)
    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer(
        encoder, [{"params": parameters}], config.optim, run, epoch_batches, load, config.trackers
    )
    step = PretrainStep(trainer.module, encoder.queue, config.objective, config.chunk_episodes)
    trainer.fit(step)

    network = Network(
        model=trainer.whole(model, lambda: LLM4EHR(model.config)),
        preprocessing=preprocessing,
        vocabulary=vocabulary,
    )
    if processes.is_main_process:
        save_network(config.run, network)
        (run.path / EVENT_PATCHES).unlink(missing_ok=True)
        run.finish(
            {
                "episodes": len(chosen),
                "hours": int(features.lengths[chosen].sum()),
                "steps": trainer.step,
                "preprocessing_digest": network.preprocessing_digest,
                "vocabulary_digest": network.vocabulary.digest,
                **origins(sources),
            }
        )
    processes.wait_for_everyone()  # what comes next may read the run
    return network


def _loader(
    features: FeatureSet, config: PretrainConfig, model: LLM4EHR, run: RunFolder
) -> Callable[[NDArray[np.int64], int, slice], Batch]:
    """How a batch is made: with tokens, event channels or ready event patches, as the run needs."""
    contrastive = bool(config.objective.lambda_nce or config.objective.lambda_omega)
    max_tokens = model.max_tokens if contrastive else 0
    with_events = config.model.events == "fused"

    def make(index: NDArray[np.int64], hide: NDArray[np.bool_] | None = None) -> Batch:
        return features.batch(index, max_tokens, with_events=with_events, hide_events=hide)

    cache = None
    if contrastive and event_pass_is_frozen(model):
        path = run.path / EVENT_PATCHES
        chosen = training_episodes(features, config)
        with join().main_process_first(), autocast(config.optim.precision, device()):
            write_event_patches(
                path, model, features, chosen, lambda index: make(index).to(device())
            )
        cache = EventPatches(path, features, config.model.patch_hours)

    def load(index: NDArray[np.int64], step: int, part: slice) -> Batch:
        hide = np.random.default_rng([config.seed, step]).random(len(index))
        batch = make(index[part], hide[part] < config.modality_dropout)
        return batch if cache is None else cache.add_to(batch)

    return load


def training_episodes(features: FeatureSet, config: PretrainConfig) -> NDArray[np.int64]:
    """Episodes outside the validation fold, at most `max_episodes` of them."""
    keep = np.arange(len(features))
    if config.data.validation_fold is not None:
        keep = keep[features.fold(config.data.n_folds) != config.data.validation_fold]
    return subsample(keep, config.data.max_episodes, config.seed)
