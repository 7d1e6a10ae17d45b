"""Curves, a comparison and a token view of one or several runs: ``python -m fipo_megatron.report RUN [RUN …]``."""
