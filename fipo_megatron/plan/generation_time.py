"""Time to sample the responses of a step with servers that decode batches.

A server decodes one token of every running request at a time. A token takes the time to read the weights, or to
multiply with them where the batch is large, the time to read the keys and values of all running requests, and an
overhead per layer. Requests are admitted while their keys and values fit. As responses finish and none is left to
admit, the batch drains; the longest response ends the round.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.observe.devices import Device
from fipo_megatron.observe.throughput import matrix_parameters
from fipo_megatron.plan.efficiencies import Rates
from fipo_megatron.plan.response_lengths import ResponseLengths
from fipo_megatron.weights import tables
from fipo_megatron.weights.architecture import Architecture

_BYTES = 2
_SEED = 0
"""Seed of the order in which responses are admitted."""


@dataclass(frozen=True)
class Server:
    """Coefficients of a server's decoding.

    Attributes:
        weights: Seconds to read all weights that are no experts.
        experts: Seconds to read all experts.
        expert_share: Fraction of the experts that one token uses.
        product: Seconds of the matrix products per request.
        context: Seconds per token of keys and values.
        exchange: Seconds of the tensor-parallel collectives per request.
        overhead: Seconds per step that depend on nothing.
        prefill: Seconds per token of a prompt.
    """

    weights: float
    experts: float
    expert_share: float
    product: float
    context: float
    exchange: float
    overhead: float
    prefill: float

    @classmethod
    def build(cls, architecture: Architecture, device: Device, tensor: int, rates: Rates) -> Server:
        """Returns the coefficients of a server of some GPUs with weights and cache in bfloat16."""
        memory = device.memory_bandwidth
        active, read = matrix_parameters(architecture), float(_read_parameters(architecture))
        experts, share = 0.0, 0.0
        if (mixture := architecture.mixture) is not None:
            experts = sum(mixture.layers) * 3.0 * architecture.hidden * mixture.ffn * mixture.experts
            share = mixture.top_k / mixture.experts
        read_rate = memory * rates.read("decode_weights", "sampling") * tensor / _BYTES
        layers, hidden = architecture.layers, architecture.hidden
        exchanged = 2 * layers * 2 * (1 - 1 / tensor) * hidden * _BYTES
        return cls(
            weights=(read - experts) / read_rate,
            experts=experts / read_rate,
            expert_share=share,
            product=2.0 * active / (device.bf16_flops * rates.read("decode_matmul", "sampling") * tensor),
            context=kv_bytes(architecture, tensor) / (memory * rates.read("decode_kv", "sampling")),
            exchange=exchanged / (device.nvlink * rates.read("nvlink", "sampling")) if tensor > 1 else 0.0,
            overhead=layers * rates.read("decode_layer", "sampling") + rates.read("decode_step", "sampling"),
            prefill=2.0 * active / (device.bf16_flops * rates.read("prefill_matmul", "sampling") * tensor),
        )

    def step(self, running: float, context: float) -> float:
        """Returns the seconds of one token of every running request.

        Args:
            running: Requests.
            context: Tokens of their prompts and responses so far.
        """
        touched = 1 - float((1 - self.expert_share) ** running)
        products = max(self.weights + self.experts * touched, self.product * running)
        return products + self.context * context + self.exchange * running + self.overhead


def kv_bytes(architecture: Architecture, tensor: int, element_bytes: int = _BYTES) -> int:
    """Returns the bytes of keys and values of a token on one GPU of a server; heads are never split."""
    heads = -(-architecture.kv_groups // tensor)
    return 2 * architecture.layers * heads * architecture.head_dim * element_bytes


def _read_parameters(architecture: Architecture) -> int:
    """Returns the parameters that decoding reads: all but the input embedding."""
    return tables.parameter_count(architecture) - architecture.vocab * architecture.hidden * (not architecture.tied)


def full_length_responses(
    architecture: Architecture, device: Device, tensor: int, memory_fraction: float, tokens: int
) -> int:
    """Returns how many requests of this many tokens, prompt included, fit into a server's KV cache; may be 0.

    Args:
        architecture: Architecture of the model.
        device: The GPUs.
        tensor: GPUs of the server.
        memory_fraction: Fraction of a GPU's memory for weights and cache (SGLang's ``mem_fraction_static``).
        tokens: Tokens of a request.
    """
    weights = tables.parameter_count(architecture) * _BYTES / tensor
    free = device.memory_gib * 2**30 * memory_fraction - weights
    return max(0, int(free // (kv_bytes(architecture, tensor) * tokens)))


@dataclass(frozen=True, eq=False)
class Drain:
    """A batch of groups on one server, from its start until the last response.

    Attributes:
        group_seconds: Seconds after which each group is complete, in rising order.
        group_tokens: Tokens that the server has sampled by then.
        peak: Largest number of running requests.
    """

    group_seconds: NDArray[np.float64]
    group_tokens: NDArray[np.float64]
    peak: int

    def until(self, groups: float) -> tuple[float, float]:
        """Returns seconds and sampled tokens when this many groups are complete; fractions are interpolated."""
        at = np.arange(1, len(self.group_seconds) + 1)
        return float(np.interp(groups, at, self.group_seconds)), float(np.interp(groups, at, self.group_tokens))


@lru_cache(maxsize=1024)
def drain(server: Server, lengths: ResponseLengths, groups: int, size: int, slots: int, longest: int) -> Drain:
    """Simulates a server that samples some groups.

    Args:
        server: The server.
        lengths: Distribution of the responses.
        groups: Groups of the batch.
        size: Responses per group.
        slots: Requests that run at the same time.
        longest: Length of the longest response of all servers; this server has it.
    """
    sample = lengths.sample(groups * size)
    sample[-1] = max(sample[-1], longest)
    order = np.random.default_rng(_SEED).permutation(len(sample))
    waiting = [(int(sample[i]), position // size) for position, i in enumerate(order)]
    waiting.reverse()  # popped from the end
    running: list[tuple[int, int, int]] = []  # the step in which it finishes, its length and its group
    prompt, step, context = lengths.prompt, 0, 0.0
    seconds = groups * lengths.prompt * server.prefill
    tokens, peak = 0.0, 0
    left = [size] * groups
    done: list[tuple[float, float]] = []
    while waiting or running:
        while waiting and len(running) < slots:
            length, group = waiting.pop()
            heapq.heappush(running, (step + length, length, group))
            context += prompt
        peak = max(peak, len(running))
        steps = running[0][0] - step
        seconds += steps * server.step(len(running), context + len(running) * steps / 2)
        tokens += steps * len(running)
        context += steps * len(running)
        step += steps
        while running and running[0][0] == step:
            _, length, group = heapq.heappop(running)
            context -= prompt + length
            left[group] -= 1
            if not left[group]:
                done.append((seconds, tokens))
    times, sampled = np.array(done).T
    return Drain(times, sampled, peak)


@dataclass(frozen=True)
class Sampling:
    """How the groups of a step are sampled.

    Attributes:
        servers: Number of servers.
        slots: Requests that run at the same time on a server.
        groups: Groups that a step needs.
        size: Responses per group.
        kept_fraction: Fraction of groups that are kept.
        over_sampling: Oversampling factor.
        max_rounds: Maximum number of batches of prompts.
        carries: Whether aborted responses go on in the next step.
    """

    servers: int
    slots: int
    groups: int
    size: int
    kept_fraction: float = 1.0
    over_sampling: float = 1.0
    max_rounds: int = 10
    carries: bool = False


@dataclass(frozen=True)
class Generation:
    """The sampling of a step.

    Attributes:
        rounds: Seconds of each batch of prompts.
        tokens: Tokens sampled.
        kept_groups: Groups kept.
        running: Largest number of requests that run on a server.
    """

    rounds: tuple[float, ...]
    tokens: float
    kept_groups: float
    running: int

    @property
    def seconds(self) -> float:
        """Seconds of all rounds."""
        return sum(self.rounds)


def generate(server: Server, lengths: ResponseLengths, sampling: Sampling) -> Generation:
    """Simulates the rounds of dynamic sampling.

    A batch has as many prompts as groups are missing, times the oversampling factor (:mod:`.rollout.sampler`). It ends
    when enough groups are kept, and the rest is aborted, or with its last response.
    """
    rounds: list[float] = []
    missing, tokens, running = float(sampling.groups), 0.0, 0
    while missing >= 0.5 and len(rounds) < sampling.max_rounds:
        wanted = math.ceil(missing * sampling.over_sampling)
        found = min(wanted * sampling.kept_fraction, wanted)
        share = -(-wanted // sampling.servers)
        used = min(sampling.servers, wanted)
        longest = lengths.quantile(1 - 0.5 / (wanted * sampling.size))
        batch = drain(server, lengths, share, sampling.size, sampling.slots, longest)
        part = min(1.0, missing / found)
        seconds, sampled = batch.until(part * share)
        if part < 1 and sampling.carries:  # what is aborted is sampled once, over two steps
            needed = part * share * sampling.size * lengths.mean
            seconds, sampled = seconds * min(1.0, needed / sampled), min(sampled, needed)
        rounds.append(seconds)
        tokens += sampled * used * (wanted / (share * used))
        running = max(running, batch.peak)
        missing -= min(found, missing)
    return Generation(tuple(rounds), tokens, sampling.groups - missing, running)
