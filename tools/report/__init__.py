"""Curves, a comparison and a token view of one or several runs: ``python -m tools.report RUN [RUN …]``."""
