"""Samples the points of ``fipo compare swap``: answers to all problems, drawn from two models."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fipo_megatron.compare.response_file import response_row
from fipo_megatron.compare.swap_engines import ROLES, TwoModelEngine, two_model_engines
from fipo_megatron.compare.swap_points import Point, PointFiles, PointResult, Role, threshold_for
from fipo_megatron.config import Config
from fipo_megatron.evaluation.answering import Response, evaluate
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs
from fipo_megatron.evaluation.results import ProblemResult, write_problems
from fipo_megatron.evaluation.standalone import ProgressLog
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.reward.verifier_protocol import Verifier
from fipo_megatron.rollout.engine import Generation
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.storage.atomic import write_atomic

logger = logging.getLogger("fipo_megatron")
_DIGITS = 4
"""Significant digits of quantities in the files of responses."""


async def sample_points(
    config: Config,
    inputs: EvaluationInputs,
    models: Mapping[Role, Path],
    plan: Sequence[Point],
    files: PointFiles,
) -> None:
    """Samples the points that are not finished and writes their files.

    Args:
        config: Configuration of the comparison.
        inputs: Problems, tokenizer and stop tokens.
        models: Hugging Face directories of the two models.
        plan: All points. Those of a model alone come before those with a target share, whose thresholds need them.
        files: Files of the points.

    Raises:
        EngineError: The engine failed.
        VerifierError: Too many checks failed.
    """
    files.make_directories()
    verifier = open_verifier(config.reward)
    try:
        async with two_model_engines(config, inputs, models, files.output) as open_engine:
            for primary in ROLES:
                points = [point for point in plan if point.primary == primary]
                left = [point for point in points if files.read(point) is None]
                if not left:
                    continue
                logger.info("%d of %d points drawn by %s are to be sampled", len(left), len(points), primary)
                async with open_engine(primary) as engine:
                    sampler = _PointSampler(config, inputs, engine, verifier, files)
                    for number, point in enumerate(left, 1):
                        logger.info("point %d of %d: %s", number, len(left), point.name)
                        await sampler.sample(point, [each for each in points if each.selector is None])
    finally:
        await verifier.close()


class _PointSampler:
    """Samples points with one primary model."""

    def __init__(
        self,
        config: Config,
        inputs: EvaluationInputs,
        engine: TwoModelEngine,
        verifier: Verifier,
        files: PointFiles,
    ) -> None:
        self._config, self._inputs, self._engine, self._files = config, inputs, engine, files
        self._scorer = ResponseScorer(config, verifier, inputs.tokenizer)

    async def sample(self, point: Point, alone: Sequence[Point]) -> None:
        """Samples a point and writes its files.

        Args:
            point: Point to sample.
            alone: Finished points of the primary model alone, with which a threshold is calibrated.
        """
        threshold = self._threshold(point, alone)
        engine, inputs, kept = self._engine, self._inputs, dict[tuple[int, int], tuple[Generation, dict[str, Any]]]()
        engine.select(point.selector, threshold)
        order = {prompt.id: number for number, prompt in enumerate(inputs.problems)}
        progress = ProgressLog(len(inputs.problems) * self._config.evaluation.samples_per_prompt)

        def keep(response: Response) -> None:
            trajectory, generation = response.trajectory, response.generation
            assert trajectory is not None
            assert generation is not None
            key = order[trajectory.prompt.id], trajectory.sample
            kept[key] = generation, self._row(response, generation, point)
            progress(response)

        evaluation = await evaluate(
            inputs.problems,
            engine,
            StoreCoordinator(dist.HashStore(), 0),
            self._scorer,
            replace(self._config, seed=point.seed),
            inputs.stop_token_ids,
            keep,
        )
        rows = [kept[key][1] for key in sorted(kept)]
        if point.selector is None:
            found = [kept[key][0].quantities for key in sorted(kept)]
            content = io.BytesIO()
            np.save(content, np.concatenate([each for each in found if each is not None]))
            write_atomic(self._files.quantities(point), content.getvalue())
        write_atomic(self._files.responses(point), "".join(json.dumps(row) + "\n" for row in rows))
        write_problems(self._files.problems(point), evaluation.problems)
        write_atomic(self._files.result(point), PointFiles.content(_counted(threshold, rows, evaluation.problems)))

    def _threshold(self, point: Point, alone: Sequence[Point]) -> float | None:
        """Returns the threshold of a point; None for a model alone."""
        if point.selector is None or point.threshold is not None:
            return point.threshold
        assert point.share is not None
        quantities = np.concatenate([np.load(self._files.quantities(each)) for each in alone])
        return threshold_for(point.selector, point.share, quantities)

    def _row(self, response: Response, generation: Generation, point: Point) -> dict[str, Any]:
        assert response.trajectory is not None
        trajectory = replace(response.trajectory, accuracy=None if response.failure else int(response.right))
        selected = np.flatnonzero(generation.selected)
        row = response_row(trajectory, self._inputs.tokenizer)
        row |= {"selected": selected.tolist(), "changed": np.flatnonzero(generation.changed).tolist()}
        if point.selector is not None and generation.quantities is not None:
            row["quantity"] = [float(f"{v:.{_DIGITS}g}") for v in generation.quantities[selected, 0].tolist()]
        return row


def _counted(
    threshold: float | None, rows: Sequence[Mapping[str, Any]], problems: Sequence[ProblemResult]
) -> PointResult:
    return PointResult(
        threshold,
        tokens=sum(len(row["response_ids"]) for row in rows),
        selected=sum(len(row["selected"]) for row in rows),
        changed=sum(len(row["changed"]) for row in rows),
        right=tuple(each.right for each in problems),
        checked=tuple(each.checked for each in problems),
        truncated=sum(each.truncated for each in problems),
    )
