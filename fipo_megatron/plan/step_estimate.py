"""Estimates the time of a step of a run, by phase, from FLOPs, bytes and efficiencies.

:func:`estimate_step` is arithmetic: it needs neither torch.distributed nor Megatron, and a search may call it
thousands of times. Evaluations, checkpoints, exports and the verifier are not part of a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fipo_megatron.config import Config, layout_conflicts
from fipo_megatron.observe.devices import Device
from fipo_megatron.observe.throughput import TRAINING, pass_flops
from fipo_megatron.plan.efficiencies import TABLE, Efficiency, Kind, Rates, weakest
from fipo_megatron.plan.generation_time import Generation, Sampling, Server, full_length_responses, generate
from fipo_megatron.plan.response_lengths import MEAN_FRACTION, ResponseLengths
from fipo_megatron.plan.training_time import ActorTime, Packing, Seconds, local_parameters, pack_sample, packing_key
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

_KEPT_FRACTION = 0.6
_PROMPT_TOKENS = 150.0
_PROBES = 8


@dataclass(frozen=True)
class ClusterShape:
    """The GPUs of a run.

    Attributes:
        trainer_gpus: GPUs of the trainer's ranks.
        rollout_gpus: GPUs of the servers; with ``rollout.servers.colocated`` those of the trainer, and not counted
            twice.
        gpus_per_node: GPUs per node.
    """

    trainer_gpus: int
    rollout_gpus: int
    gpus_per_node: int = 8

    @classmethod
    def of_run(cls, config: Config, gpus: int, gpus_per_node: int = 8) -> ClusterShape:
        """Returns the split of some GPUs: all for both if there are no servers or they are colocated, else half each.

        With several nodes, whole nodes sample; an odd one trains.
        """
        no_servers = config.algorithm.kind == "sft" or config.run.replay or config.rollout.engine == "embedded"
        if no_servers or config.rollout.servers.colocated:
            return cls(gpus, gpus, gpus_per_node)
        unit = gpus_per_node if gpus > gpus_per_node else 1
        rollout = gpus // unit // 2 * unit
        return cls(gpus - rollout, rollout, gpus_per_node)


@dataclass(frozen=True)
class Workload:
    """The work of a step, as far as the configuration does not say it.

    Attributes:
        lengths: Lengths of responses and prompts.
        kept_fraction: Fraction of groups that dynamic sampling keeps; 1 without it.
    """

    lengths: ResponseLengths
    kept_fraction: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError if the fraction is out of range."""
        if not 0 < self.kept_fraction <= 1:
            raise ValueError(f"kept_fraction: must be in (0, 1], got {self.kept_fraction:g}")

    @classmethod
    def default(cls, config: Config) -> Workload:
        """Returns responses of half the limit on average, and 0.6 of the groups kept under dynamic sampling."""
        limit = config.rollout.max_response_tokens
        prompt = min(_PROMPT_TOKENS, config.data.max_prompt_tokens)
        lengths = ResponseLengths.from_mean(max(1.0, MEAN_FRACTION * limit), max(2, limit), prompt=prompt)
        drops = config.algorithm.kind != "sft" and config.algorithm.dynamic_sampling
        return cls(lengths, _KEPT_FRACTION if drops else 1.0)


@dataclass(frozen=True)
class Piece:
    """A part of a phase.

    Attributes:
        name: Name.
        seconds: Seconds per step.
        basis: Weakest kind of efficiency that the number rests on.
    """

    name: str
    seconds: float
    basis: Kind


