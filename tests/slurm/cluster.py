"""A Slurm of several nodes on this host, with directories, ports and a munge key of its own. Needs root.

``python -m tests.slurm.cluster DIRECTORY`` starts one and keeps it until Ctrl-C, to try a script by hand.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
_START_SECONDS = 60.0


def missing_programs() -> list[str]:
    """Returns the programs that this host lacks."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """A Slurm with its own controller, nodes and munge.

    Args:
        directory: Directory for state and logs.
        nodes: Number of nodes ``n1``, ``n2`` and so on.
        cpus: Processors that Slurm assigns per node; more than the host has is fine.

    Attributes:
        environment: Environment in which Slurm's commands find this cluster.
        before: Program and arguments that start every command of Slurm, which follows.
    """

    def __init__(self, directory: Path, nodes: int = 4, cpus: int = 8) -> None:
        self.directory, self.nodes, self.cpus = directory, [f"n{n + 1}" for n in range(nodes)], cpus
        # The path of a socket may have 107 bytes.
        self._sockets = Path(tempfile.mkdtemp(prefix="fipo-slurm-"))
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.before: list[str] = []
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            if name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        """Starts munge, the controller and the nodes, and waits until the nodes are idle."""
        for name in ("state", "spool", "logs"):
            (self.directory / name).mkdir(parents=True)
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (self.directory / "slurm.conf").write_text(self._configuration())
        (self.directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        options = [f"--{name}-file={self.directory}/munge.{name}" for name in ("pid", "seed", "log")]
        self._start(
            "munged",
            *("--foreground", "--force", f"--socket={self._sockets}/munge", f"--key-file={key}", *options),
        )
        self._wait_for(lambda: (self._sockets / "munge").exists(), "munge")
        self._start("slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        self._wait_for(lambda: self.idle_nodes() == set(self.nodes), "idle nodes")

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self._start(node, "-D", "-N", node, program="slurmd")

    def kill_node(self, node: str) -> None:
        """Kills the daemon of a node with SIGKILL, as when its host dies; its processes stay."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def idle_nodes(self) -> set[str]:
        """Returns the nodes on which a job could start."""
        said = self.run("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).stdout.split("\n")
        return {name for name, state in (line.split() for line in said if line) if state == "idle"}

    def run(self, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess[str]:
        """Runs a command of Slurm and returns what it printed."""
        done = subprocess.run(
            [*self.before, *command],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def stop(self) -> None:
        """Cancels all jobs and ends everything that was started."""
        with suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", check=False)
            end = time.monotonic() + 30
            while time.monotonic() < end and self.run("squeue", "--noheader", check=False).stdout:
                time.sleep(0.2)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait()
        for pid in self.processes():  # of a node whose daemon was killed
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._sockets, ignore_errors=True)

    def processes(self, *, of_jobs: bool = False) -> list[int]:
        """Returns the processes that belong to this cluster, by their environment; without its daemons and this one.

        Args:
            of_jobs: Without Slurm's own processes.
        """
        mark, found = f"SLURM_CONF={self.directory}/slurm.conf\0".encode(), []
        daemons = {daemon.pid for daemon in self._daemons.values()} | {os.getpid()}
        for path in Path("/proc").iterdir():
            if not path.name.isdigit() or int(path.name) in daemons:
                continue
            with suppress(OSError):
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                command = (path / "cmdline").read_bytes()
                slurms = re.match(rb"(\S*/)?(slurmstepd|slurmd|slurmctld)", command)
                if mark in (path / "environ").read_bytes() and state != "Z" and not (of_jobs and slurms):
                    found.append(int(path.name))
        return found

    def _start(self, name: str, *arguments: str, program: str | None = None) -> None:
        found = _program(program or name)
        assert found is not None, name
        with (self.directory / "logs" / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [*self.before_daemon(name), found, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def before_daemon(self, name: str) -> list[str]:
        """Returns the program and arguments that start a daemon, which follows."""
        return self.before

    def addresses(self) -> dict[str, tuple[str, str]]:
        """Returns the host name and the address of the controller (``""``) and of each node."""
        return dict.fromkeys(["", *self.nodes], (socket.gethostname().partition(".")[0], "127.0.0.1"))

    def ports(self) -> list[int]:
        """Returns the ports of the controller and of each node."""
        return _free_ports(1 + len(self.nodes))

    def _wait_for(self, condition, what: str) -> None:
        end = time.monotonic() + _START_SECONDS
        while not condition():
            assert time.monotonic() < end, f"no {what}: {self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """Returns the end of what the daemons logged."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in self.directory.glob("logs/*")
        )

    def _configuration(self) -> str:
        addresses = self.addresses()
        controller, *ports = self.ports()
        # Ranks derive their port from the number of the job, and each worker of pytest has a cluster.
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        first_job = 1 + 1000 * secrets.randbelow(9) + 100 * worker
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs={self.cpus}"
            for (name, (host, address)), port in zip(list(addresses.items())[1:], ports, strict=True)
        )
        return f"""ClusterName=fipo
SlurmctldHost={"{}({})".format(*addresses[""])}
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self._sockets}/munge,cred_expire=5
StateSaveLocation={self.directory}/state
SlurmdSpoolDir={self.directory}/spool/%n
SlurmctldPidFile={self.directory}/slurmctld.pid
SlurmdPidFile={self.directory}/slurmd-%n.pid
SlurmctldLogFile={self.directory}/logs/controller.log
SlurmdLogFile={self.directory}/logs/node-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=1,sched_min_interval=100000
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=10
InactiveLimit=0
MinJobAge=86400
SlurmdTimeout=10
MessageTimeout=10
BatchStartTimeout=30
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
FirstJobId={first_job}
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes={",".join(self.nodes)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO GraceTime=120
PartitionName=urgent Nodes={",".join(self.nodes)} MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{self.more_configuration()}
"""

    def more_configuration(self) -> str:
        """Returns further lines of slurm.conf."""
        return ""


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).resolve())
    try:
        cluster.start()
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()
