"""One process writes into an output directory; its lock ends with it."""

import os
import signal
import time

import pytest

from fipo_megatron.storage.output_directory import output_problems
from fipo_megatron.storage.output_lock import FILE, OutputInUseError, lock_output


def test_a_second_holder_is_refused_and_the_first_is_named(tmp_path):
    with lock_output(tmp_path / "run"):
        named = rf"run: process {os.getpid()} on \S+ is writing into it"
        with pytest.raises(OutputInUseError, match=named), lock_output(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / FILE).exists()
    assert not (tmp_path / "run" / FILE).exists()
    with lock_output(tmp_path / "run"):
        pass


def test_the_lock_dies_with_its_process(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_output(tmp_path):
            os.write(writer, b"held")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reader, 4) == b"held"
        with pytest.raises(OutputInUseError, match=f"process {child} on"), lock_output(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / FILE).exists()
    assert output_problems(tmp_path, "never") == [], "the lock file of a killed run is no run"
    with lock_output(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"host": 1}', b'{"pid": "x", "host": 1}'])
def test_a_holder_whose_name_cannot_be_read(content, tmp_path):
    with lock_output(tmp_path):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(OutputInUseError, match="another process is writing"), lock_output(tmp_path):
            pass


def test_other_things_under_the_name_are_set_aside(tmp_path):
    (tmp_path / FILE).symlink_to("nowhere")
    with lock_output(tmp_path):
        assert (tmp_path / FILE).is_file()
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / FILE).mkdir()
    with lock_output(tmp_path):
        assert (tmp_path / FILE).is_file()


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock_output(tmp_path):
        assert "cannot be locked (No locks available): start no second run on it" in caplog.text
