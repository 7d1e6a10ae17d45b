"""Prompts that processes of a host share: read once, mapped by all, and read anew if the reader fails or is killed."""

import multiprocessing
import os
import signal
import tempfile

import numpy as np
import pytest

from fipo_megatron.data.prompt_table import PromptTable, record_batch
from fipo_megatron.data.prompts import DataError
from fipo_megatron.data.shared_prompts import shared_prompts
from fipo_megatron.data.trajectory import Prompt

PROMPTS = [Prompt(f"p:{n}", np.arange(1, 2 + n % 7), str(n), "data") for n in range(10_000)]
SERVER = multiprocessing.get_context("forkserver")


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def files(tmp_path):
    return sorted(path.name for path in tmp_path.glob("fipo_megatron-*/*"))


def batches(kind="good", begun=None):
    """Yields the prompts in two batches; on the way it fails, or ends its process."""
    if begun is not None:
        begun.send(os.getpid())
    yield record_batch(PROMPTS[:5000])
    if kind == "bad":
        raise DataError("row 7: prompt: is bad")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    yield record_batch(PROMPTS[5000:])


def child(directory, kind, begun, result):
    tempfile.tempdir = directory
    try:
        table = shared_prompts("key", lambda: batches(kind, begun))
        result.send((len(table), [p.tokens.tolist() for p in table[4998:5002]], _mapped()))
    except DataError as error:
        result.send(str(error))
    signal.pause()


def _mapped():
    """Returns the lines of this process's mappings of a shared file."""
    with open("/proc/self/maps") as maps:
        return sum("/fipo_megatron-" in line for line in maps)


def start(kinds):
    """Starts a process per kind; returns them, the pids of those that read, and their results."""
    begun, begins = SERVER.Pipe(duplex=False)
    results = []
    processes = []
    for kind in kinds:
        receiver, sender = SERVER.Pipe(duplex=False)
        processes.append(SERVER.Process(target=child, args=(tempfile.gettempdir(), kind, begins, sender), daemon=True))
        processes[-1].start()
        results.append(receiver)
        sender.close()
    return processes, begun, results


def end(processes):
    for process in processes:
        process.kill()
        process.join()


def test_a_table_is_a_sequence_of_prompts():
    table = PromptTable([record_batch(PROMPTS[:3]), record_batch([]), record_batch(PROMPTS[3:5])])
    assert len(table) == 5
    assert [p.id for p in table] == [f"p:{n}" for n in range(5)]
    assert table[-1].id == "p:4"
    assert [p.ground_truth for p in table[1:4]] == ["1", "2", "3"]
    assert (table[2].tokens.dtype, table[2].tokens.tolist(), table[2].data_source) == (np.int32, [1, 2, 3], "data")
    assert list(table.column("id")) == [p.id for p in table]
    with pytest.raises(IndexError, match="there are 5 prompts"):
        table[5]
    assert len(PromptTable(())) == 0


def test_one_process_reads_and_all_map_its_file(tmp_path):
    processes, begun, results = start(["good"] * 3)
    try:
        expected = [p.tokens.tolist() for p in PROMPTS[4998:5002]]
        for result in results:
            count, tokens, mapped = result.recv()
            assert (count, tokens) == (len(PROMPTS), expected)
            assert mapped
        readers = [begun.recv()]
        assert not begun.poll(0)
        assert readers[0] in [process.pid for process in processes]
        assert len(files(tmp_path)) == 1
    finally:
        end(processes)
    assert len(files(tmp_path)) == 1  # all were killed
    shared_prompts("another key", batches)
    assert len(files(tmp_path)) == 1  # that of the killed ones is gone


def test_processes_that_wait_raise_the_error_of_the_one_that_reads(tmp_path):
    processes, _, results = start(["bad"] * 3)
    try:
        assert [result.recv() for result in results] == ["row 7: prompt: is bad"] * 3
    finally:
        end(processes)
    assert files(tmp_path) == []
    assert len(shared_prompts("key", batches)) == len(PROMPTS)


def test_a_reader_that_is_killed_is_replaced(tmp_path):
    processes, begun, results = start(["killed"])
    try:
        begun.recv()
        processes[0].join()
        assert len(files(tmp_path)) == 1
        more, _, results = start(["good"])
        processes += more
        assert results[0].recv()[0] == len(PROMPTS)
    finally:
        end(processes)


def test_a_directory_that_others_can_write_to_is_not_used(tmp_path):
    (tmp_path / f"fipo_megatron-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"fipo_megatron-{os.getuid()}").chmod(0o777)
    with pytest.raises(PermissionError, match="must be a directory of this user alone"):
        shared_prompts("key", batches)
