"""Trains the miniature on one GPU: `python -m tools.miniature.train RUN_FOLDER`."""
