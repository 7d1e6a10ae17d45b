"""Hooks that tests use to interrupt a run."""
