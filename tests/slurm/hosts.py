"""A Slurm whose nodes are hosts of their own: each has its network, name and mounts, and may be broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
_NETWORK = """
set -e
mount -t tmpfs tmpfs /run
hostname controller
ip link set lo up
ip link add bridge0 type bridge
ip address add 10.99.0.254/24 dev bridge0
ip link set bridge0 up
cat > "$0" <<END
127.0.0.1 localhost
10.99.0.254 controller
$(for number in $(seq $1); do echo 10.99.0.$number n$number; done)
END
mount --bind "$0" /etc/hosts
for number in $(seq $1); do
  ip netns add n$number
  ip link add port$number type veth peer name eth0 netns n$number
  ip link set port$number master bridge0 up
  ip -n n$number address add 10.99.0.$number/24 dev eth0
  ip -n n$number link set eth0 up
  ip -n n$number link set lo up
done
echo ready
exec sleep infinity
"""
_NODE = 'hostname "$0"; eval "$1"; shift; exec "$@"'


class HostCluster(Cluster):
    """A Slurm of hosts in network namespaces.

    Args:
        directory: Directory for state and logs.
        nodes: Number of nodes.
        broken: Shell commands by node, which run on the host before its daemon; they may change its mounts and network.
        ahead: Seconds that the clocks of tasks are ahead, by node.
    """

    def __init__(self, directory: Path, nodes: int, broken: dict[str, str], ahead: dict[str, int]) -> None:
        super().__init__(directory, nodes)
        self._broken, self._ahead = broken, ahead
        self._holder: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Makes the hosts, and starts their daemons."""
        self.directory.mkdir(exist_ok=True)
        prolog = self.directory / "prolog"
        library = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
        cases = "".join(
            f"  {node}) echo export LD_PRELOAD={library}; echo export FAKETIME=+{seconds}s;;\n"
            for node, seconds in self._ahead.items()
        )
        prolog.write_text(f"#!/bin/sh\ncase $SLURMD_NODENAME in\n{cases}esac\n")
        prolog.chmod(0o755)
        command = ["unshare", "-nmu", "bash", "-c", _NETWORK, str(self.directory / "hosts"), str(len(self.nodes))]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.before = ["nsenter", "--target", str(self._holder.pid), "--net", "--mount", "--uts", f"--wd={ROOT}"]
        super().start()

    def stop(self) -> None:
        """Ends everything, and removes the hosts."""
        super().stop()
        if self._holder:
            self._holder.kill()
            self._holder.communicate()

    def before_daemon(self, name: str) -> list[str]:
        """Returns the program that enters the host of a daemon."""
        if name not in self.nodes:
            return self.before
        host = ["ip", "netns", "exec", name, "unshare", "-mu", "sh", "-c", _NODE, name, self._broken.get(name, "")]
        return [*self.before, *host]

    def addresses(self) -> dict[str, tuple[str, str]]:
        """Returns the host name and the address of the controller and of each node."""
        found = {node: (node, f"10.99.0.{number}") for number, node in enumerate(self.nodes, 1)}
        return {"": ("controller", "10.99.0.254")} | found

    def ports(self) -> list[int]:
        """Returns Slurm's usual ports."""
        return [6817, *[6818] * len(self.nodes)]

    def more_configuration(self) -> str:
        """Returns the task prolog, and ports of srun that a firewall can let through."""
        return f"TaskProlog={self.directory}/prolog\nSrunPortRange=61001-62000"


if __name__ == "__main__":
    cluster = HostCluster(Path(sys.argv[1]).resolve(), 3, {}, {"n2": 90})
    try:
        cluster.start()
        cluster.environment["PS1"] = "> "
        subprocess.run([*cluster.before, "bash"], env=cluster.environment, check=False)
    finally:
        cluster.stop()
