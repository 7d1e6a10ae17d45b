"""Time of the actor's passes over packed micro-batches under every parallelism.

The time of a layer on a micro-batch is the sum of its matrix products, its attention, its elementwise operators and the
collectives that nothing hides, but never less than the launch of its kernels. The output layer adds its products and
the time of its logits, of which a part follows the memory's bandwidth. A pipeline runs at the pace of its slowest
stage, plus the bubble. Ranks wait for each other at the end of a mini-batch, and with expert parallelism in every
layer. Micro-batches are those of the project's own packing (:mod:`fipo_megatron.data.packing`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fipo_megatron.config import ActorConfig
from fipo_megatron.config.padding import micro_batch_multiple, token_multiple
from fipo_megatron.data.context_parallel import CpLayout
from fipo_megatron.data.packing import SequenceCost, plan_micro_batches
from fipo_megatron.observe.devices import Device
from fipo_megatron.observe.throughput import sequence_cost
from fipo_megatron.plan.efficiencies import Rates
from fipo_megatron.plan.response_lengths import ResponseLengths
from fipo_megatron.weights.architecture import Architecture

_BYTES = 2
"""Bytes of an activation or a weight in bfloat16."""

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Packing:
    """The micro-batches of a mini-batch.

    Attributes:
        tokens: Tokens of each micro-batch, padding included, ``[data-parallel ranks, micro-batches]``.
        pairs: Half the sum of the squared lengths of its sequences, same shape.
        real_tokens: Tokens of the mini-batch without padding.
        real_pairs: Half the sum of the squared lengths without padding.
    """

    tokens: Array
    pairs: Array
    real_tokens: int
    real_pairs: float


@dataclass(frozen=True)
class PackingKey:
    """Everything that a packing depends on.

    Attributes:
        lengths: Distribution of the responses.
        count: Responses of the mini-batch.
        budget: ``actor.token_budget`` in whole multiples.
        data: Data-parallel size.
        context: Context-parallel size.
        multiple: Divisor of the number of micro-batches.
        token_multiple: Divisor of the tokens of one rank.
        cost: Cost of a sequence.
    """

    lengths: ResponseLengths
    count: int
    budget: int
    data: int
    context: int
    multiple: int
    token_multiple: int
    cost: SequenceCost


@lru_cache(maxsize=4096)
def pack_sample(key: PackingKey) -> Packing:
    """Packs a sample of the lengths as the actor would.

    Raises:
        ValueError: A sequence is longer than the budget.
    """
    layout = CpLayout(key.context)
    lengths = [int(length) + round(key.lengths.prompt) for length in key.lengths.sample(key.count)]
    padded = [layout.padded_length(length) for length in lengths]
    (plan,) = plan_micro_batches(
        padded,
        [range(len(padded))],
        token_budget=key.budget,
        data_parallel_size=key.data,
        micro_batch_multiple=key.multiple,
        cost=key.cost,
    )
    filler = layout.padded_length(1)
    tokens, pairs = np.zeros((2, key.data, len(plan.micro_batches[0])))
    for rank, micro_batches in enumerate(plan.micro_batches):
        for number, members in enumerate(micro_batches):
            sizes = [padded[i] for i in members] or [filler]
            tokens[rank, number] = layout.padded_total(sum(sizes), key.token_multiple)
            pairs[rank, number] = sum(size * size for size in sizes) / 2
    return Packing(tokens, pairs, sum(lengths), sum(length * length for length in lengths) / 2)


def packing_key(
    actor: ActorConfig, architecture: Architecture, lengths: ResponseLengths, count: int, data: int
) -> PackingKey:
    """Returns the key of a mini-batch's packing under a layout."""
    parallel, multiple = actor.parallel, micro_batch_multiple(actor)
    return PackingKey(
        lengths=lengths,
        count=count,
        budget=actor.token_budget // multiple * multiple,
        data=data,
        context=parallel.context_parallel,
        multiple=parallel.pipeline_parallel if parallel.virtual_pipeline > 1 else 1,
        token_multiple=token_multiple(actor),
        cost=sequence_cost(architecture),
    )


