"""What the adapters are injected into: the T5 family, its loss and its decoding."""
