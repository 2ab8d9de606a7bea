"""Folders written whole, and room on the disk."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from utils.folders import check_disk, whole_folder


def listing(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def test_whole_folder_replaces_all_or_nothing(tmp_path):
    folder = tmp_path / "deep" / "result"
    with whole_folder(folder) as partial:
        (partial / "a.txt").write_text("old")
        assert not folder.exists()
    assert listing(tmp_path) == {"deep/result/a.txt": "old"}

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), whole_folder(folder) as partial:
            (partial / "a.txt").write_text("half")
            raise error
        assert listing(tmp_path) == {"deep/result/a.txt": "old"}
        assert [path.name for path in folder.parent.iterdir()] == ["result"]

    (folder.parent / "result.tmp").mkdir()  # what a killed run leaves
    (folder.parent / "result.tmp" / "stale.txt").write_text("stale")
    with whole_folder(folder) as partial:
        (partial / "b.txt").write_text("new")
        assert listing(folder) == {"a.txt": "old"}
    assert listing(tmp_path) == {"deep/result/b.txt": "new"}


def test_check_disk(tmp_path, monkeypatch):
    asked = []

    def disk_usage(path):
        asked.append(path)
        return namedtuple("usage", "total used free")(10e9, 7e9, 3e9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = tmp_path / "not" / "yet"
    check_disk(folder, 3_000_000_000, "the model")
    assert asked == [tmp_path]  # the nearest folder that exists is on the same disk
    with pytest.raises(ValueError, match=r"yet: the model takes 3\.1 GB but only 3\.0 GB are free; make room"):
        check_disk(folder, 3_100_000_000, "the model")
    monkeypatch.chdir(tmp_path)
    check_disk(Path("relative/folder"), 1, "the model")
