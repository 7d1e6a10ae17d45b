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
        """Returns the coefficients of a server of some GPUs with weights and cache in bfloat16.

        Exchange, prefill and scheduler take a few per cent of the time and are purposes of their own in ``rates``.
        """
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
            experts=experts * _BYTES / (memory * rates.read("decode_experts", "sampling") * tensor) if experts else 0.0,
            expert_share=share,
            product=2.0 * active / (device.bf16_flops * rates.read("decode_matmul", "sampling") * tensor),
            context=kv_bytes(architecture, tensor) / (memory * rates.read("decode_kv", "sampling")),
            exchange=exchanged / (device.nvlink * rates.read("nvlink", "exchange")) if tensor > 1 else 0.0,
            overhead=layers * rates.read("decode_layer", "sampling") + rates.read("decode_step", "scheduler"),
            prefill=2.0 * active / (device.bf16_flops * rates.read("prefill_matmul", "prefill") * tensor),
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


def full_length_responses(architecture: Architecture, tensor: int, memory_gib: float, tokens: int) -> int:
    """Returns how many requests of this many tokens, prompt included, fit into a server's KV cache; may be 0.

    Args:
        architecture: Architecture of the model.
        tensor: GPUs of the server.
        memory_gib: Memory of a GPU for weights and cache, in GiB.
        tokens: Tokens of a request.
    """
    weights = tables.parameter_count(architecture) * _BYTES / tensor
    free = memory_gib * 2**30 - weights
    return max(0, int(free // (kv_bytes(architecture, tensor) * tokens)))


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of prompts on all servers, from its start until the last response.

    Attributes:
        group_seconds: Seconds after which each group is complete, in rising order.
        progress: Seconds and tokens sampled so far of each server, at the end of each response.
        peak: Largest number of requests that run on a server.
    """

    group_seconds: NDArray[np.float64]
    progress: tuple[tuple[NDArray[np.float64], NDArray[np.float64]], ...]
    peak: int

    def until(self, groups: float) -> tuple[float, float]:
        """Returns seconds and sampled tokens when this many groups are complete; fractions are interpolated."""
        count = np.arange(1, len(self.group_seconds) + 1)
        seconds = float(np.interp(groups, count, self.group_seconds))
        return seconds, sum(float(np.interp(seconds, at, tokens)) for at, tokens in self.progress)


@lru_cache(maxsize=1024)
def run_batch(server: Server, lengths: ResponseLengths, groups: int, size: int, servers: int, slots: int) -> Batch:
    """Simulates servers that sample a batch of prompts; each has an equal number of whole groups.

    Args:
        server: Coefficients of the servers.
        lengths: Distribution of the responses.
        groups: Prompts of the batch.
        size: Responses per prompt.
        servers: Number of servers.
        slots: Requests that run at the same time on a server.
    """
    sample = lengths.sample_groups(groups, size)
    done: list[float] = []
    progress, peak = [], 0
    for number in range(min(servers, groups)):
        mine = sample[number::servers]
        seconds, tokens, finished, running = _run_server(server, lengths.prompt, mine, slots)
        done += finished
        progress.append((seconds, tokens))
        peak = max(peak, running)
    return Batch(np.sort(np.array(done)), tuple(progress), peak)


def _run_server(
    server: Server, prompt: float, lengths: NDArray[np.int64], slots: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[float], int]:
    """Simulates one server with the lengths of its groups.

    Returns:
        Seconds and tokens at the end of each response, the seconds after which each group is complete, and the largest
        number of requests that run.
    """
    groups, size = lengths.shape
    waiting = [(int(length), group) for group in range(groups) for length in lengths[group]]
    waiting.reverse()  # popped from the end
    running: list[tuple[int, int, int]] = []  # the step in which it finishes, its length and its group
    step, context, tokens, peak = 0, 0.0, 0.0, 0
    seconds = groups * prompt * server.prefill
    left, finished = [size] * groups, []
    times, sampled = [0.0], [0.0]
    while waiting or running:
        while waiting and len(running) < slots:
            length, group = waiting.pop()
            heapq.heappush(running, (step + length, length, group))
            context += prompt
        count = len(running)
        peak = max(peak, count)
        steps = running[0][0] - step
        seconds += steps * server.step(count, context + count * steps / 2)
        tokens += steps * count
        context += steps * count
        step += steps
        while running and running[0][0] == step:
            _, length, group = heapq.heappop(running)
            context -= prompt + length
            left[group] -= 1
            if not left[group]:
                finished.append(seconds)
        times.append(seconds)
        sampled.append(tokens)
    return np.array(times), np.array(sampled), finished, peak


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


@lru_cache(maxsize=1024)
def generate(server: Server, lengths: ResponseLengths, sampling: Sampling) -> Generation:
    """Simulates the rounds of dynamic sampling.

    A batch has as many prompts as groups are missing, times the oversampling factor (:mod:`.rollout.sampler`). It ends
    when enough groups are kept, and the rest is aborted, or with its last response.
    """
    rounds: list[float] = []
    missing, tokens, running = float(sampling.groups), 0.0, 0
    while missing > 0.5 and len(rounds) < sampling.max_rounds:
        wanted = math.ceil(missing * sampling.over_sampling)
        found = wanted * sampling.kept_fraction
        batch = run_batch(server, lengths, wanted, sampling.size, sampling.servers, sampling.slots)
        part = min(1.0, missing / found)
        seconds, sampled = batch.until(part * wanted)
        if part < 1 and sampling.carries:  # what is aborted is sampled once, over two steps
            needed = part * wanted * sampling.size * lengths.mean
            seconds, sampled = seconds * min(1.0, needed / sampled), min(sampled, needed)
        rounds.append(seconds)
        tokens += sampled
        running = max(running, batch.peak)
        missing -= min(found, missing)
    return Generation(tuple(rounds), tokens, sampling.groups - missing, running)
