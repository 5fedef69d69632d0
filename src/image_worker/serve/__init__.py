"""Ways in: RunPod's queue, its local HTTP server, the command line. Thin, and without torch."""
