"""The rollout engine in the trainer's own process."""
