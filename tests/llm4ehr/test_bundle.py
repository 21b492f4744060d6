"""Bundles: what is saved comes back bit-equal, and everything that was tampered with is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm4ehr.bundle import (
    BundleError,
    Network,
    bundle_versions,
    load_bundle,
    load_network,
    save_bundle,
    save_network,
)
from llm4ehr.calibration import Interval, OutputMap, default_calibration
from llm4ehr.episode import Episode
from llm4ehr.offline import score_episodes
from training.pretrain import round_to_bfloat16

Make = Callable[..., Network]
TASKS = ["decompensation", "mortality", "remaining_los"]
FILES = (
    "config.json", "model.safetensors", "preprocessing.json", "vocabulary.json", "labels.json",
    "calibration.json", "metrics.json", "MODEL_CARD.md",
)  # fmt: skip


def save(repository: Path, network: Network, version: int = 1, **changes: Any) -> Path:
    body: dict[str, Any] = {
        "calibration": default_calibration(list(network.model.config.heads)),
        "labels": {"made": "by hand"},
        "metrics": {"auroc": 0.5},
        "card": "# A card\n\nÜber alles.\n",
    }
    return save_bundle(repository, "tiny", version, network, **body | changes)


@pytest.fixture(scope="module")
def saved(tiny_network: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bundle; tests that damage one work on a copy."""
    repository = tmp_path_factory.mktemp("repository")
    save(repository, tiny_network())
    return repository


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "repository")
    return tmp_path / "repository"


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def error_of(repository: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(repository, "tiny", 1)
    return str(caught.value)


def test_a_bundle_comes_back_bit_equal(
    family: str, tiny_network: Make, tmp_path: Path, random_episode: Callable[..., Episode]
) -> None:
    network = tiny_network(family, begin_token=True)
    calibration = default_calibration(TASKS) | {
        "mortality": OutputMap(kind="isotonic", a=0.7, b_hour=-1, knots=((0.0, 0.1), (1.0, 0.7))),
        "remaining_los": OutputMap(
            kind="log_days",
            interval=Interval(coverage=0.5, first_hours=(0,), half_widths=(0.3,), stays=(12,)),
        ),
    }
    folder = save(tmp_path, network, calibration=calibration)
    bundle = load_bundle(tmp_path, "tiny", 1)
    assert folder == tmp_path / "tiny" / "1"
    before, after = network.model.state_dict(), bundle.network.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not bundle.network.model.training
    episodes = [random_episode(seed, 30) for seed in (1, 2)]
    for a, b in zip(
        score_episodes(network, episodes), score_episodes(bundle.network, episodes), strict=True
    ):
        assert all((a.raw[task] == b.raw[task]).all() for task in TASKS)
    assert (bundle.network.preprocessing, bundle.calibration) == (
        network.preprocessing,
        calibration,
    )
    assert bundle.network.vocabulary.entries == network.vocabulary.entries
    assert bundle.network.preprocessing_digest == network.preprocessing_digest
    assert (bundle.labels, bundle.metrics) == ({"made": "by hand"}, {"auroc": 0.5})
    assert bundle.card == "# A card\n\nÜber alles.\n"


def test_batch_norm_statistics_travel_too(tiny_network: Make, tmp_path: Path) -> None:
    network = tiny_network(ts_norm="batch")
    network.model.series_encoder.norm.running_mean.fill_(0.25)
    network.model.series_encoder.norm.num_batches_tracked.fill_(7)
    save_network(tmp_path, network)
    norm = load_network(tmp_path).model.series_encoder.norm
    assert (norm.running_mean == 0.25).all()
    assert norm.num_batches_tracked.item() == 7


def test_phenotypes_are_named_by_the_labels(tiny_network: Make, tmp_path: Path) -> None:
    network = tiny_network(heads={"phenotyping": 2})
    save(tmp_path, network, 1, labels={"phenotypes": ["sepsis", "shock"]})
    assert load_bundle(tmp_path, "tiny", 1).phenotypes == ("sepsis", "shock")
    save(tmp_path, network, 2, labels={"phenotypes": ["sepsis"]})
    with pytest.raises(BundleError, match=r"labels\.json: phenotype names do not match"):
        load_bundle(tmp_path, "tiny", 2)


def test_every_head_needs_a_calibration(tiny_network: Make, tmp_path: Path) -> None:
    save(tmp_path, tiny_network(), calibration=default_calibration(["mortality"]))
    assert "calibration.json: tasks differ" in error_of(tmp_path)


def test_a_bundle_says_whether_it_may_be_streamed(tiny_network: Make) -> None:
    assert tiny_network("bert").causal
    assert not tiny_network("bert", attention_mode="native").causal
    assert tiny_network("gpt2", attention_mode="native").causal


# Damage.


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_is_named(copy: Path, file: str) -> None:
    path = copy / "tiny" / "1" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = error_of(copy)
    assert str(path) in message
    assert "SHA-256" in message


@pytest.mark.parametrize("file", [*FILES, "manifest.json"])
def test_a_missing_file_is_named(copy: Path, file: str) -> None:
    path = copy / "tiny" / "1" / file
    path.unlink()
    assert error_of(copy) == f"{path}: missing"


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_schema_version_is_named(copy: Path, version: Any) -> None:
    rewrite(copy / "tiny" / "1" / "manifest.json", schema_version=version)
    message = error_of(copy)
    assert "manifest.json" in message
    assert f"schema version {version!r} is unknown" in message


@pytest.mark.parametrize("change", [{"name": "other"}, {"version": 2}])
def test_a_bundle_under_another_name_is_refused(copy: Path, change: dict[str, Any]) -> None:
    rewrite(copy / "tiny" / "1" / "manifest.json", **change)
    assert "another name or version" in error_of(copy)


def test_a_moved_bundle_is_refused(copy: Path) -> None:
    (copy / "tiny" / "1").rename(copy / "tiny" / "2")
    with pytest.raises(BundleError, match="another name or version"):
        load_bundle(copy, "tiny", 2)
    with pytest.raises(BundleError, match=r"manifest\.json: missing"):
        load_bundle(copy, "tiny", 1)


@pytest.mark.parametrize("file", FILES)
def test_a_file_without_a_hash_is_named(copy: Path, file: str) -> None:
    manifest = copy / "tiny" / "1" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    del files[file]
    rewrite(manifest, files=files)
    assert f"no hash for {file}" in error_of(copy)


def test_a_hash_without_a_known_file_is_named(copy: Path) -> None:
    manifest = copy / "tiny" / "1" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    rewrite(manifest, files=files | {"extra.bin": "0" * 64})
    assert "extra.bin" in error_of(copy)


def test_a_manifest_that_is_no_json_object_is_named(copy: Path) -> None:
    for text in ("{", "[]", "[1]", "7", '"x"'):
        (copy / "tiny" / "1" / "manifest.json").write_text(text)
        assert "manifest.json" in error_of(copy)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.json", {"surprise": 1}, "surprise"),
        ("config.json", {"n_series": 7}, "size mismatch"),
        ("preprocessing.json", {"version": 2}, "version 2"),
        ("preprocessing.json", {"std": [0.0] * 11}, "positive"),
        ("vocabulary.json", {"version": 2}, "version 2"),
        ("vocabulary.json", {"codes": [{}]}, "deciles"),
        ("calibration.json", {"mortality": {"slope": 1}}, "slope"),
        ("calibration.json", {"mortality": {"kind": "platt", "a": float("nan")}}, "finite"),
        ("calibration.json", {"mortality": {"kind": "platt", "knots": [[0, 1, 2]]}}, "unpack"),
        (
            "calibration.json",
            {"mortality": {"kind": "isotonic", "knots": [[0, 0.5], [1, 0.4]]}},
            "never fall",
        ),
        (
            "calibration.json",
            {"remaining_los": {"kind": "days", "interval": {"coverage": 0.9}}},
            "first_hours",
        ),
        (
            "calibration.json",
            {
                "remaining_los": {
                    "kind": "days",
                    "interval": {
                        "coverage": 2,
                        "first_hours": [0],
                        "half_widths": [1.0],
                        "stays": [99],
                    },
                }
            },
            "coverage 2",
        ),
    ],
)
def test_contents_that_do_not_fit_are_named(
    copy: Path, file: str, change: dict[str, Any], reason: str
) -> None:
    """Sound hashes, but made by other code."""
    rewrite(copy / "tiny" / "1" / file, **change)
    rehash(copy, file)
    message = error_of(copy)
    assert reason in message
    assert ".json" in message or "model.safetensors" in message
    if file != "calibration.json":
        with pytest.raises(BundleError, match=re.escape(reason)):
            load_network(copy / "tiny" / "1")


