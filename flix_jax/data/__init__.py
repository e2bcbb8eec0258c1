"""From records on disk to batches with feature ids."""
