"""The command ``fipo stress``: reads its options, runs its parts, writes results and compares them with a budget."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fipo_megatron.actor.launch import Launch

# torch and Megatron-Core take seconds to import: functions import them, so that a typo is reported before.
if TYPE_CHECKING:
    from fipo_megatron.actor.actor import MegatronActor
    from fipo_megatron.data.trajectory import Trajectory
    from fipo_megatron.rollout.store_coordinator import StoreCoordinator
    from fipo_megatron.stress.stress_settings import StressOptions, StressSettings

_DESCRIPTION = """\
Measures the engine and the actor of a run at long sequences, before the run needs them.

engine  responses of forced length: tokens per second, seconds per token by position, KV cache, retractions, failures
actor   log-probs, Future-KL and update of synthetic trajectories: seconds, and peak memory beside the plan; needs
        neither an engine nor weights
drift   log-probs and Future-KL of the engine's responses under the engine and under the actor, by position

Under torchrun, the actor uses all ranks. docs/stress.md describes the figures.
"""
_EXIT_CODES = (
    "Exit codes: 0 done; 1 a limit of the budget is violated, or a part failed; 2 the configuration or an argument is "
    "not valid."
)
DONE, FAILED, NOT_VALID = 0, 1, 2


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns the exit code."""
    given = _parser().parse_intermixed_args(arguments)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    try:
        launch = Launch.from_environment(os.environ)
        settings = _settings(given)
    except (ValueError, OSError) as error:
        if rank == "0":
            print(error, file=sys.stderr)
        return NOT_VALID
    return _Stress(settings, launch).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fipo stress",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", help="configuration of the run, with its layout")
    add("overrides", nargs="*", metavar="key=value", help="overrides, as for fipo train")
    add(
        "--lengths",
        default="16384,32768,65536,131072",
        metavar="N,N,…",
        help="tokens of a sequence, prompt and response together (default: %(default)s)",
    )
    add("--parts", default="engine,actor,drift", metavar="PART,…", help="parts to run (default: %(default)s)")
    add("--prompt-tokens", type=int, default=64, metavar="N", help="tokens of every prompt (default: %(default)s)")
    add("--responses", type=int, default=8, metavar="N", help="responses per length of the engine (default: 8)")
    add(
        "--sequences",
        type=int,
        metavar="N",
        help="sequences per replica in the actor's mini-batch (default: as many as fill the pipeline)",
    )
    add(
        "--median",
        type=int,
        metavar="TOKENS",
        help="log-normal response lengths with this median, cut at the length (default: all have the length)",
    )
    add("--spread", type=float, metavar="X", help="standard deviation of the logarithm of the length (default: 0.6)")
    add("--budget", type=Path, metavar="FILE", help="limits in YAML; a violated one makes the exit code 1")
    add("--output", type=Path, metavar="DIR", help="directory of stress.json and the report (default: RUN/stress)")
    return parser


def _settings(given: argparse.Namespace) -> StressSettings:
    """Reads and checks the options, and everything that they name.

    Raises:
        ValueError: Something is not valid.
    """
    options = _options(given)
    from fipo_megatron.observe.console import silence_libraries
    from fipo_megatron.stress.stress_settings import read_settings

    silence_libraries()
    settings = read_settings(options, os.environ)
    if {"actor", "drift"} & set(options.parts):
        from fipo_megatron.actor import megatron_config  # takes seconds to import; other mistakes are reported before

        megatron_config.check(settings.architecture, settings.longest.actor)
        megatron_config.check_auxiliary_losses(settings.longest)
    return settings


