"""The edit itself: numerics as functions over explicit tensors. Knows nothing of jobs or queues."""
