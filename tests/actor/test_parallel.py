"""Environments of the launchers, and layouts that do not fit the world size."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from fipo_megatron.actor import parallel
from fipo_megatron.actor.launch import Launch, first_host
from fipo_megatron.actor.parallel import check_world_size
from fipo_megatron.config import ParallelConfig
from tests.distributed.launch import torchrun
from tests.processes import ROOT

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "gpu-[003-007,9],login1",
    "SLURM_JOB_ID": "4123456",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node[003-007,9],gpu1", "node003"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]node[04,7]", "rack1node04"),
        ("gpu-[12]-ib", "gpu-12-ib"),
        ("", ""),
    ],
)
def test_first_host(node_list, host):
    assert first_host(node_list) == host


def test_launchers():
    assert Launch.from_environment({}) == Launch(0, 1, 0, "", 0)
    assert Launch.from_environment(SLURM) == Launch(5, 16, 1, "gpu-003", 23456)
    assert Launch.from_environment(SLURM | {"MASTER_ADDR": "x", "MASTER_PORT": "7"}) == Launch(5, 16, 1, "x", 7)
    assert Launch.from_environment(SLURM | {"SLURM_STEP_NODELIST": "gpu-[005-007]"}).address == "gpu-005"
    assert Launch.from_environment(SLURM | TORCHRUN) == Launch(3, 8, 3, "head", 29500)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "7"},
    ],
    ids=["no tasks", "script of sbatch", "srun -n 1", "salloc on a login node"],
)
def test_single_processes_in_slurm(environment):
    assert Launch.from_environment(environment) == Launch()


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["script of sbatch", "interactive step"])
def test_a_job_of_several_tasks_needs_srun(step):
    """The other tasks do not run, so the process would wait for them in vain."""
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "a", **step}
    with pytest.raises(ValueError, match=r"SLURM_NTASKS = 16: .* start the ranks with srun or torchrun, or unset"):
        Launch.from_environment(job)


@pytest.mark.parametrize(
    ("environment", "parent", "seconds"),
    [
        ({}, [], None),
        ({"TORCHELASTIC_RUN_ID": "none"}, [], 30),
        ({"TORCHELASTIC_RUN_ID": "none", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, [], 90),
        ({"TORCHELASTIC_RUN_ID": "none"}, ["--shutdown-timeout", "600"], 600),
        ({"TORCHELASTIC_RUN_ID": "none"}, ["--shutdown_timeout=700"], 700),
    ],
)
def test_the_time_that_torchrun_leaves_its_workers(environment, parent, seconds):
    """The parent is a process with the options of torchrun."""
    ask = "import os; from fipo_megatron.actor.launch import shutdown_seconds; print(shutdown_seconds(os.environ))"
    start = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[-1]]))"
    clean = {name: value for name, value in os.environ.items() if "SHUTDOWN_TIMEOUT" not in name}
    done = subprocess.run(
        [sys.executable, "-c", start, *parent, ask],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(None if seconds is None else float(seconds))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR: missing"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT: expected a number"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE: expected a number in the environment, got 'many'"),
        (SLURM | {"SLURM_LOCALID": "²"}, "SLURM_LOCALID: expected a number in the environment, got '²'"),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, "LOCAL_RANK: expected a number .*, got None"),
        (TORCHRUN | {"RANK": "x"}, "RANK: expected a number in the environment, got 'x'"),
        (TORCHRUN | {"RANK": "8"}, "RANK = 8: must be below WORLD_SIZE = 8"),
        (TORCHRUN | {"LOCAL_RANK": "9"}, "LOCAL_RANK = 9: must be below WORLD_SIZE = 8"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT = 0: must be from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT = 99999: must be from 1 to 65535"),
    ],
)
def test_incomplete_environment(environment, message):
    with pytest.raises(ValueError, match=message):
        Launch.from_environment(environment)


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (
            {"tensor_parallel": 2, "pipeline_parallel": 2, "context_parallel": 2},
            12,
            "tensor_parallel = 2 × pipeline_parallel = 2 × context_parallel = 2 needs a multiple of 8 ranks, there are",
        ),
        ({"expert_parallel": 4}, 6, "expert_parallel = 4: .* must divide the 6 ranks of a pipeline stage"),
        ({"expert_parallel": 2, "expert_tensor_parallel": 2}, 2, "expert_tensor_parallel = 2 must divide the 2 ranks"),
        (
            {"sequence_parallel": True},
            1,
            "actor.parallel.sequence_parallel = True: needs actor.parallel.tensor_parallel of at least 2",
        ),
        (
            {"virtual_pipeline": 2},
            1,
            "actor.parallel.virtual_pipeline = 2: must be 1 without actor.parallel.pipeline_parallel",
        ),
    ],
)
def test_layouts_that_do_not_fit(layout, world_size, message):
    with pytest.raises(ValueError, match=message):
        check_world_size(ParallelConfig(**layout), world_size)


def test_nothing_is_started_for_a_layout_that_does_not_fit():
    with pytest.raises(ValueError, match="context_parallel = 2 needs a multiple of 2 ranks, there are 1"):
        parallel.initialize(ParallelConfig(context_parallel=2), seed=0, environment={})
    assert not dist.is_initialized()


def test_one_rank_alone_again_and_again():
    drawn = []
    for _ in range(2):
        layout = parallel.initialize(ParallelConfig(), seed=3, environment={})
        assert (layout.rank, layout.world_size, layout.data_size, layout.context.size) == (0, 1, 1, 1)
        assert (layout.pipeline_rank, layout.pipeline_size) == (0, 1)
        with pytest.raises(RuntimeError, match=r"call destroy\(\) first"):
            parallel.initialize(ParallelConfig(), seed=3, environment={})
        drawn.append(torch.rand(4))
        parallel.destroy()
        parallel.destroy()
    assert torch.equal(*drawn)


@pytest.mark.distributed
def test_layouts_follow_each_other_in_one_job():
    assert "4 layouts" in torchrun("tests.distributed.layouts", 2)
