"""Candidates for the final answer within a response, and how their correctness changes (``fipo moments``)."""
