"""Checks that a configuration fits the nodes of a job, on the login node: no torch, no GPU, no model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fipo_megatron.config import Config
from fipo_megatron.config.checks import layout_conflicts


@dataclass(frozen=True)
class JobNodes:
    """The nodes of a job and their use.

    Attributes:
        trainer: Nodes with ranks of the trainer.
        rollout: Nodes with servers alone.
        gpus: GPUs of a node; 0 on CPU.
        ranks: Ranks on each trainer node.
    """

    trainer: int
    rollout: int
    gpus: int
    ranks: int

    @property
    def world_size(self) -> int:
        """Number of the trainer's ranks."""
        return self.trainer * self.ranks


def servers_per_node(config: Config, gpus: int) -> int:
    """Returns the servers of a rollout node: as many as its GPUs have room for; without GPUs ``per_host``."""
    return gpus // _gpus_of_server(config) if gpus else config.rollout.servers.per_host


def rollout_node_problem(config: Config) -> str | None:
    """Returns why a job cannot have rollout nodes with this configuration; None if it can."""
    rollout = config.rollout
    if config.algorithm.kind == "sft" or config.run.replay:
        return "algorithm.kind = sft and run.replay sample nothing: the job must have no rollout nodes"
    if rollout.engine != "sglang":
        return f"rollout.engine = {rollout.engine}: must be sglang on rollout nodes"
    if rollout.servers.colocated:
        return "rollout.servers.colocated = True: must be false on rollout nodes"
    if rollout.servers.urls:
        return "rollout.servers.urls: must be empty with rollout nodes, whose servers the job finds by itself"
    return None


def job_problems(config: Config, nodes: JobNodes) -> list[str]:
    """Lists every reason why a training job cannot run on its nodes, one line each."""
    problems = layout_conflicts(config.actor.parallel, nodes.world_size)
    if nodes.rollout:
        problems += filter(None, [rollout_node_problem(config)])
        size = _gpus_of_server(config)
        if nodes.gpus % size:
            problems.append(f"rollout.sglang.tp_size = {size}: must divide the {nodes.gpus} GPUs of a node")
    elif _servers_lack_gpus(config, nodes):
        problems.append(
            f"rollout.engine = sglang: the trainer's ranks use all {nodes.gpus} GPUs of a node; give --rollout-nodes, "
            "fewer --ranks-per-node, or rollout.servers.colocated = true"
        )
    return problems


def missing_files(config: Config) -> list[str]:
    """Lists the inputs of the configuration that do not exist here, one line each."""
    problems = []
    if not (Path(config.model.path) / "config.json").is_file():
        problems.append(f"model.path = {config.model.path}: has no config.json here")
    for key, files in (("data.files", config.data.files), ("evaluation.files", config.evaluation.files)):
        problems += [f"{key} = {file}: does not exist here" for file in files if not Path(file).exists()]
    return problems


def describe(config: Config, nodes: JobNodes) -> str:
    """Returns the nodes and ranks of a training job in one line."""
    parallel = config.actor.parallel
    sizes = {
        "tensor": parallel.tensor_parallel,
        "pipeline": parallel.pipeline_parallel,
        "context": parallel.context_parallel,
    }
    model = sizes["tensor"] * sizes["pipeline"] * sizes["context"]
    split = " × ".join(f"{name} {size}" for name, size in (sizes | {"data": nodes.world_size // model}).items())
    text = f"{nodes.trainer} trainer nodes with {nodes.ranks} ranks each: {split}"
    if nodes.rollout:
        each = servers_per_node(config, nodes.gpus)
        text += f"; {nodes.rollout} rollout nodes with {each} servers each"
        text += f" of {_gpus_of_server(config)} GPUs" if nodes.gpus else ""
    return text


def _gpus_of_server(config: Config) -> int:
    given: dict[str, Any] = config.rollout.sglang
    return int(given.get("tp_size", 1)) * int(given.get("gpu_id_step", 1))


def _servers_lack_gpus(config: Config, nodes: JobNodes) -> bool:
    rollout = config.rollout
    starts_servers = rollout.engine == "sglang" and not rollout.servers.urls and not rollout.servers.colocated
    samples = config.algorithm.kind != "sft" and not config.run.replay
    return bool(starts_servers and samples and nodes.gpus and nodes.ranks >= nodes.gpus)