@dataclass(frozen=True)
class LayerCosts:
    """The work of an average layer per token, over all tensor-parallel ranks.

    Attributes:
        products: FLOPs of the dense matrix products: attention's projections and dense MLPs.
        expert_products: FLOPs of the experts' products.
        mlp_products: FLOPs of the MLP's products, dense or of experts; part of the two above.
        attention: FLOPs of the attention per pair of positions.
        split_elements: Elements that elementwise operators read or write and tensor parallelism always splits.
        other_elements: Those that it splits with sequence parallelism only.
        mlp_elements: Those of the MLP's activation; part of ``split_elements``.
    """

    products: float
    expert_products: float
    mlp_products: float
    attention: float
    split_elements: float
    other_elements: float
    mlp_elements: float

    @classmethod
    @lru_cache(maxsize=64)
    def from_architecture(cls, architecture: Architecture) -> LayerCosts:
        """Returns the costs of a model's average layer.

        Elements: two norms (read and write), two residual additions (three each), rope and, if there are any, norms of
        queries and keys (read and write), the gated activation (two read, one written), and for experts the copies of
        tokens to and from them.
        """
        hidden = architecture.hidden
        query, key = architecture.heads * architecture.head_dim, architecture.kv_groups * architecture.head_dim
        projections = 2.0 * hidden * 2 * (query + key)
        dense, mixed, width = 6.0 * hidden * architecture.ffn, 0.0, float(architecture.ffn)
        copies = 0.0
        if (mixture := architecture.mixture) is not None:
            share = sum(mixture.layers) / architecture.layers
            mixed = share * 6.0 * hidden * mixture.ffn * mixture.top_k
            dense *= 1 - share
            width = (1 - share) * width + share * mixture.ffn * mixture.top_k
            copies = share * 4.0 * hidden * mixture.top_k
        rope = (4.0 if architecture.family.qk_norm else 2.0) * (query + key)
        return cls(
            products=projections + dense,
            expert_products=mixed,
            mlp_products=dense + mixed,
            attention=4.0 * query,
            split_elements=rope + 3 * width + copies,
            other_elements=10.0 * hidden,
            mlp_elements=3 * width + copies,
        )


@dataclass(frozen=True)
class Seconds:
    """Seconds of a pass, or of a micro-batch, by cause.

    Attributes:
        products: Matrix products of the layers.
        attention: Core attention.
        elementwise: Norms, rope, activations and residual additions, or waiting for the launch of kernels.
        output: The output layer with its logits.
        recompute: Repeated forward work in backward.
        communication: Collectives of tensor, context, expert and pipeline parallelism that nothing hides.
    """

    products: Array
    attention: Array
    elementwise: Array
    output: Array
    recompute: Array
    communication: Array

    @property
    def total(self) -> Array:
        """Sum over the causes."""
        return self.products + self.attention + self.elementwise + self.output + self.recompute + self.communication


