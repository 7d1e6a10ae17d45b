"""Metrics, trajectory files, trackers, console and collapse alarm of a run."""
