"""The facts that a node reports. They hold no judgement: the checks read them on node 0."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import TypeAdapter


@dataclass(frozen=True)
class GpuFacts:
    """The GPUs of a node.

    Attributes:
        names: Product name of each GPU that the driver lists.
        driver: Version of the driver; empty without one.
        usable: Number of GPUs that torch can use.
        memory: Bytes of memory of each GPU that the driver lists.
        given: Number of GPUs that Slurm gives to the node; None without Slurm's variable.
        errors: Memory errors that need a reset or a repair, a sentence each.
        problem: Why the driver could not be asked; empty if it answered, or if there is none.
        kernel_log: Xid errors of the hardware in the kernel log, a sentence each; None if the log cannot be read.
        kernel_log_problem: Why the kernel log cannot be read.
    """

    names: tuple[str, ...] = ()
    driver: str = ""
    usable: int = 0
    memory: tuple[int, ...] = ()
    given: int | None = None
    errors: tuple[str, ...] = ()
    problem: str = ""
    kernel_log: tuple[str, ...] | None = ()
    kernel_log_problem: str = ""


@dataclass(frozen=True)
class InputFact:
    """A file or directory that the run reads.

    Attributes:
        field: Field of the configuration with its value.
        size: Total size in bytes.
        digest: Checksum of the names and sizes of its files.
        problem: Why it cannot be read; empty if it can.
    """

    field: str
    size: int = 0
    digest: str = ""
    problem: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """The facts about a node that it found itself.

    Attributes:
        rank: Rank of the node.
        name: Name of the node for Slurm; the host's name without Slurm.
        host: The host's own name.
        greeter_port: Port at which it answers its neighbours; 0 if there is none.
        config_problem: Why the configuration cannot be used here.
        serves: Whether the node runs servers alone, and no ranks of the trainer.
        gpus: Its GPUs.
        versions: Versions of installed packages.
        server_versions: Versions in SGLang's environment; empty if the run starts no servers on this node.
        server_problem: Why SGLang's environment cannot be used, or its NCCL not be joined to the trainer's.
        name_problem: Why other nodes cannot use the host's name.
        output_file: File that the node wrote for its neighbours; empty if it could not.
        output_problem: Why the output directory cannot be written.
        inputs: Model and data; on a node that serves, the model alone.
        free_bytes: Free space of the file system of the output directory; None if unknown.
        needed_bytes: Size of the checkpoints that the run will have to write there; None if unknown.
        ports: Ports that the run needs on this node, and their state.
        port_problems: Ports that are taken, a sentence each.
    """

    rank: int
    name: str
    host: str
    greeter_port: int = 0
    config_problem: str = ""
    serves: bool = False
    gpus: GpuFacts = field(default_factory=GpuFacts)
    versions: dict[str, str] = field(default_factory=dict)
    server_versions: dict[str, str] = field(default_factory=dict)
    server_problem: str = ""
    name_problem: str = ""
    output_file: str = ""
    output_problem: str = ""
    inputs: tuple[InputFact, ...] = ()
    free_bytes: int | None = None
    needed_bytes: int | None = None
    ports: tuple[str, ...] = ()
    port_problems: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """Returns all values as JSON."""
        return _NODE.dump_json(self)

    @classmethod
    def from_json(cls, content: bytes) -> NodeFacts:
        """Reads what :meth:`to_json` wrote."""
        return _NODE.validate_json(content)


@dataclass(frozen=True)
class NeighbourFacts:
    """The findings of a node about the others, by rank.

    Attributes:
        unresolved: Why the host's name of a node could not be resolved.
        unreachable: Why no connection to a node could be made.
        invisible: Why the file of a node in the output directory could not be read.
        clock_ahead: Seconds that this node's clock is ahead of node 0's; None if not measured.
        clock_error: Largest error of this difference: half of the round trip, in seconds.
    """

    unresolved: dict[int, str] = field(default_factory=dict)
    unreachable: dict[int, str] = field(default_factory=dict)
    invisible: dict[int, str] = field(default_factory=dict)
    clock_ahead: float | None = None
    clock_error: float = 0.0

    def to_json(self) -> bytes:
        """Returns all values as JSON."""
        return _NEIGHBOURS.dump_json(self)

    @classmethod
    def from_json(cls, content: bytes) -> NeighbourFacts:
        """Reads what :meth:`to_json` wrote."""
        return _NEIGHBOURS.validate_json(content)


@dataclass(frozen=True)
class AllReduceFacts:
    """Bus bandwidths in GB/s that a node measured.

    Attributes:
        everywhere: All GPUs of the job; None if not measured.
        own: The GPUs of this node alone; None if not measured.
        pairs: This node together with one other, by rank of the other.
        problem: Why the measurement failed here.
    """

    everywhere: float | None = None
    own: float | None = None
    pairs: dict[int, float] = field(default_factory=dict)
    problem: str = ""

    def to_json(self) -> bytes:
        """Returns all values as JSON."""
        return _ALL_REDUCE.dump_json(self)

    @classmethod
    def from_json(cls, content: bytes) -> AllReduceFacts:
        """Reads what :meth:`to_json` wrote."""
        return _ALL_REDUCE.validate_json(content)


_NODE = TypeAdapter(NodeFacts)
_NEIGHBOURS = TypeAdapter(NeighbourFacts)
_ALL_REDUCE = TypeAdapter(AllReduceFacts)
