"""`python -m image_worker prepare`: what is done beside serving, for which there is handler.py."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    """Runs a command. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m image_worker",
        description="Settings come from environment variables, as for handler.py.",
    )
    commands = parser.add_subparsers(required=True)
    commands.add_parser("prepare", help="download the model and write its weights as they serve")
    parser.parse_args()
    from image_worker.serve.prepare import prepare

    return prepare()


if __name__ == "__main__":
    sys.exit(main())
