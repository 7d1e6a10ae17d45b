"""Sampling of responses: rollout engines, the sampler that drives them, and the senders of their weights."""
