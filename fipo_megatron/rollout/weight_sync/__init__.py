"""Sends the actor's weights to the rollout engine and checks that they arrived."""
