"""`python -m image_worker prepare`: has weights ready for later starts, and serves nothing."""

from __future__ import annotations

import gc
import logging
import sys

from image_worker.errors import WorkerError
from image_worker.serve.main import set_up_logging
from image_worker.serve.process import prepare_process
from image_worker.settings import Settings, environment

log = logging.getLogger(__name__)


def prepare(*, whole: bool = False, drop: bool = False) -> int:
    """A start as the environment has it, up to its first edit. Returns the exit status.

    Weights are downloaded and written to MODEL_DIR/prepared unless they are there already. whole:
    so that they need no checkpoint; drop: that is then removed from MODEL_DIR.
    """
    prepare_process()
    try:
        settings = Settings.from_env()
        wanted = "whole" if whole or settings.keep_prepared == "whole" else "1"
        settings = Settings.from_env(environment({"KEEP_PREPARED": wanted}))
        set_up_logging(settings)
        from image_worker.preparing import prepare

        outcome = prepare(settings, drop=drop)
    except WorkerError as error:
        sys.stderr.write(f"error: {error.type}: {error}\n")
        return 2
    finally:
        gc.enable()
    if not outcome.prepared:
        sys.stderr.write("error: the prepared weights could not be kept; the log says why\n")
        return 2
    sys.stdout.write(f"prepared in {settings.model_dir / 'prepared'}\n")
    if drop:
        sys.stdout.write(f"the checkpoint is removed: {outcome.freed / 1e9:.2f} GB are free\n")
    return 0
