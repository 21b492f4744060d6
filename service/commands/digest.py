"""digest: what identifies a bundle, for `LLM4EHR_BUNDLE_DIGESTS`."""

from __future__ import annotations

import argparse
import json

from llm4ehr.bundle import load_bundle
from service.commands.parsers import Commands, add_bundle, name_of
from service.settings import Settings


def add(commands: Commands) -> None:
    """`digest`."""
    digest = commands.add_parser("digest", help="verify a bundle and print its digest")
    add_bundle(digest)
    digest.set_defaults(run_command=_digest)


def _digest(a: argparse.Namespace) -> None:
    """Whatever is pinned: this is how one comes by what to pin."""
    name = name_of(a)
    bundle = load_bundle(a.repository or Settings().model_repository, *name)
    print(json.dumps({str(name): bundle.digest}))
