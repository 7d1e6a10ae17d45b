"""Jobs of the shipped scripts: submitted as a user does, watched by their files, and disturbed."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.runs import arguments
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
STEPS = 16
SETTINGS = (
    *(f"run.steps={STEPS}", "checkpoint.save_every=1", "rollout.silence_seconds=20", "observe.tensorboard=false"),
    *("reward.verifier=python:tests.slurm.verifiers.by_chance_unless_held", "reward.verifier_seconds=200"),
)
PATIENCE = 400.0


def _command(pid):
    with suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


@dataclass(eq=False)
class Job:
    """A job of a cluster.

    Attributes:
        cluster: The cluster.
        number: Its number.
        directory: Directory of its output.
    """

    cluster: Cluster
    number: str
    directory: Path

    @classmethod
    def submit(cls, cluster, directory, script, *arguments, options=(), components=((),)):
        """Submits a script; ``components`` are the options of each component of a heterogeneous job."""
        directory.mkdir(exist_ok=True)
        given = [f"--output={directory}/job.log", *options]
        for number, more in enumerate(components):
            given += [":"] * bool(number) + list(more)
        said = cluster.run("sbatch", "--parsable", *given, str(SCRIPTS / script), *map(str, arguments), cwd=ROOT).stdout
        return cls(cluster, said.strip(), directory)

    @classmethod
    def train(cls, cluster, data, directory, *overrides, options=()):
        """Submits a run with the embedded engine on two nodes with a rank each."""
        given = arguments(data, directory / "run", *SETTINGS, *overrides)
        return cls.submit(cluster, directory, "colocated.sbatch", *given, options=["--nodes=2", *options])

    @contextmanager
    def held(self):
        """Opens a block in which no step ends."""
        file = Path(self.cluster.environment["HOME"], "hold")
        file.touch()
        try:
            yield
        finally:
            file.unlink()

    @property
    def run(self) -> Path:
        """Output directory of the run."""
        return self.directory / "run"

    @property
    def log(self) -> str:
        """Output of the script, of all starts."""
        with suppress(OSError):
            return (self.directory / "job.log").read_text()
        return ""

    @property
    def starts(self) -> int:
        """Number of starts."""
        with suppress(OSError):
            return len((self.run / "slurm" / "starts").read_text().splitlines())
        return 0

    @property
    def logs(self) -> Path:
        """Directory of the logs of the last start."""
        return self.run / "slurm" / f"{self.number}-{self.starts - 1}"

    def rows(self, name: str = "metrics.jsonl") -> list[dict]:
        """Returns the rows of a file of the run."""
        with suppress(OSError):
            return [json.loads(line) for line in (self.run / name).read_text().splitlines()]
        return []

    def state(self) -> str:
        """Returns the state of the job, such as RUNNING."""
        said = self.cluster.run("scontrol", "show", "job", self.number, check=False).stdout
        return said.partition("JobState=")[2].partition(" ")[0]

    def nodes(self, component: int = 0) -> list[str]:
        """Returns the nodes of a component."""
        said = self.cluster.run("scontrol", "show", "job", str(int(self.number) + component)).stdout
        names = said.partition(" NodeList=")[2].split()[0]
        return self.cluster.run("scontrol", "show", "hostnames", names).stdout.split()

    def wait_for(self, condition, what: str, seconds: float = PATIENCE) -> None:
        """Waits for a condition; an end of the job before it is a failure."""
        end = time.monotonic() + seconds
        while not condition():
            ended = self.state() in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
            assert (not ended and time.monotonic() < end) or condition(), (
                f"no {what}: {self.state()}\n{self.all_logs()}"
            )
            time.sleep(0.1)

    def wait_for_end_of_processes(self) -> None:
        """Waits until no process of any job is left on any node; Slurm itself may need some seconds to end the last."""
        end = time.monotonic() + 60
        while left := self.cluster.processes(of_jobs=True):
            commands = [_command(pid) for pid in left]
            assert time.monotonic() < end, commands
            time.sleep(0.2)

    def wait_for_step(self, start: int) -> None:
        """Waits until the start with this number, counted from 1, has finished a step for the first time."""

        def finished():
            lines = (self.run / "slurm" / "starts").read_text().splitlines() if self.starts else []
            return len(lines) == start and len(self.rows()) > int(lines[-1].split()[1])

        self.wait_for(finished, f"new step in start {start}")

    def wait(self, code: str = "COMPLETED") -> None:
        """Waits for the end of the job, and checks its state."""
        self.wait_for(lambda: self.state() == code, code)

    def rank(self, rank: int) -> int:
        """Returns the process of a rank of the trainer."""
        found = []
        for path in Path("/proc").iterdir():
            with suppress(OSError):
                environment = (path / "environ").read_bytes().split(b"\0") if path.name.isdigit() else []
                if {f"SLURM_JOB_ID={self.number}".encode(), f"SLURM_PROCID={rank}".encode()} <= {*environment} and (
                    b"fipo_megatron.train" in (path / "cmdline").read_bytes()
                ):
                    found.append(int(path.name))
        parents = {int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1]) for pid in found}
        (process,) = [pid for pid in found if pid not in parents or len(found) == 1]
        return process

    def processes(self) -> set[int]:
        """Returns the processes of the job on all nodes, without Slurm's own."""
        mark, found = f"SLURM_JOB_ID={self.number}".encode(), set()
        for pid in self.cluster.processes(of_jobs=True):
            with suppress(OSError):
                if mark in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
                    found.add(pid)
        return found

    def kill_rank(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank."""
        os.kill(self.rank(rank), number)

    def step(self) -> str:
        """Returns the name of the trainer's step."""
        said = self.cluster.run("squeue", "--steps", "--noheader", f"--jobs={self.number}", "--format=%i %j").stdout
        names = [line.split()[0] for line in said.splitlines()]
        return next(name for name in names if name.rpartition(".")[2].isdigit())

    def all_logs(self) -> str:
        """Returns the logs of the script and of all ranks and engines."""
        files = sorted((self.run / "slurm").glob("*/*.log"))
        texts = [f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files]
        return "\n".join([self.log, *texts])
