"""What is kept of responses: right and wrong ones, rotated, bounded, cut back on resume."""

import json

import numpy as np

from fipo_megatron.actor.update_metrics import TokenPart
from fipo_megatron.data.group_record import GroupRecord
from fipo_megatron.data.trajectory import Prompt, TokenSpan, Trajectory
from fipo_megatron.observe.trajectory_files import TrajectoryFiles, choose, row_of, token_columns


def record(prompt, accuracies):
    count = len(accuracies)
    return GroupRecord(prompt, 0, tuple(range(count)), 3, (5,) * count, (1.0,) * count, tuple(accuracies), 0)


def trajectory(tokens=(5, 6, 7, 8)):
    return Trajectory(
        prompt=Prompt("p", np.array([1, 2, 3]), "42", "sums"),
        sample=1,
        tokens=np.array(tokens),
        behaviour_log_probs=np.full(len(tokens), -0.123456789),
        mask=np.ones(len(tokens), bool),
        spans=(TokenSpan(0, 6), TokenSpan(3, 7)),
        reward=-1.0,
        accuracy=0,
        advantage=-0.5,
    )


def decode(tokens):
    return "".join(chr(96 + token) for token in tokens)


def test_a_right_and_a_wrong_one_of_spread_groups():
    records = [record(f"p{n}", [0, 1, 1]) for n in (3, 1, 0, 2)]
    assert choose(records, 4) == ["p0/1", "p0/0", "p2/1", "p2/0"]
    assert choose(records, 1) == ["p0/1"]
    assert choose(reversed(records), 4) == choose(records, 4), "however they came"
    assert choose([record("a", [1, 1])], 4) == ["a/0"]
    assert choose([], 4) == []


def test_a_row():
    row = row_of(trajectory(), 7, 2, decode)
    assert row == {
        "step": 7,
        "prompt_id": "p",
        "sample": 1,
        "data_source": "sums",
        "prompt": "abc",
        "response": "efgh",
        "ground_truth": "42",
        "reward": -1.0,
        "accuracy": 0,
        "advantage": -0.5,
        "finish_reason": "stop",
        "response_tokens": 4,
        "versions": [[6, 3], [7, 1]],
        "mini_batch": 2,
    }


def test_tokens_of_several_ranks_are_put_together():
    parts = [
        TokenPart(np.array([3, 0]), {"shift": np.array([0.5, 0.25], np.float32)}),
        TokenPart(np.array([1]), {"shift": np.array([-0.125], np.float32)}),
    ]
    columns = token_columns(trajectory(), parts, decode)
    assert columns["text"] == ["e", "f", "g", "h"]
    assert columns["shift"] == [0.25, -0.125, None, 0.5]
    assert columns["behaviour_log_prob"] == [-0.123457] * 4


def test_files_are_rotated_and_bounded(tmp_path):
    files = TrajectoryFiles(tmp_path / "t", file_bytes=2000, total_bytes=6000)
    for step in range(100):
        files.append(step, [{"step": step, "response": "x" * 200}] * 2)
    found = files.files()
    assert 1 < len(found) <= 4
    assert sum(file.stat().st_size for file in found) <= 6000
    steps = [json.loads(line)["step"] for file in found for line in file.read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 99
    assert all(int(file.stem[5:]) == json.loads(file.read_text().splitlines()[0])["step"] for file in found)


def test_resumed_files_are_those_of_an_uninterrupted_run(tmp_path):
    def write(directory, steps, cut=None):
        files = TrajectoryFiles(directory, file_bytes=500, total_bytes=1 << 20)
        for step in steps:
            files.append(step, [{"step": step, "response": "ü\u2028" * 20}])
        if cut is not None:
            with files.files()[-1].open("a") as file:
                file.write('{"step": 12, "resp')
            files.cut(cut)

    write(tmp_path / "whole", range(14))
    write(tmp_path / "killed", range(12), cut=7)
    write(tmp_path / "killed", range(7, 14))
    whole, killed = (sorted((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert [file.name for file in whole] == [file.name for file in killed]
    assert [file.read_bytes() for file in whole] == [file.read_bytes() for file in killed]
