"""Loads, exports and saves Hugging Face weights under one layout after the other, on several ranks.

Each layout loads the Hugging Face files and the Megatron checkpoint that the previous one saved. Both must equal, bit
for bit, what transformers saved first.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fipo_megatron.actor import parallel
from fipo_megatron.actor.hf_weights import export_hf, load_hf, save_hf
from fipo_megatron.actor.sharded_checkpoint import load_weights, save_weights
from tests.actor import hf_reference
from tests.distributed import layout_cases, layout_matrix_worker
from tests.distributed.layout_matrix_worker import EP2, MIXTURE, PP2, SP, TP2, VPP2, over_ranks

ALL_DENSE = tuple(name for name in layout_cases.ARCHITECTURES if name not in MIXTURE)
UNEVEN = {"transformer": {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}}
ETP2 = {"expert_tensor_parallel": 2}
GATHERS_UNEVENLY = "TP2+SP EP2 ETP2"

# World size -> name of the layout -> (parallel sizes, changes to the actor's settings, architectures).
LAYOUTS: dict[int, dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]]] = {
    2: {
        "TP2": (TP2, {}, ALL_DENSE),
        "TP2+SP": (TP2 | SP, {}, (*ALL_DENSE, *MIXTURE)),
        "PP2": (PP2, {}, (*ALL_DENSE, *MIXTURE)),
        "PP2, 3 and 1 layers": (PP2, UNEVEN, ("qwen2-tied-yarn",)),
        "PP2+VPP2": (PP2 | VPP2, {}, ALL_DENSE),
        "DP2": ({}, {}, ("qwen3",)),
        "EP2": (EP2, {}, MIXTURE),
    },
    4: {
        "TP2 PP2": (TP2 | PP2, {}, ALL_DENSE),
        "TP2+SP PP2+VPP2": (TP2 | SP | PP2 | VPP2, {}, ("qwen2-tied-yarn",)),
        "TP2+SP EP2": (TP2 | SP | EP2, {}, MIXTURE),
        GATHERS_UNEVENLY: (TP2 | SP | EP2 | ETP2, {}, MIXTURE),
        "PP2 EP2": (PP2 | EP2, {}, MIXTURE),
    },
}


class Case(layout_matrix_worker.Case):
    """One architecture in one layout, loaded from a directory."""

    path: Path

    def load(self, chunks: list[Any]) -> None:
        forget(chunks)
        load_hf(chunks, self.architecture, self.layout, self.path)

    def load_checkpoint(self, path: Path) -> None:
        forget(self.actor.chunks)
        load_weights(self.actor.chunks, self.architecture, self.layout, path)


def forget(chunks: list[Any]) -> None:
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)


def on_disk(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def check_loaded(case: Case) -> None:
    full = hf_reference.full_tensors(case.start, case.architecture, case.actor.chunks[0].vocab_size)
    named = case.named_parameters()
    assert len(named) >= 7
    for name, parameter in named:
        assert torch.equal(parameter, hf_reference.shard(name, full[name], case.layout)), name


def check_export(case: Case, original: dict[str, torch.Tensor], bucket_bytes: int, on_ranks: list[int] | None) -> int:
    """Checks that a rank sees each name of its stage once, with tensors only where asked, and no name is missing."""
    names, count = [], 0
    mine = on_ranks is None or case.layout.rank in on_ranks
    stream = export_hf(case.actor.chunks, case.architecture, case.layout, bucket_bytes=bucket_bytes, on_ranks=on_ranks)
    for bucket in stream:
        count += 1
        for name, tensor in bucket:
            names.append(name)
            assert (tensor is not None) == mine, name
            assert tensor is None or torch.equal(tensor, original[name]), name
    assert len(names) == len({*names})
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (case.layout.pipeline_rank, names))
    by_stage = dict(everywhere)
    assert all(by_stage[stage] == found for stage, found in everywhere), "ranks of a stage saw different streams"
    together = [name for found in by_stage.values() for name in found]
    assert sorted(together) == sorted(original)
    return count


def check_save(case: Case, original: dict[str, torch.Tensor], target: Path) -> None:
    save_hf(
        case.actor.chunks,
        case.architecture,
        case.layout,
        case.path,
        target,
        max_file_bytes=100_000,
        bucket_bytes=50_000,
    )
    found = on_disk(target)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in original)
    where = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert where.keys() == original.keys()
    assert len({*where.values()}) > 2


def check_failed_save(case: Case, target: Path) -> str:
    """Limits the file size on the last rank: all ranks raise, continue together, and no file is left."""
    last, limits = dist.get_world_size() - 1, resource.getrlimit(resource.RLIMIT_FSIZE)
    if case.layout.rank == last:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    writes = case.layout.rank == last
    with pytest.raises(OSError if writes else RuntimeError, match="File too large") as raised:
        save_hf(case.actor.chunks, case.architecture, case.layout, case.path, target, bucket_bytes=10_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert writes or re.search(rf"rank {last} on \S+: OSError", str(raised.value))
    dist.barrier()
    left = [path.name for path in target.parent.iterdir() if target.name in path.name]
    dist.barrier()
    assert not left, left
    return str(raised.value)


def check_checkpoint(case: Case, source: Path, target: Path) -> int:
    """Loads the previous layout's checkpoint, saves it again and loads that; returns the number of loads."""
    count = 0
    for path in (source, target):
        if path == target:
            save_weights(case.actor.chunks, case.layout, case.path, target)
        if path.exists() or path == target:
            case.load_checkpoint(path)
            check_loaded(case)
            count += 1
    return count


