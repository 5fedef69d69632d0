"""The worker's entry point, for RunPod and for the command line (`python handler.py --help`)."""

import sys

from image_worker.serve.main import main

if __name__ == "__main__":
    sys.exit(main())
