"""Composes a run on one rank: the trainer, the rollout session, reporting and recovery from collapse."""