def _options(given: argparse.Namespace) -> StressOptions:
    from fipo_megatron.stress.stress_settings import StressOptions, option_lengths, option_parts

    for name in ("prompt_tokens", "responses", "sequences", "median"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    spread = {}
    if given.spread is not None:
        if given.median is None:
            raise ValueError(f"--spread {given.spread:g}: needs --median, the median of the log-normal lengths")
        if not 0 <= given.spread < float("inf"):
            raise ValueError(f"--spread {given.spread:g}: must be finite and not negative")
        spread = {"spread": given.spread}
    return StressOptions(
        config=given.config,
        overrides=tuple(given.overrides),
        lengths=option_lengths(given.lengths),
        parts=option_parts(given.parts),
        prompt_tokens=given.prompt_tokens,
        responses=given.responses,
        sequences=given.sequences,
        median=given.median,
        budget=given.budget,
        output=given.output,
        **spread,
    )


class _Stress:
    """A stress run on this rank.

    Args:
        settings: Settings of the run.
        launch: Position of this process.
    """

    def __init__(self, settings: StressSettings, launch: Launch) -> None:
        self._settings, self._launch = settings, launch
        self._start = time.monotonic()
        self._results: dict[str, list[dict[str, Any]]] = {part: [] for part in settings.options.parts}

    def run(self) -> int:
        """Runs the parts one after the other, tells an error in one line, and returns the exit code."""
        from fipo_megatron.actor import parallel
        from fipo_megatron.rollout.engine import EngineError, LostRankError, RequestError
        from fipo_megatron.weights.hf_directory import WeightsError

        try:
            if self._launch.rank == 0:
                self._settings.output.mkdir(parents=True, exist_ok=True)
            responses = self._engine_part() if self._settings.samples else {}
            if {"actor", "drift"} & self._results.keys():
                self._actor_parts(responses)
            return self._finish() if self._launch.rank == 0 else DONE
        except (EngineError, LostRankError, RequestError) as error:  # on all ranks
            if self._launch.rank == 0:
                print(f"fipo stress: {type(error).__name__}: {error}", file=sys.stderr)
            return FAILED
        except (WeightsError, OSError) as error:
            rank = f"rank {self._launch.rank}: " if self._launch.world_size > 1 else ""
            print(f"fipo stress: {rank}{type(error).__name__}: {error}", file=sys.stderr)
            return FAILED
        finally:
            parallel.destroy()

    def _report(self, line: str) -> None:
        if self._launch.rank == 0:
            print(f"[{time.monotonic() - self._start:5.0f} s] {line}", file=sys.stderr, flush=True)

    def _engine_part(self) -> dict[int, tuple[Trajectory, ...]]:
        """Samples on the first rank, while the others wait; returns its responses by length."""
        import torch.distributed as dist

        from fipo_megatron.actor import parallel
        from fipo_megatron.rollout.store_coordinator import StoreCoordinator

        launch = self._launch
        store = parallel.connect(launch) if launch.address else dist.HashStore()
        silence = self._settings.longest.rollout.silence_seconds
        coordinator = StoreCoordinator(store, launch.rank, (0,), launch.world_size, silence_seconds=silence)
        return asyncio.run(self._sample(coordinator))

    async def _sample(self, coordinator: StoreCoordinator) -> dict[int, tuple[Trajectory, ...]]:
        found: dict[int, tuple[Trajectory, ...]] = {}
        error: Exception | None = None
        if coordinator.rank == 0:
            try:
                async with coordinator.alive():
                    await self._sample_lengths(found)
            except Exception as failure:
                error = failure
        await coordinator.gather({}, error)
        return found

    async def _sample_lengths(self, found: dict[int, tuple[Trajectory, ...]]) -> None:
        from fipo_megatron.stress.forced_generation import force_responses, opened_engine

        settings = self._settings
        self._report(f"engine: opening {settings.longest.rollout.engine}")
        async with opened_engine(settings) as engine:
            for length in settings.configs:
                done = await force_responses(engine, settings, length, self._report)
                found[length] = done.trajectories
                metrics = done.row["metrics"]
                self._report(f"engine: {length:,} tokens: {metrics['tokens_per_second']:,.0f} tokens/s")
                if "engine" in self._results:
                    self._results["engine"].append(done.row)
                    self._write()

    def _actor_parts(self, responses: dict[int, tuple[Trajectory, ...]]) -> None:
        """Builds the actor and measures it. A collective of all ranks."""
        from fipo_megatron.actor import parallel
        from fipo_megatron.actor.actor import MegatronActor
        from fipo_megatron.actor.hf_weights import load_hf

        settings = self._settings
        config, architecture = settings.longest, settings.architecture
        layout = parallel.initialize(config.actor.parallel, config.seed)
        loads = "drift" in self._results  # seconds and memory do not depend on the weights
        self._report("actor: building it" + (" and reading its weights" if loads else " with random weights"))
        actor = MegatronActor(
            config,
            architecture,
            layout,
            lambda chunks: load_hf(chunks, architecture, layout, config.model.path) if loads else None,
        )
        if loads:
            self._drift(actor, responses)  # before an update changes the weights
        if "actor" in self._results:
            self._measure(actor)

    def _drift(self, actor: MegatronActor, responses: dict[int, tuple[Trajectory, ...]]) -> None:
        from fipo_megatron.actor.collectives import broadcast_from_first_rank
        from fipo_megatron.stress.engine_drift import measure_drift

        responses = broadcast_from_first_rank(responses, actor.layout.device)
        for length in self._settings.configs:
            row: dict[str, Any] = {"length": length, "failure": "no response of the engine", "metrics": {}}
            if responses[length]:
                row = measure_drift(actor, self._settings, length, responses[length])
                self._report(f"drift: {length:,} tokens: 99 % of |Δ log-prob| below {row['metrics']['p99']:.2g}")
            self._results["drift"].append(row)
            self._write()

    def _measure(self, actor: MegatronActor) -> None:
        import torch

        from fipo_megatron.actor.collectives import broadcast_from_first_rank
        from fipo_megatron.stress.actor_passes import measure_actor
        from fipo_megatron.stress.planned_memory import planned_memory

        settings, world_size = self._settings, self._launch.world_size
        planned = planned_memory(settings, world_size, self._report) if self._launch.rank == 0 else {}
        planned = broadcast_from_first_rank(planned, actor.layout.device)
        failure = ""
        for length in settings.configs:
            row: dict[str, Any] = {"length": length, "metrics": {}}
            try:
                row |= {"failure": failure} if failure else measure_actor(actor, settings, length, planned.get(length))
            except torch.OutOfMemoryError as error:
                if world_size > 1:  # the other ranks wait in a collective
                    raise OSError(f"actor: out of memory at {length} tokens: {error}") from None
                failure = f"out of memory at {length} tokens: {' '.join(str(error).split())}"
                row["failure"] = failure
            if "seconds" in row:
                seconds = row["seconds"]
                self._report(
                    f"actor: {length:,} tokens: log-probs {seconds['log_probs']:.1f} s, "
                    f"update {seconds['update']:.1f} s"
                )
            self._results["actor"].append(row)
            self._write()

    def _data(self) -> dict[str, Any]:
        from fipo_megatron.stress.stress_text import described

        return described(self._settings, self._launch.world_size) | self._results

    def _write(self) -> None:
        """Writes stress.json with what was measured so far."""
        if self._launch.rank == 0:
            from fipo_megatron.stress.stress_files import write_results

            write_results(self._settings.output, self._data())

    def _finish(self) -> int:
        """Compares with the budget, writes everything, prints the tables, and returns the exit code."""
        from fipo_megatron.stress.limits import violations
        from fipo_megatron.stress.stress_files import write_report
        from fipo_megatron.stress.stress_text import tables

        limits = self._settings.limits
        violated = violations(limits, self._results)
        data = self._data() | {"limits": [vars(limit) for limit in limits], "violations": violated}
        print(tables(data))
        for path in write_report(self._settings.output, data):
            print(path)
        for sentence in violated:
            print(f"budget: {sentence}", file=sys.stderr)
        return FAILED if violated else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
