"""Runs supervised fine-tuning and then FIPO, each in processes of its own; for tasks of your own, too."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stages:
    """The inputs of both stages.

    Attributes:
        output: Directory for ``sft/`` and ``fipo/``.
        model: Hugging Face model to start from.
        examples: File with ``prompt`` and ``response`` for supervised fine-tuning.
        problems: File with ``prompt`` and ``answer`` for FIPO.
        held_out: File with problems for evaluation.
        seed: Seed of both runs.
        sft_config: Configuration of supervised fine-tuning.
        fipo_config: Configuration of FIPO.
    """

    output: Path
    model: Path
    examples: Path
    problems: Path
    held_out: Path
    seed: int = 1
    sft_config: Path = HERE / "sft.yaml"
    fipo_config: Path = HERE / "fipo.yaml"

    @property
    def sft(self) -> Path:
        """Output of supervised fine-tuning; its model is in ``hf/``."""
        return self.output / "sft"

    @property
    def fipo(self) -> Path:
        """Output of FIPO."""
        return self.output / "fipo"


def train(config: Path, overrides: Sequence[str], ranks: int = 1) -> float:
    """Runs fipo_megatron.train in processes of its own and returns the seconds that it took.

    Raises:
        SystemExit: The run failed; with its exit code.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    start = time.perf_counter()
    command = [sys.executable, *launcher, "-m", "fipo_megatron.train", str(config), *overrides]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)
    return time.perf_counter() - start


def train_sft(stages: Stages) -> float:
    """Runs supervised fine-tuning and returns the seconds that it took."""
    return train(
        stages.sft_config,
        [
            *(f"seed={stages.seed}", f"run.output={stages.sft}", f"model.path={stages.model}"),
            f"data.files=[{stages.examples}]",
        ],
    )


def train_fipo(stages: Stages, overrides: Sequence[str] = (), ranks: int = 1) -> float:
    """Runs FIPO on the fine-tuned model and returns the seconds that it took."""
    return train(
        stages.fipo_config,
        [
            *(f"seed={stages.seed}", f"run.output={stages.fipo}", f"model.path={stages.sft}/hf"),
            *(f"data.files=[{stages.problems}]", f"evaluation.files=[{stages.held_out}]"),
            *overrides,
        ],
        ranks,
    )
