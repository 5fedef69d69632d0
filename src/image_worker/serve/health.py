"""The container's health check: `python -m image_worker.serve.health`, exit status 0 or 1.

It asks the standalone server whether it answers. A queue worker has no server and is always well
here: RunPod watches it by its own pings.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

from image_worker.settings import Settings


def main() -> int:
    """0 if the standalone server answers, or if this is a queue worker."""
    settings = Settings.from_env()
    if not settings.standalone_mode:
        return 0
    everywhere = settings.api_host in ("0.0.0.0", "::")
    host = "127.0.0.1" if everywhere else settings.api_host
    try:
        with urllib.request.urlopen(f"http://{host}:{settings.api_port}/health", timeout=5):
            return 0
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"the standalone server does not answer: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
