"""A command of the training side whose first process dies once a step is in a checkpoint.

python killed_run.py STEP COMMAND...
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from training import loop
from training.cli import main
from training.processes import rank

save = loop.save_checkpoint


def save_and_die(
    folder: Path, module: nn.Module, optimiser: Optimizer, progress: dict[str, Any]
) -> None:
    """Without a chance to clear up, as when the machine goes down."""
    save(folder, module, optimiser, progress)
    if progress["step"] == int(sys.argv[1]) and rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    loop.save_checkpoint = save_and_die
    sys.exit(main(sys.argv[2:]))
