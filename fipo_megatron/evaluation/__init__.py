"""Evaluation of a policy: answers and votes, avg@k, cons@k and pass@k with intervals, tables and files."""
