"""Damaged bundles: refused with a message that names the file, whatever was done to it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm4ehr.bundle import Bundle, BundleError, Network, load_bundle
from service.models.bundles import Bundles
from service.settings import Settings
from tests.fuzz.hostile import damaged, json_texts
from tests.fuzz.house import attempt, examples, tried
from tests.online import save_tiny

FILES = [
    *["manifest.json", "config.json", "model.safetensors", "preprocessing.json"],
    *["vocabulary.json", "labels.json", "calibration.json", "metrics.json", "MODEL_CARD.md"],
]


class Shelf:
    """A sound bundle, and a copy of it to damage."""

    def __init__(self, folder: Path, make: Callable[..., Network]) -> None:
        save_tiny(make, folder / "sound")
        shutil.copytree(folder / "sound", folder / "copy")
        self.repository = folder / "copy"
        self.sound = {file: (folder / "sound" / "tiny" / "1" / file).read_bytes() for file in FILES}

    def load(self, file: str, content: bytes, *, signed: bool) -> Bundle | BundleError:
        """What comes of a bundle with this file; `signed`: with a manifest that agrees with it."""
        path = self.repository / "tiny" / "1" / file
        manifest = path.with_name("manifest.json")
        try:
            path.write_bytes(content)
            if signed and file != "manifest.json":
                body = json.loads(self.sound["manifest.json"])
                body["files"][file] = hashlib.sha256(content).hexdigest()
                manifest.write_text(json.dumps(body))
            return attempt(BundleError, lambda: load_bundle(self.repository, "tiny", 1))
        finally:
            path.write_bytes(self.sound[file])
            manifest.write_bytes(self.sound["manifest.json"])


@pytest.fixture(scope="module")
def shelf(tiny_network: Callable[..., Network], tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"), tiny_network)


def test_a_file_that_was_changed_is_refused(shelf: Shelf) -> None:
    @examples(60)
    @given(st.sampled_from(FILES), st.data())
    def check(file: str, data: st.DataObject) -> None:
        tried("bundles")
        content = data.draw(damaged(shelf.sound[file]))
        found = shelf.load(file, content, signed=False)
        if file != "manifest.json" and content != shelf.sound[file]:
            assert isinstance(found, BundleError)
            assert file in str(found)

    check()


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a JSON value, the value itself included."""
    inner = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    return [path, *(p for key, item in inner for p in _paths(item, (*path, key)))]


# No number is so large that a network of that size would be made before it is refused.
_small = st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=5)
_values = st.one_of(
    _small.map(json.dumps), st.lists(_small, max_size=3).map(json.dumps), st.just('{"a": 1}')
)


def _put(body: Any, path: tuple[str | int, ...], text: str) -> str:
    """The body as JSON with a text in the place of what stands at a path."""
    if not path:
        return text
    hole = "\x01hole"
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = hole
    return json.dumps(body).replace(json.dumps(hole), text)


def test_contents_that_make_no_sense_are_refused_although_the_hashes_agree(shelf: Shelf) -> None:
    @examples(150)
    @given(st.sampled_from([f for f in FILES if f.endswith(".json")]), st.data())
    def check(file: str, data: st.DataObject) -> None:
        tried("bundles")
        body = json.loads(shelf.sound[file])
        path = data.draw(st.sampled_from(_paths(body)))
        deep = json_texts if file != "config.json" or not path else _values
        content = _put(body, path, data.draw(_values | deep)).encode("utf-8", "replace")
        shelf.load(file, content, signed=True)

    check()


def test_damaged_weights_are_refused_although_the_hashes_agree(shelf: Shelf) -> None:
    weights = shelf.sound["model.safetensors"]
    length = int.from_bytes(weights[:8], "little")

    @examples(80)
    @given(damaged(weights[8 : 8 + length]), st.integers(0, 2**64 - 1) | st.none())
    def check(header: bytes, claimed: int | None) -> None:
        tried("bundles")
        size = (len(header) if claimed is None else claimed).to_bytes(8, "little")
        shelf.load("model.safetensors", size + header + weights[8 + length :], signed=True)

    check()


def test_a_damaged_manifest_does_not_stop_the_list_of_versions(shelf: Shelf) -> None:
    path = shelf.repository / "tiny" / "1" / "manifest.json"

    @examples(100)
    @given(json_texts.map(str.encode) | damaged(shelf.sound["manifest.json"]))
    def check(content: bytes) -> None:
        tried("bundles")
        path.write_bytes(content)
        bundles = Bundles.__new__(Bundles)
        bundles._settings = Settings(model_repository=shelf.repository, bundle="tiny/1")
        assert len(bundles.on_disk()) <= 1

    try:
        check()
    finally:
        path.write_bytes(shelf.sound["manifest.json"])
