"""Slurm: the engines of a job as a step of their own, and ``fipo submit``. The job scripts are in examples/slurm/."""
