"""The runs of an amplification: each γ and threshold, and RL alone at several temperatures.

All runs answer the same problems with the same seeds. A finished run is kept in two files and not sampled again:
``runs/NAME.jsonl`` has the rows of its problems; ``runs/NAME.json``, written last, has its means over tokens.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.config import Config
from fipo_megatron.evaluation.answering import Response
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs
from fipo_megatron.evaluation.results import ProblemResult, write_problems
from fipo_megatron.evaluation.standalone import sample_and_count
from fipo_megatron.rollout.embedded.drawing import Amplify
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine_factory import embedded_settings
from fipo_megatron.storage.atomic import write_atomic

logger = logging.getLogger("fipo_megatron")
FACTORS = tuple(2 ** (k / 4) for k in range(-12, 5))
"""Factors of the temperature at which the entropy of RL is measured: 1/8 to 2."""
TOLERANCE = 0.02
"""Largest relative difference of the entropies of an amplified run and its control."""
_ATTEMPTS = 5
_DIGITS = 3
"""Significant digits of a matched temperature."""


@dataclass(frozen=True)
class Setting:
    """A way to amplify.

    Attributes:
        gamma: γ.
        threshold: Threshold of Δlog p; None amplifies every position.
    """

    gamma: float
    threshold: float | None

    @property
    def name(self) -> str:
        """Name of the run, for files."""
        return f"gamma-{json.dumps(self.gamma)}-threshold-{json.dumps(self.threshold)}"

    def __str__(self) -> str:
        """Returns the setting for people."""
        return f"γ = {self.gamma:g}, threshold {'none' if self.threshold is None else f'{self.threshold:g}'}"


def settings_of(config: Config) -> list[Setting]:
    """Returns the settings of a configuration, each once, in its order."""
    grid = (Setting(gamma, threshold) for gamma in config.amplify.gamma for threshold in config.amplify.threshold)
    return list(dict.fromkeys(grid))


@dataclass(frozen=True)
class TokenMeans:
    """The measurements of a run over the tokens of all responses.

    Attributes:
        temperature: Sampling temperature.
        tokens: Number of tokens.
        selected: Number of tokens drawn from the mixture.
        changed: Number of these that the primary model would not have drawn.
        entropies: Mean entropy of the distributions that the tokens were drawn from, in nats, at the temperature; for
            RL alone at each of :data:`FACTORS` times the temperature.
    """

    temperature: float
    tokens: int
    selected: int
    changed: int
    entropies: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        problems: Results in the order of the problems.
        means: Measures over its tokens.
    """

    problems: tuple[ProblemResult, ...]
    means: TokenMeans

    @property
    def entropy(self) -> float:
        """Mean entropy per token at the temperature of the run, in nats."""
        entropies = self.means.entropies
        return entropies[0] if len(entropies) == 1 else entropies[FACTORS.index(1.0)]

    @property
    def response_tokens(self) -> float:
        """Mean length of a response in tokens."""
        return self.means.tokens / sum(row.samples for row in self.problems)


class _TokenCount:
    """Adds up the measures of responses, whatever the order in which they end."""

    def __init__(self) -> None:
        self._responses: dict[tuple[str, int], tuple[int, int, int, list[float]]] = {}

    def __call__(self, response: Response) -> None:
        """Counts a response."""
        one, drawn = response.trajectory, response.generation
        assert one is not None
        assert drawn is not None
        assert drawn.quantities is not None
        counts = len(drawn.tokens), int(drawn.selected.sum()), int(drawn.changed.sum())
        self._responses[one.prompt.id, one.sample] = *counts, drawn.quantities.sum(axis=0).tolist()

    def means(self, temperature: float) -> TokenMeans:
        """Returns the measures of a run at this temperature."""
        tokens, selected, changed, entropies = zip(*self._responses.values(), strict=True)
        mean = tuple(math.fsum(column) / sum(tokens) for column in zip(*entropies, strict=True))
        return TokenMeans(temperature, sum(tokens), sum(selected), sum(changed), mean)


