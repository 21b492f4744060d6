"""What the parsers of the commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from llm4ehr.bundle import Bundle
from service.models.bundles import load_allowed
from service.models.version import Name
from service.settings import Settings

# In quotes: the class takes no parameters when the program runs.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command is registered."""


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Arguments that name a bundle; without them it is the service's."""
    parser.add_argument("--bundle", help="NAME/VERSION; default: the service's")
    parser.add_argument("--repository", type=Path, help="folder of bundles")


def bundle_of(a: argparse.Namespace) -> Bundle:
    """The bundle that the arguments name. Raises BundleError; ValueError for what is no name."""
    return load_allowed(Settings(), name_of(a), a.repository)


def name_of(a: argparse.Namespace) -> Name:
    """What the arguments call the bundle. Raises ValueError."""
    name, _, version = (a.bundle or Settings().bundle).partition("/")
    if not version.isdigit():
        raise ValueError("--bundle is NAME/VERSION")
    return Name(name, int(version))
