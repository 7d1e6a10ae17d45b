"""Runs every layout of its world size and writes the distance from the reference of each case.

torchrun --nproc-per-node 2 -m tests.distributed.layout_matrix_worker OUT.json [MUTATION]
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.actor.actor import MegatronActor
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import local_micro_batches
from fipo_megatron.algorithm.future_kl import chunk_carries, gather_over, scan_chunks
from fipo_megatron.config import ActorConfig, Config, OptimizerConfig, ParallelConfig
from fipo_megatron.config.padding import token_multiple
from fipo_megatron.data.packing import plan_micro_batches
from fipo_megatron.weights.architecture import Architecture
from tests.actor import hf_reference
from tests.distributed import layout_cases, mutations

TP2, PP2, CP2 = {"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"context_parallel": 2}
SP, VPP2, CP4 = {"sequence_parallel": True}, {"virtual_pipeline": 2}, {"context_parallel": 4}
EP2 = {"expert_parallel": 2}
DENSE = ("qwen2", "qwen3")
MIXTURE = ("qwen3-moe",)
LOSSES = tuple(layout_cases.TRANSFORMER)

DISTRIBUTED = {"distributed_optimizer": True}
OVERLAPPED = DISTRIBUTED | {"overlap_grad_reduce": True}
BF16 = DISTRIBUTED | {"dtype": "bfloat16"}

# World size -> name of the layout -> (parallel sizes, changes to the actor's settings, architectures).
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]]] = {
    1: {
        "one rank": ({}, {}, (*layout_cases.ARCHITECTURES, *LOSSES)),
        "one rank, distributed optimizer": ({}, DISTRIBUTED, DENSE),
        "one rank, bf16": ({}, BF16, DENSE),
    },
    2: {
        "TP2": (TP2, {}, (*DENSE, "qwen2-tied-yarn")),
        "TP2+SP": (TP2 | SP, {}, DENSE),
        "PP2": (PP2, {}, (*DENSE, "qwen2-tied-yarn")),
        "PP2+VPP2": (PP2 | VPP2, {}, DENSE),
        "CP2": (CP2, {}, (*DENSE, "llama3", *LOSSES)),
        "DP2": ({}, {}, (*DENSE, *LOSSES)),
        "DP2, distributed optimizer": ({}, DISTRIBUTED, DENSE),
        "DP2, distributed optimizer, overlapped": ({}, OVERLAPPED, ("qwen3",)),
        "EP2": (EP2, {}, (*MIXTURE, *LOSSES)),
        "TP2+SP, recompute": (TP2 | SP, {"recompute": "full"}, LOSSES),
        "PP2+VPP2, recompute": (PP2 | VPP2, {"recompute": "selective"}, LOSSES),
        "TP2+SP, bf16": (TP2 | SP, BF16, ("qwen3",)),
        "PP2+VPP2, bf16": (PP2 | VPP2, BF16, ("qwen3",)),
        "CP2, bf16": (CP2, BF16, ("qwen3",)),
        "DP2, bf16": ({}, BF16, ("qwen3",)),
    },
    4: {
        "TP2 CP2": (TP2 | CP2, {}, DENSE),
        "TP2+SP CP2": (TP2 | SP | CP2, {}, (*DENSE, *LOSSES)),
        "TP2 PP2": (TP2 | PP2, {}, DENSE),
        "CP2 PP2": (CP2 | PP2, {}, DENSE),
        "CP2 DP2": (CP2, {}, DENSE),
        "CP2 DP2, distributed optimizer": (CP2, DISTRIBUTED, DENSE),
        "PP2 DP2": (PP2, {}, DENSE),
        "CP4": (CP4, {}, (*DENSE, *LOSSES)),
        "TP2+SP EP2": (TP2 | SP | EP2, {}, LOSSES),
        "TP2+SP PP2": (TP2 | SP | PP2, {}, LOSSES),
    },
}


class Case:
    """One architecture in one layout."""

    def __init__(self, architecture: str, sizes: dict[str, Any], changes: dict[str, Any], kind: str) -> None:
        reference = layout_cases.reference_of(architecture)
        self.name = architecture
        self.expected, self.updated, self.start = reference.expected, reference.updated, reference.start
        self.architecture = Architecture.from_hf(reference.config)
        settings = {
            "parallel": ParallelConfig(**sizes),
            "dtype": "float32",
            "distributed_optimizer": False,
            "vocab_multiple": 8,
            "log_prob_chunk_tokens": 50,
            "optimizer": OptimizerConfig(**layout_cases.OPTIMIZERS[kind]),
            "transformer": layout_cases.TRANSFORMER.get(architecture, {}),
            "megatron_optimizer": {} if kind == "adam" else {"optimizer": "sgd", "sgd_momentum": 0.0},
        }
        actor = ActorConfig(**(settings | changes))
        self.layout = parallel.initialize(actor.parallel, seed=3)
        self.actor = MegatronActor(
            Config(actor=actor, algorithm=layout_cases.ALGORITHM), self.architecture, self.layout, self.load
        )
        multiple = token_multiple(actor)
        padded = [self.layout.context.padded_length(len(t)) for t in self.expected.trajectories]
        self.plan = plan_micro_batches(
            padded,
            [range(len(padded))],
            token_budget=max(112, max(padded)),
            data_parallel_size=self.layout.data_size,
            micro_batch_multiple=actor.parallel.pipeline_parallel,
        )
        members = self.plan[0].micro_batches[self.layout.data_rank]
        self.micros = list(
            local_micro_batches(members, self.expected.trajectories, self.layout, token_multiple=multiple)
        )
        self.members = members
        # The old log-probs of the reference travel as behaviour log-probs, at the predicting positions.
        self.old = [[TokenLogProbs(micro.behaviour_log_probs, None) for micro in self.micros]]

    def load(self, chunks: list[Any]) -> None:
        for chunk in chunks:
            hf_reference.load(chunk, self.start, self.architecture, self.layout)
            for name, parameter in chunk.named_parameters():
                if ".experts." in name:  # Transformer Engine's GroupedLinear does not set it from version 2.13 on
                    del parameter.tensor_model_parallel

    def distance(
        self,
        found: list[tuple[str, torch.Tensor]],
        full: dict[str, torch.Tensor],
        origin: dict[str, torch.Tensor] | None,
    ) -> tuple[float, float]:
        """Returns the relative L2 distance of the worst tensor and of all; with ``origin``, of the changes from it."""
        vocab = self.actor.chunks[0].vocab_size
        wanted = hf_reference.full_tensors(full, self.architecture, vocab)
        start = hf_reference.full_tensors(origin, self.architecture, vocab) if origin else None
        squares = []
        for name, value in found:
            want = hf_reference.shard(name, wanted[name], self.layout).double()
            size = want - hf_reference.shard(name, start[name], self.layout) if start else want
            squares.append((name, float((value - want).square().sum()), float(size.square().sum())))
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, squares)
        totals: dict[str, torch.Tensor] = {}
        for name, error, size in (entry for part in everywhere for entry in part):
            totals[name] = totals.get(name, torch.zeros(2, dtype=torch.float64)) + torch.tensor([error, size])
        worst = max(float((error / size) ** 0.5) for error, size in totals.values())
        error, size = torch.stack(list(totals.values())).sum(0)
        return worst, float((error / size) ** 0.5)

    def named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [
            entry
            for chunk in self.actor.chunks
            for entry in hf_reference.named_parameters(chunk, self.architecture, self.layout)
        ]

    def gather_gradients(self) -> None:
        """Gathers the gradients of which a distributed optimizer leaves each rank only its own part."""
        for wrapped in self.actor.wrapped:
            for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
                for bucket in buffer.buckets:
                    group, data = buffer.data_parallel_group, bucket.grad_data
                    mine = data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(data, mine, group=group)

    def carries(self) -> float:
        """Returns the largest carry over a chunk boundary, at the boundary where it is smallest."""
        if self.layout.context.size == 1:
            return float("inf")
        from megatron.core import parallel_state

        gather = gather_over(parallel_state.get_context_parallel_group())
        largest = torch.zeros(2)
        for micro, rank_log_probs in zip(self.micros, self.current, strict=True):
            shift = torch.where(micro.mask, rank_log_probs - micro.behaviour_log_probs, 0.0)
            _, heads_SK = scan_chunks(shift, micro.shards, layout_cases.ALGORITHM.half_life)
            carries = chunk_carries(gather(heads_SK), micro.shards, layout_cases.ALGORITHM.half_life)
            largest = torch.maximum(largest, carries.abs().amax(0).float())
        if self.layout.context.rank == 0:
            largest = largest[:1]  # nothing follows the last chunk, which the first rank holds
        return float(largest.min())

    def log_prob_error(self) -> float:
        """Returns the largest difference from transformers over the response tokens of this rank."""
        stored = self.actor.log_probs(self.plan, self.expected.trajectories)[0]
        worst = 0.0
        self.current = []
        for members, micro, found in zip(self.members, self.micros, stored, strict=True):
            if found is None:
                continue
            self.current.append(found.log_probs)
            cu_seqlens = micro.packed_seq_params.cu_seqlens_q.numpy()
            want = torch.full((int(cu_seqlens[-1]),), float("nan"), dtype=torch.float64)
            for start, i in zip(cu_seqlens, members, strict=False):
                first = int(start) + len(self.expected.trajectories[i].prompt.tokens) - 1
                want[first : first + len(self.expected.log_probs[i])] = self.expected.log_probs[i]
            local = torch.from_numpy(self.layout.context.slice(want.numpy(), cu_seqlens))
            known = ~local.isnan()
            if self.actor.config.actor.dtype == "bfloat16":
                # The same shifts d as in float32, from this layout's own log-probs: FIPO would sum up the difference
                # of the two precisions over the future of each token.
                old = (found.log_probs - torch.where(known, local - micro.behaviour_log_probs, 0.0)).float()
                self.old[0][len(self.current) - 1] = TokenLogProbs(old, None)
            if known.any():
                worst = max(worst, float((found.log_probs - local)[known].abs().max()))
        return worst


def run_gradient(case: Case, result: dict[str, Any]) -> None:
    actor, expected = case.actor, case.expected
    result["micro_batches"] = len(case.micros) * case.layout.data_size
    result["log_probs"] = over_ranks(case.log_prob_error(), max)
    if case.layout.pipeline_rank == case.layout.pipeline_size - 1:
        result["carry"] = case.carries()
    result["carry"] = over_ranks(result.get("carry", float("inf")), min)
    # The lr = 0 gate with FIPO's own two passes: bit for bit the same on the CPU, in every layout.
    floor = actor.check_noise_floor(case.plan[0], expected.trajectories)
    result["noise_floor"] = [floor.shift, floor.future_kl]
    found = actor.forward_backward(case.plan[0], expected.trajectories, case.old[0])
    result["loss"] = abs(found.loss - expected.loss) / abs(expected.loss)
    result["denominator"] = found.denominator - expected.denominator
    statistics = found.statistics
    # Every rank must know the statistics of all of them.
    tokens = sum(int(t.mask.sum()) for t in expected.trajectories)
    for choose in (min, max):
        assert over_ranks(statistics["tokens"], choose) == tokens, statistics
        assert over_ranks(statistics["sequences"], choose) == len(expected.trajectories), statistics
    result["shift"] = [over_ranks(statistics["shift_abs_max"], choose) for choose in (min, max)]
    result["dropped"] = over_ranks(statistics["dropped_sequences"], min)
    if actor.config.actor.distributed_optimizer:
        case.gather_gradients()
    named = case.named_parameters()
    result["gradient"], _ = case.distance([(n, p.main_grad) for n, p in named], expected.gradients, None)


def run_updates(case: Case, kind: str, result: dict[str, Any]) -> None:
    steps = layout_cases.STEPS[kind]
    metrics = case.actor.update(case.plan * steps, case.expected.trajectories, case.old * steps)
    assert not any(m.skipped for m in metrics)
    result["grad_norm"] = abs(metrics[0].grad_norm - case.expected.grad_norm) / case.expected.grad_norm
    named = [(n, p.detach()) for n, p in case.named_parameters()]
    _, result[f"update_{kind}"] = case.distance(named, case.updated[kind], case.start)


def over_ranks(value: float, choose: Any) -> float:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return choose(values)


def main(out: str, mutation: str | None = None) -> None:
    warnings.simplefilter("ignore")
    world, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    results = []
    for name, (sizes, changes, architectures) in LAYOUTS[world].items():
        for architecture in architectures:
            if mutation and not mutations.applies(mutation, name, architecture):
                continue
            result: dict[str, Any] = {"layout": name, "architecture": architecture}
            # Megatron's distributed optimizer knows Adam only.
            for kind in ("adam",) if mutation or "distributed_optimizer" in changes else ("adam", "sgd"):
                case = Case(architecture, sizes, changes, kind)
                with mutations.applied(mutation, case.actor):
                    if kind == "adam":
                        run_gradient(case, result)
                    run_updates(case, kind, result)
                parallel.destroy()
            results.append(result)
            if first:
                print(result, flush=True)
    if first:
        Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