class ActorTime:
    """Times the passes of an actor on one device per rank.

    Args:
        architecture: Architecture of the model.
        actor: Section of the configuration.
        device: The GPUs.
        gpus_per_node: GPUs per node.
        data: Data-parallel size.
        rates: Efficiencies.

    Raises:
        ValueError: The device has no FP8 and ``actor.fp8`` asks for it.
    """

    def __init__(
        self,
        architecture: Architecture,
        actor: ActorConfig,
        device: Device,
        gpus_per_node: int,
        data: int,
        rates: Rates,
    ) -> None:
        if actor.fp8 != "off" and device.fp8_flops is None:
            raise ValueError(f"actor.fp8 = {actor.fp8}: must be off on {device.name}, which has no FP8")
        self._architecture, self._actor, self._device = architecture, actor, device
        self._node, self._data, self._rates = gpus_per_node, data, rates
        self._costs = LayerCosts.from_architecture(architecture)
        self._kind = "torch" if actor.transformer.get("transformer_impl") == "local" else "te"
        self._precision = "" if actor.fp8 == "off" else f"_fp8_{actor.fp8_recipe}"
        self._layers = architecture.layers / actor.parallel.pipeline_parallel

    def forward(self, packing: Packing) -> Seconds:
        """Returns the seconds of a forward pass over each micro-batch, on the slowest pipeline stage."""
        return self._pass(packing, backward=False)

    def training(self, packing: Packing) -> Seconds:
        """Returns the seconds of forward, recomputation and backward over each micro-batch."""
        return self._pass(packing, backward=True)

    def mini_batch(self, seconds: Seconds) -> tuple[float, float, float]:
        """Returns the seconds of a mini-batch: busy on average, waiting for the slowest rank, and pipeline bubble."""
        parallel, slots = self._actor.parallel, seconds.total
        mean = float(slots.sum(axis=1).mean())
        # Experts of other data-parallel ranks take part in every layer, so these ranks run micro-batch by micro-batch.
        groups = slots.reshape(-1, min(parallel.data_ranks_in_lockstep, len(slots)), slots.shape[1])
        slowest = float(groups.max(axis=1).sum(axis=1).max())
        # While the pipeline fills and drains, the stages before the last have no output layer.
        inner = float((slots - seconds.output).mean())
        bubble = (parallel.pipeline_parallel - 1) * inner / parallel.virtual_pipeline
        return mean, slowest - mean, bubble

    def _pass(self, packing: Packing, *, backward: bool) -> Seconds:
        layers = self._layers
        products, attention, elements = self._layer(packing, backward=False)
        recompute = np.zeros_like(products)
        communication = self._communication(packing, backward=False)
        if backward:
            if self._actor.recompute == "full":
                recompute = products + attention + elements + communication
            elif self._actor.recompute == "selective":
                recompute = self._mlp(packing) + self._tensor_collectives(packing, 2)
            back = self._layer(packing, backward=True)
            products, attention, elements = products + back[0], attention + back[1], elements + back[2]
            communication = communication + self._communication(packing, backward=True)
        stage = self._pipeline(packing) * (2 if backward else 1)
        return Seconds(
            products=products * layers,
            attention=attention * layers,
            elementwise=elements * layers,
            output=self._output(packing, backward=backward),
            recompute=recompute * layers,
            communication=communication * layers + stage,
        )

    def _layer(self, packing: Packing, *, backward: bool) -> tuple[Array, Array, Array]:
        """Returns products, attention and elementwise operators of one layer in one direction."""
        costs, rates, parallel = self._costs, self._rates, self._actor.parallel
        tokens, pairs, factor = self._local(packing.tokens), self._local(packing.pairs), 2 if backward else 1
        tensor = parallel.tensor_parallel
        products = tokens * costs.products / self._product_rate() * factor / tensor
        if costs.expert_products:
            slower = self._product_rate() * rates.read("expert_matmul", "products")
            products = products + tokens * costs.expert_products / slower * factor / tensor
        direction = "backward" if backward else "forward"
        attention_rate = self._device.bf16_flops * rates.read(f"attention_{direction}_{self._kind}", "attention")
        attention = pairs * costs.attention / attention_rate * factor / tensor
        count = costs.split_elements / tensor
        count += costs.other_elements / (tensor if parallel.sequence_parallel else 1)
        elements = tokens * count * factor * self._seconds_per_element()
        busy = products + attention + elements
        launch = f"layer_launch{self._precision}"
        if busy.min() < rates.peek(launch):  # the device waits for the next kernel
            elements = elements + np.maximum(rates.read(launch, "elementwise") - busy, 0.0)
        return products, attention, elements

    def _mlp(self, packing: Packing) -> Array:
        """Returns the seconds of the forward pass of one layer's MLP."""
        costs, tensor = self._costs, self._actor.parallel.tensor_parallel
        tokens = self._local(packing.tokens)
        dense = costs.mlp_products - costs.expert_products
        products = tokens * dense / self._product_rate()
        if costs.expert_products:
            products = products + tokens * costs.expert_products / (
                self._product_rate() * self._rates.read("expert_matmul", "products")
            )
        return (products + tokens * costs.mlp_elements * self._seconds_per_element()) / tensor

    def _output(self, packing: Packing, *, backward: bool) -> Array:
        """Returns the seconds of the output layer: its products, its logits and the traffic of the weight gradient."""
        actor, rates, device = self._actor, self._rates, self._device
        tokens = self._local(packing.tokens)
        columns = self._architecture.padded_vocab(actor.vocab_multiple * actor.parallel.tensor_parallel)
        columns //= actor.parallel.tensor_parallel
        weights = columns * self._architecture.hidden
        product = 2 * tokens * weights / (device.bf16_flops * rates.read("matmul", "output"))
        logits = tokens * columns
        per_logit = rates.read("logit_bytes_forward", "output") / device.memory_bandwidth
        seconds = product + logits * (per_logit + rates.read("logit_seconds_forward", "output"))
        if backward:  # the chunk is recomputed; its weight gradient is added to a float32 sum
            chunks = tokens / actor.log_prob_chunk_tokens
            seconds = seconds + 3 * product + logits * rates.read("logit_seconds_backward", "output")
            seconds = seconds + chunks * weights * 12 / device.memory_bandwidth
        return seconds

    def _communication(self, packing: Packing, *, backward: bool) -> Array:
        """Returns the seconds of the collectives of one layer that nothing hides."""
        parallel = self._actor.parallel
        # With sequence parallelism, backward gathers the inputs once more for the weight gradients.
        count = 6 if backward and parallel.sequence_parallel else 4
        seconds = self._tensor_collectives(packing, count)
        if parallel.context_parallel > 1:
            width = 2 * self._architecture.kv_groups * self._architecture.head_dim / parallel.tensor_parallel
            chunk = self._local(packing.tokens) * width * _BYTES * (parallel.context_parallel - 1)
            exchange = chunk / self._link(parallel.tensor_parallel * parallel.context_parallel)
            seconds = seconds + exchange * self._rates.read("context_exposed", "communication") * (2 if backward else 1)
        if parallel.expert_parallel > 1 and self._architecture.mixture is not None:
            mixture = self._architecture.mixture
            share = sum(mixture.layers) / self._architecture.layers
            copies = self._local(packing.tokens) / parallel.tensor_parallel * mixture.top_k * self._architecture.hidden
            size = parallel.expert_parallel * parallel.expert_tensor_size
            # Tokens spread evenly over the ranks: those of the own node do not take the network.
            kept = min(self._node, size) / size if size > self._node else 1 / parallel.expert_parallel
            seconds = seconds + 2 * share * copies * (1 - kept) * _BYTES / self._link(size)
        return seconds

    def _tensor_collectives(self, packing: Packing, count: int) -> Array:
        """Returns the seconds of all-gathers or reduce-scatters of the hidden states; an all-reduce is two."""
        size = self._actor.parallel.tensor_parallel
        if size == 1:
            return np.zeros_like(packing.tokens)
        hidden = self._local(packing.tokens) * self._architecture.hidden * _BYTES * (1 - 1 / size)
        return count * hidden / self._link(size)

    def _pipeline(self, packing: Packing) -> Array:
        """Returns the seconds in which a stage sends hidden states to the next, for all its chunks."""
        parallel = self._actor.parallel
        if parallel.pipeline_parallel == 1:
            return np.zeros_like(packing.tokens)
        split = parallel.tensor_parallel if parallel.sequence_parallel else 1
        sent = self._local(packing.tokens) * self._architecture.hidden * _BYTES / split
        inside = parallel.tensor_parallel * parallel.context_parallel * self._data * parallel.pipeline_parallel
        link = self._device.nvlink if inside <= self._node else self._device.network
        return sent * parallel.virtual_pipeline / (link * self._rates.read("pipeline_network", "communication"))

    def optimizer_step(self) -> tuple[float, float]:
        """Returns the seconds of the optimizer step and of the reduction and gathering that nothing hides."""
        actor, device, parallel = self._actor, self._device, self._actor.parallel
        dense, expert = local_parameters(self._architecture, actor)
        shards = self._data * parallel.context_parallel
        expert_shards = max(
            1, shards * parallel.tensor_parallel // (parallel.expert_parallel * parallel.expert_tensor_size)
        )
        sharded = (dense / shards, expert / expert_shards) if actor.distributed_optimizer else (dense, expert)
        step = sum(sharded) * self._rates.read("optimizer_bytes", "optimizer") / device.memory_bandwidth
        moved = 0.0
        for count, size in ((dense, shards), (expert, expert_shards)):
            if size > 1 and count:
                # float32 gradients are reduced; bfloat16 parameters are gathered, or gradients a second time.
                per_parameter = 4 + (_BYTES if actor.distributed_optimizer else 4)
                moved += (
                    count * per_parameter * (1 - 1 / size) / self._link(size * parallel.tensor_parallel, "gradients")
                )
        if actor.overlap_grad_reduce:
            moved *= self._rates.read("gradient_exposed_overlap", "gradients")
        return step, moved

    def _local(self, values: Array) -> Array:
        """Returns a context-parallel rank's share."""
        return values / self._actor.parallel.context_parallel

    def _product_rate(self) -> float:
        """Returns the FLOP/s of the layers' matrix products."""
        if self._actor.fp8 != "off":
            assert self._device.fp8_flops is not None
            return self._device.fp8_flops * self._rates.read(f"matmul{self._precision}", "products")
        return self._device.bf16_flops * self._rates.read("matmul", "products")

    def _seconds_per_element(self) -> float:
        return _BYTES / (self._device.memory_bandwidth * self._rates.read(f"elementwise_{self._kind}", "elementwise"))

    def _link(self, size: int, purpose: str = "communication") -> float:
        """Returns the bytes per second of a collective over this many consecutive ranks."""
        if size <= self._node:
            return self._device.nvlink * self._rates.read("nvlink", purpose)
        return self._device.network * self._rates.read("network", purpose)


