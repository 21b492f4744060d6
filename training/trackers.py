"""Where a run is logged besides its own folder: TensorBoard, MLflow, Weights & Biases.

They are driven by Accelerate. What they get is the configuration and the numbers of every step,
nothing that belongs to a stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator

from training.config import Tracker
from training.run_folder import RunFolder

PROJECT = "llm4ehr"


def check_trackers(trackers: Sequence[Tracker]) -> None:
    """Raise ValueError if a tracker has no package or no place, before anything is computed.

    Accelerate leaves out silently what is not installed.
    """
    for name in trackers:
        if find_spec(name) is None:
            extra = "train" if name == "tensorboard" else "trackers"
            raise ValueError(
                f"trackers: {name} is not installed: pip install -e '.[{extra}]', or leave it out"
            )
    if "mlflow" in trackers and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "trackers: mlflow needs the address of its server in the environment variable "
            "MLFLOW_TRACKING_URI"
        )


@contextmanager
def tracking(accelerator: Accelerator, run: RunFolder, step: int) -> Iterator[None]:
    """Log to the trackers of the accelerator inside, and close them whatever happens.

    A run that is resumed at `step` goes on in its TensorBoard log; elsewhere it begins a second
    entry of the same name, which goes on counting from that step.
    """
    name = run.path.resolve().name
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step},
        "mlflow": {"run_name": name},
        "wandb": {
            "name": name,
            "dir": os.environ.get("WANDB_DIR", str(run.path)),
            # What a run prints may name a stay, and its code is nobody's business.
            "settings": {"console": "off", "disable_code": True, "disable_git": True},
        },
    }
    try:
        accelerator.init_trackers(PROJECT, init_kwargs=options)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":  # its table of parameters would be a log of its own
                text = json.dumps(run.config, indent=2)
                tracker.log({"configuration": f"```\n{text}\n```"}, step=step)
            else:
                tracker.store_init_configuration(flat(run.config))
        yield
    finally:
        # `end_training` would take the processes apart, and a sharded model is still needed.
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A configuration without nesting: "optim.epochs" -> 5, "data.sources.0.splits.1" -> "b"."""
    if isinstance(config, dict):
        items = list(config.items())
    elif isinstance(config, list):
        items = list(enumerate(config))
    else:
        return {prefix: config}
    values: dict[str, Any] = {}
    for key, value in items:
        values |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return values