def rehash(repository: Path, file: str) -> None:
    folder = repository / "tiny" / "1"
    manifest = folder / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    files[file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    rewrite(manifest, files=files)


def test_weights_that_are_no_safetensors_are_named(copy: Path) -> None:
    (copy / "tiny" / "1" / "model.safetensors").write_bytes(b"not weights")
    rehash(copy, "model.safetensors")
    assert "model.safetensors" in error_of(copy)


def test_the_digest_is_that_of_the_manifest(copy: Path) -> None:
    before = load_bundle(copy, "tiny", 1).digest
    assert load_bundle(copy, "tiny", 1).digest == before
    (copy / "tiny" / "1" / "MODEL_CARD.md").write_text("# Another card\n")
    rehash(copy, "MODEL_CARD.md")
    assert load_bundle(copy, "tiny", 1).digest != before


# Saving.


def test_a_version_is_never_overwritten(copy: Path, tiny_network: Make) -> None:
    before = load_bundle(copy, "tiny", 1).digest
    with pytest.raises(BundleError, match="immutable"):
        save(copy, tiny_network(seed=1))
    assert load_bundle(copy, "tiny", 1).digest == before
    save(copy, tiny_network(seed=1), 12)
    save(copy, tiny_network(seed=1), 2)
    assert bundle_versions(copy, "tiny") == [1, 2, 12]
    assert bundle_versions(copy, "other") == []


def test_a_failed_save_leaves_nothing_behind(tiny_network: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, tiny_network(), metrics={"auroc": float("nan")})
    assert list((tmp_path / "tiny").iterdir()) == []
    assert bundle_versions(tmp_path, "tiny") == []


def test_backbone_weights_that_bfloat16_holds_are_stored_in_it_without_loss(
    tiny_network: Make, tmp_path: Path
) -> None:
    network = tiny_network()
    full = save(tmp_path, network, 1)
    round_to_bfloat16(network.model.backbone)
    half = save(tmp_path, network, 2)
    before = network.model.state_dict()
    after = load_bundle(tmp_path, "tiny", 2).network.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in after.values()} == {torch.float32}
    sizes = [(f / "model.safetensors").stat().st_size for f in (full, half)]
    assert sizes[1] < 0.75 * sizes[0]
