"""Measures engine and actor at long sequences before a run needs them: ``fipo stress``."""
