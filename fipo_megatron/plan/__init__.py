"""The plan of a run before it starts: memory per GPU, time per step and disk space."""
