"""Preflights over several real processes, some of which are broken on purpose."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.preflight.nodes import Node, free_port, run_nodes, write_inputs

pytestmark = pytest.mark.processes

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
"""Makes the directory $0 read-only for one process; the permissions of a directory do not stop root."""

PRIVATE = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
"""Puts an empty file system of its own in place of the directory $0."""


def works(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not works("unshare", "-rm", "true"), reason="no mount namespaces here")
needs_faketime = pytest.mark.skipif(not works("faketime", "now", "true"), reason="faketime is not installed")
needs_networks = pytest.mark.skipif(
    not (works("unshare", "-rnm", "true") and shutil.which("ip")), reason="no network namespaces here"
)


def test_good_nodes(tmp_path):
    config = write_inputs(tmp_path)
    files = ("--json", str(tmp_path / "result.json"), "--exclude-file", str(tmp_path / "bad"))
    ended = run_nodes(config, *files, nodes=[Node(0), Node(1)], count=2, master_port=free_port())
    assert [(one.returncode, one.stderr) for one in ended.values()] == [(0, ""), (0, "")]
    table = ended[0].stdout
    assert table.splitlines()[-1] == "preflight: 2 of 2 nodes are good"
    assert table.split()[:2] == ["node", "report"]
    assert ended[1].stdout == ""
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["bad"] == []
    assert [node["name"] for node in result["nodes"]] == ["n1", "n2"]
    assert all(node["all_reduce"]["everywhere"] > 0 for node in result["nodes"])
    assert all(abs(node["neighbours"]["clock_ahead"]) < 1 for node in result["nodes"])
    assert (tmp_path / "bad").read_text() == "\n"
    assert list((tmp_path / "shared").iterdir()) == []


@needs_mounts
@needs_faketime
def test_each_broken_node_is_named(tmp_path):
    """Of seven nodes, the second and third are good; each of the others has faults of its own."""
    config = write_inputs(tmp_path)
    other = tmp_path / "other" / "transformers-4.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    path = {"PYTHONPATH": os.pathsep.join([str(other.parent), str(Path(__file__).parents[2])])}
    nodes = [
        Node(0),  # whose master port is taken, below
        Node(1),
        Node(2),
        Node(3, before=["unshare", "-rm", "sh", "-c", READ_ONLY, str(tmp_path / "shared")], environment=path),
        Node(4, before=["faketime", "-m", "-f", "+90s"]),
        Node(5, before=["unshare", "-rm", "sh", "-c", PRIVATE, str(tmp_path / "shared")]),
    ]
    files = ("--json", str(tmp_path / "result.json"), "--exclude-file", str(tmp_path / "bad"), "--timeout", "20")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_nodes(config, *files, nodes=nodes, count=7, master_port=port)
    assert {rank: one.returncode for rank, one in ended.items()} == dict.fromkeys(range(6), 1), ended
    assert (tmp_path / "bad").read_text() == "n1,n4,n5,n6,n7\n"
    lines = ended[0].stdout.splitlines()
    assert lines[-1] == "preflight: 2 of 7 nodes are good; bad: n1,n4,n5,n6,n7"
    said = [line for line in lines if line.startswith("n") and ": " in line]
    versions = json.loads((tmp_path / "result.json").read_text())["nodes"][0]["facts"]["versions"]
    assert said[:3] == [
        f"n1: ports: MASTER_PORT = {port}: is in use; it must be free for rank 0, set another one on all nodes",
        f"n4: output: run.output: {tmp_path}/shared: cannot be written: Read-only file system; every node must write "
        "there",
        f"n4: torch: transformers is 4.0.0; must be {versions['transformers']}, as on n1",
    ]
    assert said[3].startswith("n5: clock: its clock is ")
    assert 89 < float(said[3].split()[5]) < 91
    assert said[3].endswith("s ahead of the others; at most 1 s are allowed (--max-clock-skew)")
    assert said[4].startswith(f"n6: shared: does not see the file of n1: {tmp_path}/shared/.fipo-preflight-")
    assert said[4].endswith("; run.output must be on a file system that all nodes share")
    assert said[5:] == ["n7: report: has not started; must report within 20 s (--timeout)"]


NETWORK = """
set -e
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add bridge0 type bridge
ip link set bridge0 up
for number in 1 2 3; do
  ip netns add n$number
  ip link add port$number type veth peer name eth0 netns n$number
  ip link set port$number master bridge0 up
  ip -n n$number address add 10.99.0.$number/24 dev eth0
  ip -n n$number link set eth0 up
  ip -n n$number link set lo up
done
# What a firewall does that lets the port of the reports through and no other: the second node's own ports, and those
# of others, are from this range.
ip -n n2 rule add ipproto tcp sport 32768-60999 dport 32768-60999 prohibit
exec "$@"
"""
NODE = """
hostname "$0"
printf '127.0.0.1 localhost\\n10.99.0.1 n1\\n10.99.0.2 n2\\n10.99.0.3 n3\\n' > /tmp/hosts.$$
mount --bind /tmp/hosts.$$ /etc/hosts && rm /tmp/hosts.$$
exec "$@"
"""


@needs_networks
def test_a_node_with_closed_ports_is_named(tmp_path):
    """Three hosts with addresses and names of their own, in network namespaces."""
    config = write_inputs(tmp_path)
    program = (
        "import pathlib, sys; from tests.preflight.nodes import Node, run_nodes\n"
        f"space = lambda n: ['ip', 'netns', 'exec', n, 'unshare', '-mu', 'sh', '-c', {NODE!r}, n]\n"
        f"ended = run_nodes(pathlib.Path({str(config)!r}), '--exclude-file', {str(tmp_path / 'bad')!r}, count=3,\n"
        "    nodes=[Node(rank, space(f'n{rank + 1}')) for rank in range(3)], master_port=29500, address='10.99.0.1')\n"
        "print(ended[0].stdout, *(one.stderr for one in ended.values()), [one.returncode for one in ended.values()])"
    )
    command = ["unshare", "-rnm", "bash", "-c", NETWORK, "network", os.sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert lines[-1] == "[1, 1, 1]"
    assert "preflight: 2 of 3 nodes are good; bad: n2" in lines, done.stdout
    (said,) = [line for line in lines if line.startswith("n2: ")]
    assert said.startswith("n2: connections: cannot connect to n1: port ")
    assert said.endswith("NCCL, gloo and servers need the ports between the nodes open")
    assert (tmp_path / "bad").read_text() == "n2\n"
