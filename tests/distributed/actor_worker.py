"""Actor behaviour that needs several ranks: steps that all ranks skip together, and empty micro-batches."""

from __future__ import annotations

import math
import os
import warnings

import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.actor.log_probs import TokenLogProbs
from fipo_megatron.actor.micro_batches import local_micro_batches
from fipo_megatron.data.packing import plan_micro_batches
from tests.distributed import layout_cases
from tests.distributed.layout_matrix_worker import CP2, DISTRIBUTED, EP2, PP2, TP2, VPP2, Case

LAYOUTS = {
    "DP2": ({}, {}),
    "DP2, distributed optimizer": ({}, DISTRIBUTED),
    "TP2": (TP2, {}),
    "PP2+VPP2": (PP2 | VPP2, {}),
    "CP2": (CP2, {}),
}


def check_all_skip_together(case: Case) -> None:
    """Gives one rank an infinite gradient: no rank changes a weight, all report the reason, the next step works."""
    actor, trajectories = case.actor, case.expected.trajectories
    before = [p.detach().clone() for p in actor.parameters()]
    hook = None
    if case.layout.rank == 1:
        experts = [p for name, p in case.named_parameters() if "experts" in name]
        hook = (experts or actor.parameters())[2].register_hook(lambda gradient: gradient * math.inf)
    (metrics,) = actor.update(case.plan, trajectories, case.old)
    assert metrics.skipped == "non-finite gradient", metrics
    assert actor.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, actor.parameters(), strict=True))
    if hook is not None:
        hook.remove()
    (metrics,) = actor.update(case.plan, trajectories, case.old)
    assert not metrics.skipped
    assert abs(metrics.grad_norm - case.expected.grad_norm) < 1e-4 * case.expected.grad_norm


def check_fillers(case: Case, members: list[int]) -> None:
    """Trains on fewer trajectories than ranks or pipeline slots: fillers change neither loss nor gradient."""
    model = layout_cases.build_transformers_model(case.name)
    trajectories = case.expected.trajectories
    loss, _ = layout_cases.backward(model, [trajectories[i] for i in members])
    norm = float(torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt())
    plan = plan_micro_batches(
        [case.layout.context.padded_length(len(t)) for t in trajectories],
        [members],
        token_budget=128,
        data_parallel_size=case.layout.data_size,
        micro_batch_multiple=case.layout.pipeline_size,
    )
    everyone = [micro_batch for rank in plan[0].micro_batches for micro_batch in rank]
    if case.layout.data_size * case.layout.pipeline_size > 1:
        assert () in everyone, everyone
    micros = local_micro_batches(plan[0].micro_batches[case.layout.data_rank], trajectories, case.layout)
    old = [[TokenLogProbs(micro.behaviour_log_probs, None) for micro in micros]]
    (metrics,) = case.actor.update(plan, trajectories, old)
    assert abs(metrics.loss - loss) < 1e-5 * abs(loss), (metrics.loss, loss)
    assert abs(metrics.grad_norm - norm) < 1e-5 * norm, (metrics.grad_norm, norm)


def main() -> None:
    warnings.simplefilter("ignore")
    for name, (sizes, changes) in LAYOUTS.items():
        for check in (check_all_skip_together, lambda case: check_fillers(case, [0])):
            case = Case("qwen3", sizes, changes, "adam")
            check(case)
            parallel.destroy()
        if os.environ["RANK"] == "0":
            print(name, flush=True)
    check_all_skip_together(Case("qwen3-moe", EP2, {}, "adam"))
    parallel.destroy()
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
