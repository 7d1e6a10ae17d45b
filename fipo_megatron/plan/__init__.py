"""The plan of a run before it is queued: memory and time per GPU, from the trainer itself on fake tensors."""
