"""Mesh, optimizers, checkpoints, the jitted step and the training loop."""
