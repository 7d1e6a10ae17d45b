"""The quickstart: ``make quickstart`` or ``python -m examples.quickstart``."""
