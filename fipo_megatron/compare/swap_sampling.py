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
from fipo_megatron.compare.swap_points import CALIBRATED, Point, PointFiles, PointResult, Role, threshold_for
from fipo_megatron.config import Config
from fipo_megatron.evaluation.answering import Response, evaluate
from fipo_megatron.evaluation.evaluation_inputs import EvaluationInputs
from fipo_megatron.evaluation.results import ProblemResult, write_problems
from fipo_megatron.evaluation.standalone import ProgressLog
from fipo_megatron.reward.scoring import ResponseScorer
from fipo_megatron.reward.verifier import open_verifier
from fipo_megatron.reward.verifier_protocol import Verifier
from fipo_megatron.rollout.embedded.drawing import PrimaryAlone, Swap, TwoModelRule
from fipo_megatron.rollout.embedded.embedded_engine import EmbeddedEngine
from fipo_megatron.rollout.engine import Generation, GenerationRequest
from fipo_megatron.rollout.store_coordinator import StoreCoordinator
from fipo_megatron.storage.atomic import write_atomic

logger = logging.getLogger("fipo_megatron")
_DIRECTIONS: tuple[tuple[Role, Role], ...] = (("base", "rl"), ("rl", "base"))
_DIGITS = 4
"""Significant digits of quantities in the files of responses."""


class RecordingEngine(EmbeddedEngine):
    """An embedded engine that keeps what it returns, since an evaluation keeps tokens only.

    Attributes:
        generations: Results by the id of their request.
    """

    generations: dict[str, Generation]

    async def generate(self, request: GenerationRequest) -> Generation:
        """Samples one response; see :meth:`.engine.RolloutEngine.generate`."""
        found = await super().generate(request)
        self.generations[request.id] = found
        return found


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
        for primary, second in _DIRECTIONS:
            points = [point for point in plan if point.primary == primary]
            left = [point for point in points if files.read(point) is None]
            if not left:
                continue
            logger.info("%d of %d points drawn by %s are to be sampled", len(left), len(points), primary)
            alone = PrimaryAlone(CALIBRATED)
            engine = RecordingEngine(
                models[primary], slots=config.rollout.embedded_slots, second=(models[second], alone)
            )
            sampler = _PointSampler(config, inputs, engine, verifier, files)
            try:
                for number, point in enumerate(left, 1):
                    logger.info("point %d of %d: %s", number, len(left), point.name)
                    await sampler.sample(point, [each for each in points if each.selector is None])
            finally:
                await engine.close()
    finally:
        await verifier.close()


class _PointSampler:
    """Samples points with one primary model."""

    def __init__(
        self,
        config: Config,
        inputs: EvaluationInputs,
        engine: RecordingEngine,
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
        rule, threshold = self._rule(point, alone)
        engine, inputs, kept = self._engine, self._inputs, dict[tuple[int, int], dict[str, Any]]()
        engine.rule, engine.generations = rule, {}
        order = {prompt.id: number for number, prompt in enumerate(inputs.problems)}
        progress = ProgressLog(len(inputs.problems) * self._config.evaluation.samples_per_prompt)

        def keep(response: Response) -> None:
            trajectory = response.trajectory
            assert trajectory is not None
            prompt, sample = trajectory.prompt, trajectory.sample
            generation = engine.generations[f"evaluation/{prompt.id}/{sample}"]
            kept[order[prompt.id], sample] = self._row(response, generation, point)
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
        rows = [kept[key] for key in sorted(kept)]
        if point.selector is None:
            found = [engine.generations[f"evaluation/{row['prompt_id']}/{row['sample']}"].quantities for row in rows]
            content = io.BytesIO()
            np.save(content, np.concatenate([each for each in found if each is not None]))
            write_atomic(self._files.quantities(point), content.getvalue())
        write_atomic(self._files.responses(point), "".join(json.dumps(row) + "\n" for row in rows))
        write_problems(self._files.problems(point), evaluation.problems)
        write_atomic(self._files.result(point), PointFiles.content(_counted(threshold, rows, evaluation.problems)))

    def _rule(self, point: Point, alone: Sequence[Point]) -> tuple[TwoModelRule, float | None]:
        """Returns the rule of a point, and its threshold."""
        if point.selector is None:
            return PrimaryAlone(CALIBRATED), None
        threshold = point.threshold
        if threshold is None:
            assert point.share is not None
            quantities = np.concatenate([np.load(self._files.quantities(each)) for each in alone])
            threshold = threshold_for(point.selector, point.share, quantities)
        return Swap(point.selector, threshold), threshold

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