class Runs:
    """Samples the runs, or reads finished ones.

    Args:
        config: Configuration of the evaluation.
        inputs: Its inputs.
        rl: Hugging Face directory of the RL model.
    """

    def __init__(self, config: Config, inputs: EvaluationInputs, rl: Path) -> None:
        self._config, self._inputs, self._rl = config, inputs, rl
        self._alone: dict[float, Run] = {}
        """Runs of RL alone by temperature."""

    async def alone(self, temperature: float) -> Run:
        """Returns the run of RL alone at a temperature."""
        if temperature not in self._alone:
            name = f"rl-temperature-{json.dumps(temperature)}"
            self._alone[temperature] = await self._run(name, temperature, None, FACTORS)
        return self._alone[temperature]

    async def amplified(self, setting: Setting) -> Run:
        """Returns the run of a setting."""
        return await self._run(setting.name, self._config.evaluation.temperature, setting, (1.0,))

    async def control(self, entropy: float) -> Run:
        """Returns a run of RL alone whose mean entropy per token is nearly this one.

        The temperature is that of :func:`temperature_for`. The responses change with the temperature, so runs are
        added until the entropy of one is within :data:`TOLERANCE`, at most :data:`_ATTEMPTS`.
        """
        for _ in range(_ATTEMPTS):
            temperature = temperature_for(list(self._alone.values()), entropy)
            if matches(self._nearest(entropy), entropy) or temperature in self._alone:
                break
            await self.alone(temperature)
        return self._nearest(entropy)

    def _nearest(self, entropy: float) -> Run:
        return min(self._alone.values(), key=lambda run: abs(run.entropy - entropy))

    async def _run(self, name: str, temperature: float, setting: Setting | None, factors: Sequence[float]) -> Run:
        file = self._inputs.output / "runs" / f"{name}.json"
        if (finished := _read(file)) is not None:
            logger.info("%s: finished before", name)
            return finished
        logger.info("%s", name)
        evaluation = replace(self._config.evaluation, temperature=temperature)
        count = _TokenCount()
        found = await sample_and_count(
            replace(self._config, evaluation=evaluation),
            self._inputs,
            self._rl,
            count,
            lambda rl: self._engine(rl, setting, factors),
        )
        run = Run(found.problems, count.means(temperature))
        write_problems(file.with_suffix(".jsonl"), run.problems)
        write_atomic(file, json.dumps(vars(run.means)) + "\n")
        return run

    def _engine(self, rl: Path, setting: Setting | None, factors: Sequence[float]) -> EmbeddedEngine:
        settings, base = embedded_settings(self._config), self._config.amplify.base
        if setting is None:
            return EmbeddedEngine(rl, **settings, entropy_at=factors)
        primary_is_rl = self._config.amplify.primary == "rl"
        primary, second = (rl, base) if primary_is_rl else (base, rl)
        rule = Amplify(setting.gamma, setting.threshold, primary_is_rl)
        return EmbeddedEngine(primary, **settings, second=(second, rule), entropy_at=factors)


def _read(file: Path) -> Run | None:
    """Returns a finished run; None if it is not finished."""
    if not file.is_file():
        return None
    means = json.loads(file.read_text(encoding="utf-8"))
    lines = file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    rows = tuple(ProblemResult(**json.loads(line)) for line in lines)
    return Run(rows, TokenMeans(**means | {"entropies": tuple(means["entropies"])}))


def temperature_for(alone: Sequence[Run], entropy: float) -> float:
    """Returns the temperature at which RL alone is expected to have this mean entropy per token.

    It is interpolated linearly in the logarithms of both: between the two nearest runs if some have a smaller
    and some a larger entropy; otherwise in the entropies that the nearest run has measured at other temperatures, on
    its own responses. Beyond those it is the lowest or the highest temperature that they have.

    Args:
        alone: Runs of RL alone, at least one.
        entropy: Entropy in nats.
    """
    below = max((run for run in alone if run.entropy <= entropy), key=lambda run: run.entropy, default=None)
    above = min((run for run in alone if run.entropy > entropy), key=lambda run: run.entropy, default=None)
    if below is not None and above is not None:
        entropies = [run.entropy for run in (below, above)]
        temperatures = [run.means.temperature for run in (below, above)]
    else:
        nearest = (below or above or alone[0]).means
        entropies = np.maximum.accumulate(nearest.entropies).tolist()
        temperatures = [nearest.temperature * factor for factor in FACTORS]
    temperature = math.exp(np.interp(_log(entropy), _log(entropies), np.log(temperatures)))
    return float(f"{temperature:.{_DIGITS}g}")


def _log(entropies: float | Sequence[float]) -> NDArray[np.float64]:
    """Returns logarithms; that of 0 is very small, but finite."""
    found: NDArray[np.float64] = np.log(np.maximum(entropies, 1e-30))
    return found


def matches(run: Run, entropy: float) -> bool:
    """Returns whether a run has this mean entropy per token, within :data:`TOLERANCE`."""
    return abs(run.entropy - entropy) <= TOLERANCE * entropy
