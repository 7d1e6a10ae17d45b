"""A job over trainer and rollout nodes, each a host of its own in a network namespace, most of them broken."""

import importlib.metadata
from pathlib import Path

import pytest

from tests.preflight.nodes import write_inputs
from tests.preflight.test_broken_nodes import needs_faketime, needs_networks
from tests.slurm.conftest import prepared
from tests.slurm.hosts import HostCluster
from tests.slurm.jobs import ROOT, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

READ_ONLY = "mount --bind {0} {0} && mount -o remount,bind,ro {0}"
OTHER_VERSION = "mount --bind {0} {1}"
# What a firewall does that lets only the ports of Slurm and of the reports through.
CLOSED = "ip rule add ipproto tcp sport 32768-60999 dport 32768-60999 prohibit"


@pytest.fixture
def hosts(tmp_path_factory):
    """Five hosts: the second cannot write, the third has another package, the fourth's clock is wrong, the last's ports
    are closed."""
    directory = tmp_path_factory.mktemp("hosts")
    for name in ("inputs", "inputs/logs"):
        (directory / name).mkdir()
    write_inputs(directory / "inputs")
    installed = Path(str(importlib.metadata.distribution("transformers").locate_file(""))).resolve()
    (metadata,) = installed.glob("transformers-*.dist-info")
    other = directory / "METADATA"
    other.write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    broken = {
        "n2": READ_ONLY.format(directory / "inputs" / "shared"),
        "n3": OTHER_VERSION.format(other, metadata / "METADATA"),
        "n5": CLOSED,
    }
    found = prepared(HostCluster(directory / "slurm", 5, broken, {"n4": 90}), tmp_path_factory)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@needs_faketime
@needs_networks
def test_each_broken_host_is_named_and_the_job_does_not_start(hosts, tmp_path_factory):
    """The job asks for other nodes; there are none, so that it waits."""
    directory = hosts.directory.parent / "inputs"
    given = [
        *(directory / "config.yaml", "rollout.engine=sglang", "rollout.servers.interface=eth0"),
        f"rollout.servers.python={ROOT}/.venv-sglang/bin/python",
    ]
    components = (["--nodes=3", "--nodelist=n[1-3]"], ["--nodes=2"])
    options = ["--export=ALL,FIPO_PREFLIGHT=replace"]
    job = Job.submit(hosts, directory / "logs", "disaggregated.sbatch", *given, options=options, components=components)
    job.wait_for(lambda: "is requeued on other nodes than n2,n3,n4,n5" in job.log, "requeue")
    version = importlib.metadata.version("transformers")
    said = [line for line in job.log.splitlines() if line[:4] in ("n2: ", "n3: ", "n4: ", "n5: ")]
    assert said[:2] == [
        f"n2: output: run.output: {directory}/shared/run: cannot be written: Read-only file system; every node must "
        "write there",
        f"n3: torch: transformers is 4.0.0; must be {version}, as on n1",
    ]
    assert said[2].startswith("n4: clock: its clock is ")
    assert said[2].endswith("s ahead of the others; at most 1 s are allowed (--max-clock-skew)")
    assert said[3].startswith("n5: connections: cannot connect to n1: port ")
    assert len(said) == 4
    assert "preflight: 1 of 5 nodes are good; bad: n2,n3,n4,n5" in job.log
    table = {line.split()[0]: line.split()[1] for line in job.log.splitlines() if line[:3] in ("n1 ", "n4 ", "n5 ")}
    assert table == {"n1": "trainer", "n4": "servers", "n5": "servers"}
    excluded = [_field(hosts, int(job.number) + number, "ExcNodeList") for number in (0, 1)]
    assert excluded == ["n2,n3,n4,n5"] * 2
    job.wait_for(lambda: job.state() == "PENDING", "end of the first start")
    hosts.run("scancel", job.number)
    assert not list((directory / "shared").rglob("rank-*.log"))
    assert not list((directory / "shared").rglob("engine-*.log"))


def _field(cluster, job, name):
    return cluster.run("scontrol", "show", "job", str(job)).stdout.partition(f" {name}=")[2].split()[0]
