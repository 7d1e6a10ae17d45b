"""Sampling of responses: engines, what feeds them with weights, and what drives them."""
