"""Rows that cannot be used are moved beside their file with one warning; the rest is used."""

import json

import pytest

from fipo_megatron.storage.json_lines import cut_rows, make_directory, parse_row, read_rows

GOOD = [b'{"step": 0, "x": "\xc3\xbc\xe2\x80\xa8"}', b'{"step": 1, "x": 1}', b'{"step": 2, "x": 2}']


def write(file, *rows, end=b"\n"):
    file.write_bytes(b"\n".join(rows) + end)
    return file


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"step": 1, "x": "\xff"}', "is not UTF-8"),
        (b'{"step": 1, "x": ', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b'{"stfp": 1}', "has no integer step"),
        (b'{"step": "1"}', "has no integer step"),
        (b'{"step": true}', "has no integer step"),
        (b'{"step": 1.0}', "has no integer step"),
        (b'{"step": -1}', "has no integer step"),
        (b'{"step": 1, "odd": 1}', "is odd"),
    ],
)
def test_a_bad_row_is_set_aside_and_the_rest_is_used(row, reason, tmp_path, caplog):
    file = write(tmp_path / "f.jsonl", GOOD[0], row, GOOD[2])

    def check(values):
        return "is odd" if "odd" in values else ""

    with pytest.raises(ValueError, match=reason):
        parse_row(row, check)
    assert [values["step"] for values in read_rows(file, check)] == [0, 2]
    assert cut_rows(file, 9, check=check) == [0, 2]
    assert file.read_bytes() == GOOD[0] + b"\n" + GOOD[2] + b"\n"
    assert (tmp_path / "damaged-f.jsonl-0").read_bytes() == row + b"\n"
    (record,) = caplog.records
    assert f"{file}: row 2 {reason}; set aside in damaged-f.jsonl-0" in record.getMessage()
    cut_rows(file, 9, check=check)
    assert len(caplog.records) == 1


def test_a_whole_file_of_garbage_gives_one_warning(tmp_path, caplog):
    file = write(tmp_path / "f.jsonl", *[b"\x00" * 9] * 50)
    assert cut_rows(file, 5) == []
    assert file.read_bytes() == b""
    (record,) = caplog.records
    assert "row 3 is not JSON, and 47 more" in record.getMessage()
    assert len((tmp_path / "damaged-f.jsonl-0").read_bytes()) == 500


def test_rows_of_later_steps_are_removed_without_a_warning(tmp_path, caplog):
    file = write(tmp_path / "f.jsonl", *GOOD, b'{"step": 2, "hal', end=b"")
    assert cut_rows(file, 2) == [0, 1]
    assert not caplog.records
    assert [path.name for path in tmp_path.iterdir()] == ["f.jsonl"]


def test_half_a_row_of_an_earlier_step_is_set_aside(tmp_path, caplog):
    file = write(tmp_path / "f.jsonl", GOOD[0], GOOD[1][:-4], end=b"")
    assert cut_rows(file, 2) == [0]
    assert "row 2 is not JSON" in caplog.text


def test_a_whole_last_row_without_its_end_is_kept(tmp_path):
    file = write(tmp_path / "f.jsonl", *GOOD, end=b"")
    assert cut_rows(file, 9) == [0, 1, 2]
    assert file.read_bytes().endswith(GOOD[2] + b"\n")


def test_where_each_step_has_one_row_a_second_one_is_set_aside(tmp_path, caplog):
    rows = [json.dumps({"step": step}).encode() for step in (0, 1, 1, 0, 9, 2)]
    file = write(tmp_path / "f.jsonl", *rows)
    assert cut_rows(file, 5) == [0, 1, 1, 0, 2]
    write(file, *rows)
    assert cut_rows(file, 5, increasing=True) == [0, 1, 2]
    assert "row 3 has step 1 after step 1, row 4 has step 0 after step 1; set aside" in caplog.text


def test_an_undamaged_file_is_not_written_again(tmp_path):
    file = write(tmp_path / "f.jsonl", *GOOD)
    before = file.stat().st_ino
    assert cut_rows(file, 3) == [0, 1, 2]
    assert file.stat().st_ino == before
    assert cut_rows(tmp_path / "none.jsonl", 3) == []


def test_other_things_under_the_name_are_set_aside(tmp_path, caplog):
    (tmp_path / "f.jsonl").mkdir()
    (tmp_path / "g.jsonl").symlink_to("nowhere")
    (tmp_path / "folder").write_text("mine")
    assert cut_rows(tmp_path / "f.jsonl", 3) == cut_rows(tmp_path / "g.jsonl", 3) == []
    make_directory(tmp_path / "folder")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["damaged-f.jsonl-0", "damaged-folder-0", "damaged-g.jsonl-0", "folder"]
    assert len(caplog.records) == 3
