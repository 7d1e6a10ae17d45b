"""Verifiers and scoring of responses. Verifiers run in bounded child processes or behind a URL."""
