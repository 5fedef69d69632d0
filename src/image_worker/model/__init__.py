"""From a name in the catalogue to a model that is ready to edit: `build.py` is the path."""
