"""Comparison of two models of one vocabulary, token by token (``fipo compare shift``)."""
