"""Self-supervised pre-training: align hours with events in time, and predict the next hour."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm4ehr.backbone import Backbone, load_backbone, spec_from_config
from llm4ehr.bundle import Network, load_network, save_network
from llm4ehr.episode import EVENT_CHANNELS, N_VARIABLES, Preprocessing
from llm4ehr.model import LLM4EHR, ModelConfig, patch_counts
from llm4ehr.vocabulary import Vocabulary
from training.config import ModelOptions, PretrainConfig
from training.dataset import (
    Batch,
    FeatureSet,
    batches,
    build_features,
    fit_preprocessing,
    subsample,
)
from training.loop import RunFolder, Trainer, device
from training.objectives import ObjectiveConfig, contrastive_terms, reconstruction_loss
from training.sources import open_sources, origins


def build_model(
    options: ModelOptions, preprocessing: Preprocessing, vocabulary: Vocabulary
) -> LLM4EHR:
    """A fresh model; clinical tokens start as the mean of their descriptor's sub-token rows."""
    backbone = options.backbone
    loaded = None
    if backbone.source is not None:
        loaded = load_backbone(
            backbone.source, attention_mode=backbone.attention_mode, frozen=backbone.frozen
        )
        spec = loaded.backbone.spec
    else:
        assert backbone.config is not None
        spec = spec_from_config(
            backbone.config, attention_mode=backbone.attention_mode, frozen=False
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


def pretraining_terms(
    model: LLM4EHR, batch: Batch, config: ObjectiveConfig, hide_events: Tensor
) -> dict[str, Tensor]:
    """The three terms and their weighted sum "loss" for one batch.

    `hide_events` [B] is true where the series pass must do without the fused events.
    """
    events = batch.events * ~hide_events[:, None, None]
    v = model.encode_hours(batch.series, events, batch.hour_mask)
    terms: dict[str, Tensor] = {}
    if config.lambda_nce or config.lambda_omega:
        z = model.encode_events(batch.token_ids, batch.token_mask)
        pooling_mask = (
            batch.hour_mask if config.pad_hours == "mask" else torch.ones_like(batch.hour_mask)
        )
        v_patches = model.pool_hours(v, pooling_mask)
        n_patches = v_patches.shape[1]
        z_patches = model.pool_events(z, batch.token_hours, batch.token_mask, n_patches)
        terms["nce"], terms["omega"] = contrastive_terms(
            v_patches, z_patches, usable_patches(model, batch, n_patches), config
        )
    x = batch.series[..., : model.config.n_variables]
    terms["recon"] = reconstruction_loss(
        x, model.reconstruct(v).to(x.dtype), batch.hour_mask, config
    )
    weights = {
        "nce": config.lambda_nce,
        "omega": config.lambda_omega,
        "recon": config.lambda_recon,
    }
    loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"loss": loss} | terms


def usable_patches(model: LLM4EHR, batch: Batch, n_patches: int) -> Tensor:
    """[B, P] true where a patch has an event token and an hour inside the stay."""
    hours = model.config.patch_hours
    patch = torch.arange(batch.hour_mask.shape[1], device=batch.hour_mask.device) // hours
    with_hours = patch_counts(patch.expand(batch.hour_mask.shape), batch.hour_mask, n_patches) > 0
    with_tokens = patch_counts(batch.token_hours // hours, batch.token_mask, n_patches) > 0
    return with_hours & with_tokens


def pretrain(config: PretrainConfig) -> Network:
    """Run, resume or, if it is finished, load a pre-training; the network is in the run folder."""
    sources = open_sources(config.data.sources, training=True)
    run = RunFolder(config.run, "pretrain", config)
    if run.finished:
        return load_network(config.run)
    torch.manual_seed(config.seed)
    preprocessing, vocabulary = fit_preprocessing(
        sources, config.preprocessing, config.data.max_codes
    )
    features = build_features(sources, preprocessing, vocabulary, config.data.cache)
    model = build_model(config.model, preprocessing, vocabulary).to(device())
    network = Network(model=model, preprocessing=preprocessing, vocabulary=vocabulary)

    chosen = training_episodes(features, config)
    max_tokens = model.max_tokens

    def epoch_batches(epoch: int) -> list[NDArray[np.int64]]:
        made = batches(features.lengths[chosen], config.optim.batch_size, config.seed, epoch)
        return [chosen[index] for index in made]

    def step(index: NDArray[np.int64]) -> dict[str, Tensor]:
        batch = features.batch(index, max_tokens).to(device())
        hide = torch.rand(len(index)) < config.modality_dropout
        return pretraining_terms(model, batch, config.objective, hide.to(device()))

    parameters = [p for p in model.parameters() if p.requires_grad]
    trainer = Trainer(model, [{"params": parameters}], config.optim, run, epoch_batches)
    trainer.fit(step)
    save_network(config.run, network)
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
    return network


def training_episodes(features: FeatureSet, config: PretrainConfig) -> NDArray[np.int64]:
    """Episodes outside the validation fold, at most `max_episodes` of them."""
    keep = np.arange(len(features))
    if config.data.validation_fold is not None:
        keep = keep[features.fold(config.data.n_folds) != config.data.validation_fold]
    return subsample(keep, config.data.max_episodes, config.seed)