@lru_cache(maxsize=4096)
def _parameters(architecture: Architecture) -> tuple[float, float]:
    """Returns the parameters of an average layer: without experts, and of all its experts."""
    hidden = architecture.hidden
    query, key = architecture.heads * architecture.head_dim, architecture.kv_groups * architecture.head_dim
    dense, experts = 2.0 * hidden * (query + key), 0.0
    share = 0.0
    if (mixture := architecture.mixture) is not None:
        share = sum(mixture.layers) / architecture.layers
        experts = share * 3.0 * hidden * mixture.ffn * mixture.experts
        dense += share * hidden * mixture.experts
    return dense + (1 - share) * 3 * hidden * architecture.ffn, experts


def local_parameters(architecture: Architecture, actor: ActorConfig) -> tuple[float, float]:
    """Returns the parameters of a rank of the largest stage, without and of experts; norms and biases are left out."""
    parallel = actor.parallel
    dense, experts = _parameters(architecture)
    layers = architecture.layers / parallel.pipeline_parallel
    ends = architecture.vocab * architecture.hidden
    if parallel.pipeline_parallel == 1 and not architecture.tied:
        ends *= 2
    return (
        (layers * dense + ends) / parallel.tensor_parallel,
        layers * experts / (parallel.expert_parallel * parallel.expert_tensor_size),
    )
