"""Directories appear complete or not at all."""

import pytest

from fipo_megatron.storage import publishing
from fipo_megatron.storage.atomic import partial_of


def test_directory_is_renamed_when_complete(tmp_path):
    target = tmp_path / "target"
    publishing.begin(target)
    partial = partial_of(target)
    (partial / "of another run").touch()
    with pytest.raises(
        FileExistsError, match=r"\.target\.partial: another run is writing target; if that run was killed"
    ):
        publishing.begin(target)
    assert [path.name for path in partial.iterdir()] == ["of another run"]
    (partial / "of another run").unlink()
    (partial / "inner").mkdir()
    (partial / "inner" / "file").write_text("1")
    assert not target.exists()
    publishing.publish(target)
    assert not partial.exists()
    assert (target / "inner" / "file").read_text() == "1"


def test_what_has_the_name_keeps_it(tmp_path):
    target = tmp_path / "target"
    publishing.begin(target)
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(FileExistsError, match="it is not overwritten"):
        publishing.publish(target)
    publishing.discard(target)
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "precious"]


def test_beginning_says_what_is_wrong(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="it is not overwritten"):
        publishing.begin(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match="no: is not a directory; new cannot be written there"):
        publishing.begin(tmp_path / "no" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "no")
    with pytest.raises(FileExistsError, match="nowhere: exists"):
        publishing.refuse_existing(tmp_path / "nowhere")
