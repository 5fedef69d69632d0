"""What `python -m image_worker` does: edit, doctor and clean. `prepare` is in serve/."""