def check_failed_checkpoint(case: Case, target: Path) -> list[str]:
    """Limits the file size on the first or the last rank, at the first file or later: all ranks raise."""
    messages = []
    last, limits = dist.get_world_size() - 1, resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for rank, limit in ((0, 100), (0, 30_000), (last, 30_000)):
        writes = case.layout.rank == rank
        if writes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        with pytest.raises(Exception, match=r"File too large|failed on other ranks") as raised:
            save_weights(case.actor.chunks, case.layout, case.path, target)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        messages.append(str(raised.value))
        dist.barrier()
        left = [path.name for path in target.parent.iterdir() if target.name in path.name]
        dist.barrier()
        assert not left, left
    return messages


def run(name: str, sizes: dict[str, Any], changes: dict[str, Any], architecture: str, root: Path) -> dict[str, Any]:
    original = on_disk(root / architecture / "0")
    source = max(root.glob(f"{architecture}/*"), key=lambda path: int(path.name))
    Case.path = source
    case = Case(architecture, sizes, changes, "adam")
    check_loaded(case)
    result: dict[str, Any] = {"layout": name, "architecture": architecture}
    last = dist.get_world_size() - 1
    result["buckets"] = [
        check_export(case, original, bucket_bytes, on_ranks)
        for bucket_bytes in (1, 40_000, 1 << 30)
        for on_ranks in (None, [0, last])
    ]
    target = source.with_name(str(int(source.name) + 1))
    check_save(case, original, target)
    result["checkpoints"] = check_checkpoint(case, source / "megatron", target / "megatron")
    if name == "PP2":
        result["failure"] = check_failed_save(case, root / architecture / "failed")
        result["failures"] = check_failed_checkpoint(case, root / architecture / "failed")
    # Expert tensor parallelism gathers different numbers of tokens from its ranks, which gloo refuses.
    if name != GATHERS_UNEVENLY:
        result["log_probs"] = over_ranks(case.log_prob_error(), max)
    parallel.destroy()
    return result


def main(out: str, directory: str) -> None:
    warnings.simplefilter("ignore")
    root, first = Path(directory), os.environ["RANK"] == "0"
    results = []
    for name, (sizes, changes, architectures) in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        for architecture in architectures:
            results.append(run(name, sizes, changes, architecture, root))
            if first:
                print(results[-1], flush=True)
    if first:
        Path(out).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
