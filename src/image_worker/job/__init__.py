"""A job's outside: request, pictures in, reply out. Nothing in here imports torch."""
