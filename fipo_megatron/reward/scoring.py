"""The reward of a response: +1 or −1 by the verifier's verdict, minus the length penalty."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from fipo_megatron.algorithm.advantages import overlong_penalty
from fipo_megatron.config import Config
from fipo_megatron.data.trajectory import Score, Trajectory
from fipo_megatron.moments.recording import MomentRecorder, MomentTotals
from fipo_megatron.moments.transitions import judge_with
from fipo_megatron.reward.verifier_protocol import Answer, Verdict, Verifier
from fipo_megatron.testing import fail_points


class ResponseScorer:
    """Scores responses with a verifier; a :data:`.rollout.sampler_settings.Scorer`.

    Args:
        config: Configuration of the run; ``reward`` and ``rollout.max_response_tokens`` are read.
        verifier: Verifier of the answers.
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, config: Config, verifier: Verifier, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._verifier, self._tokenizer = config, verifier, tokenizer
        self._pending, self._since, self._seconds = 0, 0.0, 0.0
        self._moments = MomentRecorder(config.observe.moments_extractor) if config.observe.moments else None

    async def __call__(self, trajectory: Trajectory) -> Score:
        """Returns the accuracy, 0 or 1, and the reward: ±1 plus the overlong penalty, which is ≤ 0.

        A response whose check failed has neither with ``reward.on_failure = mask``.
        """
        fail_points.reach("reward")
        verdict = await self.verdict(trajectory)
        reward = self._config.reward
        if self._moments is not None:
            await self._record_moments(self._moments, trajectory, verdict)
        if verdict.failure and reward.on_failure == "mask":
            return Score(None, None, verdict.failure, verdict.detail)
        penalty = self._overlong_penalty(len(trajectory.tokens))
        return Score(
            (1.0 if verdict.correct else -1.0) + penalty,
            int(verdict.correct),
            verdict.failure,
            verdict.detail,
            self.asks(trajectory),
        )

    def _overlong_penalty(self, length: int) -> float:
        """Returns the overlong penalty of a response of this many tokens."""
        longest, reward = self._config.rollout.max_response_tokens, self._config.reward
        if length <= longest - reward.overlong_buffer_tokens:  # most responses
            return 0.0
        buffer, factor = reward.overlong_buffer_tokens, reward.overlong_penalty
        return float(overlong_penalty(torch.tensor([length]), longest, buffer, factor))

    def asks(self, trajectory: Trajectory) -> bool:
        """Returns whether the verifier is asked about a response; see :meth:`verdict`."""
        return not (self._config.reward.truncated_is_wrong and trajectory.finish_reason == "length")

    async def verdict(self, trajectory: Trajectory) -> Verdict:
        """Returns the verdict of the verifier.

        With ``reward.truncated_is_wrong`` a truncated response is wrong and has no answer; the verifier is not asked.
        """
        if not self.asks(trajectory):
            return Verdict(False)
        prompt = trajectory.prompt
        answer = Answer(
            response=self.text(trajectory),
            ground_truth=prompt.ground_truth,
            prompt=str(self._tokenizer.decode(prompt.tokens.tolist())),
            data_source=prompt.data_source,
        )
        with self._timed():
            return await self._verifier.verify(answer)

    async def _record_moments(self, recorder: MomentRecorder, trajectory: Trajectory, verdict: Verdict) -> None:
        prompt = trajectory.prompt
        text = str(self._tokenizer.decode(prompt.tokens.tolist()))
        judge = judge_with(self._verifier, self._config.reward.verifier, prompt.ground_truth, text, prompt.data_source)
        with self._timed():
            await recorder.record(self.text(trajectory), trajectory, verdict, judge)

    def take_moments(self) -> MomentTotals:
        """Returns the moments of the responses scored since the last call; none without ``observe.moments``."""
        return MomentTotals() if self._moments is None else self._moments.take()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self._pending:
            self._since = time.perf_counter()
        self._pending += 1
        try:
            yield
        finally:
            self._pending -= 1
            if not self._pending:
                self._seconds += time.perf_counter() - self._since

    def take_seconds(self) -> float:
        """Returns the seconds during which at least one answer was being checked, and resets them to 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def text(self, trajectory: Trajectory) -> str:
        """Decodes the response without special tokens."""
        return str(self._tokenizer.decode(trajectory.tokens.tolist(), skip_special_tokens=True))
