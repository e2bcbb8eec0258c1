"""What FLix is: feature spaces, low-rank deltas and their injection into linen models."""
