"""A serverless GPU worker that edits images with the Qwen-Image family.

Start reading at `worker.py` (the path of a job) and `model/build.py` (the path of a model).
"""

__version__ = "0.1.0"
