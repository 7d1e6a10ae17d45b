"""Checkpoints of a run: what they hold, which ones stay, and how they are written."""