@dataclass(frozen=True)
class Phase:
    """A phase of a step.

    Attributes:
        name: ``generate``, ``log_probs``, ``update``, ``sync``, ``offload`` or ``other``; the first four as in
            ``time/*`` of a run, where ``sync`` includes ``offload``.
        pieces: Parts; their seconds add up.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def seconds(self) -> float:
        """Seconds per step."""
        return sum(piece.seconds for piece in self.pieces)

    @property
    def basis(self) -> Kind:
        """Weakest kind among the parts that take at least a twentieth of the phase."""
        return weakest(piece.basis for piece in self.pieces if piece.seconds >= 0.05 * self.seconds)


@dataclass(frozen=True)
class StepTime:
    """The estimated time of a step.

    Attributes:
        phases: Phases in their order.
        step_seconds: Seconds from one step to the next; less than the sum of the phases with ``rollout.overlap``.
        gpus: GPUs of trainer and servers together.
        steps: ``run.steps``.
        figures: Further figures by name: tokens, rates, concurrency, idle seconds.
        workload: The workload.
    """

    phases: tuple[Phase, ...]
    step_seconds: float
    gpus: int
    steps: int
    figures: Mapping[str, float]
    workload: Workload

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run."""
        return self.step_seconds * self.steps * self.gpus / 3600

    def phase(self, name: str) -> float:
        """Returns the seconds of a phase; 0 if the run does not have it."""
        return sum(phase.seconds for phase in self.phases if phase.name == name)

    def rows(self) -> list[dict[str, str]]:
        """Returns the rows of the table: each phase, then its parts of at least a hundredth of the step."""
        rows = []
        for phase in self.phases:
            rows.append(self._row(phase.name, "", phase.seconds, phase.basis))
            shown = [piece for piece in phase.pieces if piece.seconds >= 0.01 * self.step_seconds]
            if len(shown) > 1:
                rows += [self._row("", piece.name, piece.seconds, piece.basis) for piece in shown]
        basis = weakest(phase.basis for phase in self.phases if phase.seconds >= 0.05 * self.step_seconds)
        return [*rows, self._row("step", "", self.step_seconds, basis)]

    def _row(self, phase: str, part: str, seconds: float, basis: Kind) -> dict[str, str]:
        share = seconds / self.step_seconds if self.step_seconds else 0.0
        return {
            "phase": phase,
            "part": part,
            "seconds": f"{seconds:,.1f}",
            "of the step": f"{share:.0%}",
            "rests on": basis,
        }

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain data for ``plan.json``."""
        return {
            "step_seconds": self.step_seconds,
            "steps": self.steps,
            "gpus": self.gpus,
            "gpu_hours": self.gpu_hours,
            "figures": dict(self.figures),
            "phases": {
                phase.name: {
                    "seconds": phase.seconds,
                    "basis": phase.basis,
                    "parts": [asdict(piece) for piece in phase.pieces],
                }
                for phase in self.phases
            },
            "workload": {"kept_fraction": self.workload.kept_fraction, "lengths": self.workload.lengths.as_dict()},
        }


def estimate_step(
    config: Config,
    architecture: Architecture,
    shape: ClusterShape,
    device: Device,
    kv_concurrency: int | None = None,
    *,
    workload: Workload | None = None,
    table: Mapping[str, Efficiency] = TABLE,
) -> StepTime:
    """Estimates the time of a step.

    Args:
        config: Configuration of the run.
        architecture: Architecture of the model.
        shape: GPUs of trainer and servers.
        device: The GPUs.
        kv_concurrency: Responses of full length whose KV cache fits one server; None: computed from the memory.
        workload: Lengths, and groups that are kept; None: defaults (:meth:`Workload.default`).
        table: Efficiencies.

    Raises:
        ValueError: The layout does not fit the GPUs, or no response of full length fits a server.
    """
    return _Estimate(config, architecture, shape, device, workload or Workload.default(config), table).step(
        kv_concurrency
    )


class _Estimate:
    """The phases of one estimate; see :func:`estimate_step`."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        shape: ClusterShape,
        device: Device,
        workload: Workload,
        table: Mapping[str, Efficiency],
    ) -> None:
        if problems := layout_conflicts(config.actor.parallel, shape.trainer_gpus):
            raise ValueError("\n".join(problems))
        parallel = config.actor.parallel
        self._config, self._architecture, self._shape, self._device = config, architecture, shape, device
        self._workload, self._table = workload, table
        self._data = shape.trainer_gpus // (
            parallel.tensor_parallel * parallel.pipeline_parallel * parallel.context_parallel
        )
        self._samples = 1 if config.algorithm.kind == "sft" else config.rollout.samples_per_prompt

    def step(self, kv_concurrency: int | None) -> StepTime:
        """Returns the whole estimate."""
        run, rollout, sft = self._config.run, self._config.rollout, self._config.algorithm.kind == "sft"
        phases: list[Phase] = []
        figures: dict[str, float] = {}
        samples = not sft and not run.replay
        if samples:
            phases += [self._generate(kv_concurrency, figures), *self._between(figures)]
        if not run.rollout_only:
            packing = self._packing()
            if not sft:
                phases.append(self._log_probs(packing))
            phases.append(self._update(packing, figures))
        seconds = {phase.name: phase.seconds for phase in phases}
        sampling = seconds.get("generate", 0.0)
        training = seconds.get("log_probs", 0.0) + seconds.get("update", 0.0)
        between = seconds.get("sync", 0.0) + seconds.get("offload", 0.0)
        both = max(sampling, training) if rollout.overlap else sampling + training
        phases.append(self._other(both + between))
        total = both + between + phases[-1].seconds
        shared = not samples or rollout.servers.colocated or rollout.engine == "embedded"
        gpus = self._shape.trainer_gpus + (0 if shared else self._shape.rollout_gpus)
        if not shared:
            figures["trainer_idle_seconds"], figures["rollout_idle_seconds"] = both - training, both - sampling
        if samples:
            figures["generated_tokens_per_second"] = figures["generated_tokens"] / sampling
        if training:
            figures["trained_tokens_per_second"] = figures["trained_tokens"] / training
            figures["tokens_per_second_per_gpu"] = figures["trained_tokens"] / total / gpus
        return StepTime(tuple(phases), total, gpus, run.steps, figures, self._workload)

    def _other(self, seconds: float) -> Phase:
        """Returns what a step does beside its phases, as a share of them."""
        rates = Rates(self._table)
        share = rates.read("other", "other")
        return Phase("other", (Piece("data, scatter, metrics", seconds * share, rates.basis("other")),))

    def _packing(self) -> Packing:
        actor = self._config.actor
        count = actor.prompts_per_mini_batch * self._samples
        return pack_sample(packing_key(actor, self._architecture, self._workload.lengths, count, self._data))

    def _actor_time(self) -> tuple[ActorTime, Rates]:
        rates = Rates(self._table)
        return (
            ActorTime(
                self._architecture, self._config.actor, self._device, self._shape.gpus_per_node, self._data, rates
            ),
            rates,
        )

    @property
    def _mini_batches(self) -> float:
        """Mini-batches of a step; the last one counts as far as it is full."""
        return self._config.groups_per_step / self._config.actor.prompts_per_mini_batch

    def _log_probs(self, packing: Packing) -> Phase:
        actor, rates = self._actor_time()
        has_reference = self._config.algorithm.kl_coef != 0
        passes = max(0.0, self._mini_batches - 1) + has_reference * self._mini_batches  # the first update gives π_old
        pieces = _pass_pieces(actor, actor.forward(packing), rates, passes)
        if has_reference:  # the reference policy is swapped in and out
            dense, experts = local_parameters(self._architecture, self._config.actor)
            rate = self._device.host_link * rates.read("host_link", "reference swap")
            pieces.append(Piece("reference swap", 3 * 2 * (dense + experts) / rate, rates.basis("reference swap")))
        return Phase("log_probs", tuple(pieces))

    def _update(self, packing: Packing, figures: dict[str, float]) -> Phase:
        actor, rates = self._actor_time()
        updates = self._mini_batches
        pieces = _pass_pieces(actor, actor.training(packing), rates, updates)
        if self._config.actor.transformer.get("moe_aux_loss_coeff"):  # measures the experts' loads beforehand
            mean, waiting, bubble = actor.mini_batch(actor.forward(packing))
            pieces.append(Piece("loads of experts", updates * (mean + waiting + bubble), rates.basis("products")))
        step, moved = actor.optimizer_step()
        pieces.append(Piece("optimizer", updates * step, rates.basis("optimizer")))
        if moved:
            pieces.append(Piece("gradients", updates * moved, rates.basis("gradients")))
        phase = Phase("update", tuple(pieces))
        figures["trained_tokens"] = packing.real_tokens * updates
        figures["update_mfu"] = self._mfu(packing, phase.seconds / updates)
        figures["micro_batches"] = packing.tokens.shape[1]
        figures["data_parallel"] = self._data
        return phase

    def _mfu(self, packing: Packing, seconds: float) -> float:
        """Returns the model FLOPs of a training step over the peak of the trainer's GPUs."""
        flops = TRAINING * pass_flops(self._architecture, packing.real_tokens, packing.real_pairs)
        return flops / seconds / (self._device.bf16_flops * self._shape.trainer_gpus)

    def _generate(self, kv_concurrency: int | None, figures: dict[str, float]) -> Phase:
        rates, config = Rates(self._table), self._config
        server, sampling, full_length = self._sampling(kv_concurrency, rates)
        found = generate(server, self._workload.lengths, sampling)
        basis = rates.basis("sampling")
        first, *later = found.rounds
        pieces = [Piece("first batch", first, basis)]
        if later:
            pieces.append(Piece("later batches", sum(later), basis))
        self._generation_figures(found, sampling, full_length, figures)
        figures["kept_groups"] = min(found.kept_groups, config.rollout.prompts_per_step)
        return Phase("generate", tuple(pieces))

    def _generation_figures(
        self, found: Generation, sampling: Sampling, full_length: int, figures: dict[str, float]
    ) -> None:
        figures["generated_tokens"] = found.tokens
        figures["batches_of_prompts"] = len(found.rounds)
        figures["servers"] = sampling.servers
        figures["running_requests"] = found.running
        figures["full_length_responses"] = full_length

    def _sampling(self, kv_concurrency: int | None, rates: Rates) -> tuple[Server, Sampling, int]:
        """Returns the server, how it samples, and the responses of full length that fit it."""
        rollout, lengths = self._config.rollout, self._workload.lengths
        embedded = rollout.engine == "embedded"
        tensor = 1 if embedded else int(rollout.sglang.get("tp_size", 1))
        gpus = self._data if embedded else self._shape.rollout_gpus
        if gpus < tensor or gpus % tensor:
            raise ValueError(
                f"rollout.sglang.tp_size = {tensor}: must divide the {gpus} GPUs of the servers, at least once"
            )
        longest = self._config.data.max_prompt_tokens + rollout.max_response_tokens
        if kv_concurrency is None:
            memory = self._device.memory_gib
            if (fraction := rollout.sglang.get("mem_fraction_static")) is not None:
                memory *= float(fraction)
            else:
                memory -= rates.read("engine_reserve", "sampling")
            kv_concurrency = full_length_responses(self._architecture, tensor, memory, longest)
        if not embedded and kv_concurrency < 1:
            raise ValueError(
                f"rollout.sglang.tp_size = {tensor}: the KV cache of a server has no room for a response of "
                f"{longest} tokens, prompt included; use more GPUs per server"
            )
        slots = int(kv_concurrency * longest / (lengths.prompt + lengths.mean_while_running))
        limit = rollout.embedded_slots if embedded else rollout.servers.concurrency * self._data
        limit = min(limit, int(rollout.sglang.get("max_running_requests") or limit))
        allowed = rollout.max_staleness - rollout.overlap
        return (
            Server.build(self._architecture, self._device, tensor, rates),
            Sampling(
                servers=gpus // tensor,
                slots=max(1, min(slots, limit)) if not embedded else limit,
                groups=rollout.prompts_per_step,
                size=rollout.samples_per_prompt,
                kept_fraction=self._workload.kept_fraction,
                over_sampling=rollout.over_sampling,
                max_rounds=rollout.max_generation_batches,
                carries=allowed > 0,
            ),
            kv_concurrency,
        )

    def _between(self, figures: dict[str, float]) -> list[Phase]:
        """Returns what lies between the updates and the next responses: weights, probe and offloading."""
        rates, rollout = Rates(self._table), self._config.rollout
        size = 2.0 * tables.parameter_count(self._architecture)
        figures["synced_bytes"] = size
        if rollout.engine == "embedded":
            seconds = size / (self._device.memory_bandwidth * rates.read("decode_kv", "weights"))
        else:
            way = rollout.servers.sync
            seconds = size / rates.read(f"sync_{way}", "weights") * (2 if way == "disk" else 1)
        pieces = [Piece("weights", seconds, rates.basis("weights"))]
        if rollout.engine != "embedded" and rollout.servers.probe_tokens:
            server = self._sampling(None, rates)[0]
            context = _PROBES * (self._workload.lengths.prompt + rollout.servers.probe_tokens)
            seconds = rollout.servers.probe_tokens * server.step(_PROBES, context)
            pieces.append(Piece("probe", seconds, rates.basis("sampling")))
        phases = [Phase("sync", tuple(pieces))]
        if rollout.servers.colocated:
            phases.append(self._offload(rates))
        return phases

    def _offload(self, rates: Rates) -> Phase:
        """Returns the transfers of a colocated actor to the host and back."""
        actor, parallel = self._config.actor, self._config.actor.parallel
        dense, experts = local_parameters(self._architecture, actor)
        shards = self._data * parallel.context_parallel if actor.distributed_optimizer else 1
        state = 12 * (dense + experts) / shards  # main parameters and two moments in float32
        weights = (2 if actor.dtype == "bfloat16" else 4) * (dense + experts)
        rate = self._device.host_link * rates.read("host_link", "offload")
        basis = rates.basis("offload")
        return Phase(
            "offload",
            (Piece("optimizer", 2 * state / rate, basis), Piece("weights", 2 * weights / rate, basis)),
        )


def _pass_pieces(actor: ActorTime, seconds: Seconds, rates: Rates, times: float) -> list[Piece]:
    """Returns the parts of some equal passes over a mini-batch."""
    _, waiting, bubble = actor.mini_batch(seconds)
    pieces = []
    for name in ("products", "attention", "elementwise", "output", "recompute", "communication"):
        mean = float(getattr(seconds, name).sum(axis=1).mean())
        if mean:
            rests_on = ("products", "attention", "elementwise") if name == "recompute" else (name,)
            pieces.append(Piece(name, times * mean, rates.basis(*rests_on)))
    everything = rates.basis("products", "attention", "elementwise", "output")
    if waiting > 0:
        pieces.append(Piece("waiting for the slowest rank", times * waiting, everything))
    if bubble:
        pieces.append(Piece("pipeline bubble", times * bubble, everything))
    return pieces
