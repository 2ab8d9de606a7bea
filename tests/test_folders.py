"""Folders and files written whole, killed at every moment; locks; what is the user's; room on the disks."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils import folders
from utils.folders import (
    check_disk,
    check_disks,
    check_name,
    check_target,
    locked,
    read_json,
    remove_folder,
    scratch_folder,
    tidy,
    whole_file,
    whole_folder,
    write_json,
    write_text,
    written_by,
)

ROOT = Path(__file__).parents[1]
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open", "chmod")  # of os, by which folders change


def listing(folder: Path) -> dict[str, str]:
    """Every file under `folder` but the records, hidden ones too."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != folders.RECORD)
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def visible(folder: Path) -> dict[str, str]:
    return {name: text for name, text in listing(folder).items() if not name.startswith(folders.PREFIX)}


def write(folder: Path, version: dict[str, str], owner: str = "") -> None:
    with whole_folder(folder, owner) as part:
        for name, text in version.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(text)


@pytest.fixture
def quick_disk(monkeypatch):
    """Nothing is really brought to the disk, which would take most of the time; the call is still one of CALLS."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def killed_at(number: int, work) -> bool:
    """Do `work` in a process that ends, as by kill -9, just before its `number`-th call of one of CALLS."""
    if (child := os.fork()) == 0:
        left = number

        def counted(call):
            def counting(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os._exit(9)
                return call(*args, **kwargs)

            return counting

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


OLD = {"config.json": "old", "model.bin": "old", "samples/a.png": "old", "gone/b.png": "old", "notes.json": "old"}
NEW = {"config.json": "new", "model.bin": "new", "samples/c.png": "new", "metrics.json": "new"}


# ----------------------------------------------------------------------------------------------------- whole folders


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

    with whole_folder(folder) as partial:
        (partial / "b.txt").write_text("new")
        assert listing(folder)["a.txt"] == "old"
    assert listing(tmp_path) == {"deep/result/b.txt": "new"}


@pytest.mark.parametrize("before", [{}, OLD])
def test_killed_at_any_moment_one_whole_version_is_found(before, tmp_path, quick_disk):
    """Then the next call finds nothing in its way and leaves nothing behind."""
    folder, moments = tmp_path / "run" / "model", 0
    while True:
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir()
        if before:
            write(folder, before)
        killed = killed_at(moments, lambda: write(folder, NEW))
        moments += 1
        if (folder / "config.json").exists():  # it looks like a model, also to those who do not ask tidy
            assert visible(folder) in (before, NEW)
        tidy(folder)
        assert visible(folder) in (before, NEW)
        write(folder, NEW)
        assert listing(folder.parent) == {f"model/{name}": text for name, text in NEW.items()}
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
        if not killed:
            break
    assert moments > 20


def test_killed_while_removing_nothing_half_is_left_under_the_name(tmp_path, quick_disk):
    folder, moments = tmp_path / "checkpoint-1", 0
    write(folder, OLD, "run")
    while killed_at(moments, lambda: remove_folder(folder, "run")):
        moments += 1
        if folder.exists():
            assert visible(folder) == OLD
        else:
            tidy(tmp_path)
            assert list(tmp_path.iterdir()) == []
            write(folder, OLD, "run")
    assert moments > 5 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "there already", "."])
def test_a_link_and_a_folder_that_cannot_be_moved_are_written_to_from_within(kind, tmp_path, monkeypatch):
    place = tmp_path / "disk"
    place.mkdir()
    folder = tmp_path / "out" if kind == "link" else place if kind == "there already" else Path(".")
    if kind == "link":
        folder.symlink_to(place)
    if kind == ".":
        monkeypatch.chdir(place)
    inode = place.stat().st_ino
    tmp_path.chmod(0o555)  # as beside a mount point, where others may be at home
    try:
        for version in (OLD, NEW):
            with whole_folder(folder) as part:
                assert part.parent == place
                for name, text in version.items():
                    (part / name).parent.mkdir(exist_ok=True)
                    (part / name).write_text(text)
            assert listing(place) == version
    finally:
        tmp_path.chmod(0o755)
    assert place.stat().st_ino == inode and (kind != "link" or folder.is_symlink())


@pytest.mark.parametrize("name", ["thesis.tex", "chapter/1.tex", ".hidden", "config.json"])
def test_what_is_the_users_is_left_alone(name, tmp_path):
    folder = tmp_path / "flux"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    for temporary in ("flux.tmp", ".flux.tmp"):  # names that look like somebody's temporary ones
        (tmp_path / temporary).mkdir()
        (tmp_path / temporary / "b").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=f"flux: holds {name}, which is not this program's; move it"):
        write(folder, NEW)
    with pytest.raises(ValueError, match="is not this program's"):
        remove_folder(folder)
    assert listing(tmp_path) == before
    write(tmp_path / "other", NEW)
    (tmp_path / "other" / name).unlink(missing_ok=True)
    (tmp_path / "other" / name).parent.mkdir(exist_ok=True)
    if name != "config.json":  # which is the program's there
        (tmp_path / "other" / name).write_text("mine")
        with pytest.raises(ValueError, match=f"other: holds {name}"):
            write(tmp_path / "other", NEW)


def test_what_the_user_adds_meanwhile_is_left_alone(tmp_path):
    folder = tmp_path / "flux"
    with pytest.raises(ValueError, match="flux: holds thesis.tex"), whole_folder(folder) as part:
        (part / "model").write_text("new")
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    assert listing(tmp_path) == {"flux/thesis.tex": "mine"}


def test_another_owners_folder_is_not_replaced(tmp_path):
    folder = tmp_path / "model"
    write(folder, OLD, "train.py, run a")
    assert written_by(folder) == "train.py, run a" and written_by(tmp_path) is None
    with pytest.raises(ValueError, match="model: was written by train.py, run a; move it or choose another"):
        check_target(folder, "train.py, run b")
    write(folder, NEW, "train.py, run a")
    assert listing(folder) == NEW
    (folder / folders.RECORD).write_text('{"owner":')  # damaged: then nothing is known to be ours
    with pytest.raises(ValueError, match="is not this program's"):
        check_target(folder, "train.py, run a")


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(ValueError, match="model: is a file, expected a folder"):
        write(tmp_path / "model", NEW)


def test_files_get_the_permissions_of_new_ones(tmp_path):
    def work():
        with whole_folder(tmp_path / "model") as part:
            os.close(os.open(part / "weights.safetensors", os.O_CREAT, 0o600))
        write_text(tmp_path / "file.txt", "")

    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            work()
        finally:
            os.umask(before)
        for file in (tmp_path / "model/weights.safetensors", tmp_path / "file.txt"):
            assert file.stat().st_mode & 0o777 == mode


def test_a_full_disk_is_named(tmp_path):
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left (28)")):
        with pytest.raises(ValueError, match=f"^{tmp_path}/x: No space left on device; make room"):  # noqa: SIM117
            with whole_folder(tmp_path / "x"):
                raise error
        with pytest.raises(ValueError, match=f"^{tmp_path}/x.png: No space left on device; make room"):  # noqa: SIM117
            with whole_file(tmp_path / "x.png"):
                raise error
    with pytest.raises(KeyError), whole_folder(tmp_path / "x"):
        raise KeyError("another")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- whole files


def test_a_file_is_written_whole(tmp_path):
    file, moments = tmp_path / "deep" / "a.json", 0
    write_json(file, {"a": "old"})
    while killed_at(moments, lambda: write_json(file, {"a": "new"})):
        moments += 1
        assert read_json(file)["a"] in ("old", "new")
    assert moments > 3 and read_json(file) == {"a": "new"}
    tidy(file.parent)
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]
    with whole_file(file.with_name("b.png")) as part:
        assert part.suffix == ".png"
        part.write_text("half")
        tidy(file.parent)  # its writer lives
        assert part.exists()
    (tmp_path / "link.json").symlink_to(file)
    write_json(tmp_path / "link.json", {"a": 1})
    assert read_json(file) == {"a": 1} and (tmp_path / "link.json").is_symlink()


def test_json_without_what_it_has_not(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, float("nan"), {"b": (float("inf"), 0.5)}], "c": "NaN"})
    assert read_json(tmp_path / "a.json") == {"a": [1, None, {"b": [None, 0.5]}], "c": "NaN"}


@pytest.mark.parametrize("content", [None, "", '{"a": ', "[1]", "\x00"])
def test_json_that_cannot_be_read_is_named(content, tmp_path):
    file = tmp_path / "trainer_state.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match="trainer_state.json: (cannot be read|expected a JSON object, found a list)"):
        read_json(file)


# ------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from utils.folders import locked
with locked(Path(sys.argv[1]), join=sys.argv[2] == "join"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
    """hold("join") starts a process that holds the lock of tmp_path/out until it is killed."""
    started = []

    def hold(how: str = "first") -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, tmp_path / "out", how], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_one_process_has_an_output_folder(hold, tmp_path):
    folder, first = tmp_path / "out", hold()
    with pytest.raises(ValueError, match=rf"out: process {first.pid} is writing there \(-c .*\); wait for it"):  # noqa: SIM117
        with locked(folder):
            pass
    kill(first)
    (folder / "deep" / f"{folders.PART}0").mkdir(parents=True)
    (folder / "deep" / f"{folders.PART}1.png").write_bytes(b"half")
    with locked(folder):
        assert not list((folder / "deep").iterdir())
        (folder / "deep").rmdir()
        with pytest.raises(ValueError, match=f"process {os.getpid()} is writing there"), locked(folder):
            pass
    assert list(folder.iterdir()) == []


def test_ranks_share_the_lock_and_the_last_that_lives_keeps_it(hold, tmp_path):
    """As those that a torchrun leaves that was killed."""
    first = hold()
    second, third = hold("join"), hold("join")
    kill(first)
    kill(third)
    with pytest.raises(ValueError, match=f"out: process {second.pid} is writing there"), locked(tmp_path / "out"):
        pass
    kill(second)
    with locked(tmp_path / "out"):
        pass


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    with locked(tmp_path / "out"):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(write)
            os.read(read, 1)  # until the parent closes its end
            os._exit(0)
        os.close(read)
    with locked(tmp_path / "out"):
        pass
    os.close(write)
    os.waitpid(child, 0)


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ValueError, match="no such model"), locked(tmp_path / "a" / "b"):
        raise ValueError("no such model")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").write_text("")
    assert listing(tmp_path) == {"a/b/result": ""}
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: cannot be written to"), locked(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_does_not_stop_the_work(tmp_path, monkeypatch, capsys):
    def flock(descriptor, kind):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folders.fcntl, "flock", flock)
    with locked(tmp_path / "out"):
        write(tmp_path / "out" / "model", NEW)
        with scratch_folder(tmp_path / "out") as scratch:
            tidy(tmp_path / "out")
            assert scratch.exists()  # nobody can tell whether its writer lives
    assert "there are no locks on its file system" in capsys.readouterr().out
    assert listing(tmp_path / "out" / "model") == NEW


# ----------------------------------------------------------------------------------------------- names, room on disks


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "/home/x/flux", "a\\b", "a\0b", "x" * 256, ".flux158-lock"]
)
def test_what_is_not_the_name_of_one_folder(name):
    with pytest.raises(ValueError, match="^--output_model_filename .*(expected the name of one folder|255 bytes)"):
        check_name("--output_model_filename", name)


def test_names_of_folders():
    for name in ("flux-dev", "tiny-flux-1.58bit", "ein Modell", "模型", "..."):
        check_name("--output_model_filename", name)


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

    (tmp_path / "link").symlink_to("/elsewhere/not/there")
    check_disk(tmp_path / "link", 1, "the model")
    assert asked[-1] == Path("/")


def test_what_goes_on_one_disk_is_counted_together(tmp_path, monkeypatch):
    disks = {tmp_path / "a": 1, tmp_path / "b": 2}
    for place in disks:
        place.mkdir()
    stat = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda p, **k: SimpleNamespace(st_dev=disks[p], st_mode=0o40755) if p in disks else stat(p, **k)
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10e9))
    first, second, third = tmp_path / "a" / "x", tmp_path / "a" / "y", tmp_path / "b"
    check_disks([(first, 6e9, "checkpoints"), (second, 4e9, "the model"), (third, 9e9, "the cache")])
    message = r"x: checkpoints \(6\.0 GB\) and the model \(5\.0 GB\) take 11\.0 GB but only 10\.0 GB are free"
    with pytest.raises(ValueError, match=message):
        check_disks([(first, 6e9, "checkpoints"), (third, 9e9, "the cache"), (second, 5e9, "the model")])


def test_a_place_without_permission_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=f"x: the model cannot be written to {tmp_path}: no permission"):
        check_disk(tmp_path / "x", 1, "the model")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the model cannot be written to .*/file: that is a file"):
        check_disk(tmp_path / "file", 1, "the model")
