"""`python -m image_worker prepare`: has weights ready for later starts, and serves nothing."""

from __future__ import annotations

import logging
import sys

from image_worker.errors import WorkerError
from image_worker.serve.main import set_up_logging
from image_worker.settings import Settings

log = logging.getLogger(__name__)


def prepare() -> int:
    """A start as the environment has it, up to its first edit. Returns the exit status.

    Weights are downloaded and written to MODEL_DIR/prepared unless they are there already.
    """
    try:
        settings = Settings.from_env().model_copy(update={"keep_prepared": "1"})
        set_up_logging(settings)
        from image_worker.worker import Worker

        worker = Worker.from_settings(settings)
    except WorkerError as error:
        sys.stderr.write(f"error: {error.type}: {error}\n")
        return 2
    worker.close()
    if not worker.model.cold_start.prepared:
        sys.stderr.write("error: the prepared weights could not be kept; the log says why\n")
        return 2
    sys.stdout.write(f"prepared in {settings.model_dir / 'prepared'}\n")
    return 0
