"""Presets and things to run."""
