"""`make quickstart`."""
