"""What `python -m image_worker` does: edit, doctor, compare and clean. `prepare` is in serve/."""
