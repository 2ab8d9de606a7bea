"""Files and folders that appear whole or not at all, in places that nobody else writes to and that have room for them.

Nothing of the user's is touched. What is being written lies under a name that begins with ".flux158-", and a whole
folder holds a record, .flux158.json, of the files in it and of who wrote them: only what is in the record is replaced,
and only for the same owner. A process that is killed leaves its unfinished parts; each is locked as long as its writer
lives, and the next process that comes by (tidy) finishes or removes those that are not.

A folder that is not there yet appears by one rename. One that is there (a mount point, the working folder, an earlier
version) is written to from within: the new version is completed in OUT/.flux158-part-…, becomes OUT/.flux158-whole by
one rename, and is moved up from there. A process killed before that rename leaves the old version, one killed after it
the new one, which tidy moves up.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

PREFIX = ".flux158-"
PART, LOCK, WHOLE = f"{PREFIX}part-", f"{PREFIX}lock", f"{PREFIX}whole"
RECORD = ".flux158.json"
NOT_THE_USERS = {RECORD, ".DS_Store"}  # the latter is left by macOS wherever one looks
KNOWN_BY = {"config.json", "model_index.json"}
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what some file systems answer to flock
held: set[int] = set()  # descriptors of locks; a forked child, such as a DataLoader's worker, does not keep them
os.register_at_fork(after_in_child=lambda: [os.close(held.pop()) for _ in range(len(held))])


# ------------------------------------------------------------------------------------------------------------- locks


def _take(file: Path, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> int:
    """A descriptor that holds the lock of `file`, made if need be, until it is closed or the process ends.

    BlockingIOError if another process has it, another OSError (see NO_LOCKS) where there are no locks; with LOCK_EX
    alone neither, but a wait.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with contextlib.suppress(OSError) if kind == fcntl.LOCK_EX else contextlib.nullcontext():
                fcntl.flock(descriptor, kind)
            if os.path.exists(file) and os.path.samestat(os.fstat(descriptor), os.stat(file)):
                held.add(descriptor)
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has just removed it


def _release(descriptor: int) -> None:
    held.discard(descriptor)
    os.close(descriptor)


@contextmanager
def _taken(file: Path, kind: int = fcntl.LOCK_EX | fcntl.LOCK_NB) -> Iterator[None]:
    descriptor = _take(file, kind)
    try:
        yield
    finally:
        _release(descriptor)


@contextmanager
def locked(folder: Path, join: bool = False) -> Iterator[None]:
    """Within the block the output folder, made if need be, is this process's alone; what killed ones left is tidied.

    The lock ends with the process, however that ends. Of several ranks the first takes it, and the others `join` it
    once the first has it; as long as one of them lives, another job is refused. Raises ValueError that names the
    process if one is writing there, or if the folder cannot be written to. A folder that was made for this and is
    still empty at the end is removed.
    """
    place, descriptor = folder.resolve(), None
    made = [path for path in (place, *place.parents) if not path.exists()]
    try:
        try:
            place.mkdir(parents=True, exist_ok=True)
            descriptor = _take(place / LOCK, (fcntl.LOCK_SH if join else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            who = _holders(place / LOCK)
            raise ValueError(f"{folder}: {who}; wait for it, end it or choose another folder") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ValueError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from None
            print(f"{folder}: there are no locks on its file system; start one run at a time in it", flush=True)
        else:
            if not join:
                os.ftruncate(descriptor, 0)
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for the other ranks to join
                for folder_within, _, _ in os.walk(place):
                    tidy(Path(folder_within))
            os.write(descriptor, f"{os.getpid()} {platform.node()} {shlex.join(sys.argv)[:100]}\n".encode())
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # another rank is still there
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                (place / LOCK).unlink()
            _release(descriptor)
        for path in made:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def _holders(lock: Path) -> str:
    """Who wrote into a lock, in words; those that are known to be gone only if there is nobody else."""
    found = (line.split(" ", 2) for line in lock.read_text(errors="replace").splitlines())
    lines = [line for line in found if len(line) == 3 and line[0].isdigit()]
    alive = [line for line in lines if line[1] != platform.node() or _lives(int(line[0]))] or lines
    if not alive:
        return "another process is writing there"
    numbers = ", ".join(line[0] for line in alive)
    where = "" if alive[0][1] == platform.node() else f" on {alive[0][1]}"
    return f"process {numbers}{where} is writing there ({alive[0][2]})"


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


# ----------------------------------------------------------------------------------------------------- whole folders


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, removed after the block; if the process is killed, by the next one (see tidy)."""
    folder = parent.resolve() / f"{PART}{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where there are no locks, nobody tidies
            stack.enter_context(_taken(folder / LOCK))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_full_disk_named(parent))
        yield folder


@contextmanager
def whole_folder(folder: Path, owner: str = "") -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block is through, and not before.

    Files are on the disk before they get their final name, with the permissions that the umask leaves. Raises
    ValueError if `folder` holds anything but an earlier version of the same `owner` (see check_target).
    """
    check_target(folder, owner)
    target = folder.resolve()
    inside = target.exists()
    tidy(target.parent)
    with scratch_folder(target if inside else target.parent) as part, _full_disk_named(folder):
        yield part
        check_target(folder, owner)  # it may have taken hours
        _complete(part, owner)
        if inside:
            part.rename(target / WHOLE)
            _sync(target)
            _land(target)
        else:
            part.rename(target)
            (target / LOCK).unlink(missing_ok=True)
            _sync(target.parent)


def check_target(folder: Path, owner: str = "") -> None:
    """ValueError unless `folder` is not there, is empty, or holds what was written for `owner` and nothing else."""
    target = folder.resolve()
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder; choose another name")
    tidy(target)
    record = _read_record(target)
    strange = _files(target) - set(record["files"] if record["owner"] == owner else ())
    if strange and record["owner"] not in (None, owner):
        raise ValueError(f"{folder}: was written by {record['owner'] or 'another script'}; move it or choose another")
    if strange:
        raise ValueError(f"{folder}: holds {min(strange)}, which is not this program's; move it or choose another")


def is_empty(folder: Path) -> bool:
    """Whether there are no files in `folder`, or no such folder; unfinished parts do not count."""
    return not _files(folder.resolve())


def written_by(folder: Path) -> str | None:
    """The owner of the whole folder `folder`, None if it is none."""
    return _read_record(folder)["owner"]


def remove_folder(folder: Path, owner: str = "") -> None:
    """Remove what was written for `owner`, all of it or nothing as far as its name goes; else as check_target."""
    check_target(folder, owner)
    with scratch_folder(folder.parent) as doomed:
        folder.rename(doomed / folder.name)


def tidy(folder: Path) -> None:
    """Finish or remove what processes that were killed left unfinished in `folder`; those that live are left alone.

    To be called before reading a folder that whole_folder wrote, and on a folder that holds such.
    """
    for path in sorted(folder.glob(f"{PREFIX}*")):
        if path.name == WHOLE:  # if another process is just moving it up, it will be through in a moment
            with contextlib.suppress(FileNotFoundError), _taken(path / LOCK, fcntl.LOCK_EX):
                _land(folder)
        elif path.name.startswith((PART, LOCK)):
            with contextlib.suppress(OSError), _taken(path / LOCK if path.is_dir() else path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_record(folder: Path) -> dict:
    """{"owner": …, "files": […]} as _complete wrote it; without one no owner and no files."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {"owner": str(record["owner"]), "files": [str(name) for name in record["files"]]}
    except (OSError, ValueError, KeyError, TypeError):
        return {"owner": None, "files": []}


def _files(folder: Path) -> set[str]:
    """The paths of all files under `folder`, relative to it, links included, but those of this file's own."""
    found = set()
    for root, folders, names in os.walk(folder):
        if Path(root) == folder:
            folders[:] = [name for name in folders if not name.startswith(PREFIX)]
            names = [name for name in names if not name.startswith(PREFIX)]
        names = names + [name for name in folders if os.path.islink(os.path.join(root, name))]
        found |= {(Path(root) / name).relative_to(folder).as_posix() for name in names}
    return {name for name in found if Path(name).name not in NOT_THE_USERS}


def _complete(part: Path, owner: str) -> None:
    """Write the record, give all files the permissions of a new file, and bring everything to the disk."""
    record, files = part / RECORD, sorted(_files(part))
    record.write_text(json.dumps({"owner": owner, "files": files}, indent=1) + "\n", encoding="utf-8")
    mode = record.stat().st_mode & 0o777  # safetensors' files are for their owner alone
    for root, _, names in os.walk(part, topdown=False):
        for name in names:
            file = Path(root) / name
            if not file.is_symlink():
                file.chmod(mode)
                _sync(file)
        _sync(Path(root))


def _land(folder: Path) -> None:
    """Move what is in folder/WHOLE up, in place of the earlier version; carries on where it was interrupted.

    What a model's folder is known by goes first and comes last: nobody takes a mixture for a model.
    """
    whole = folder / WHOLE
    if (whole / RECORD).exists():  # it comes last of all
        old, new = ({Path(name).parts[0] for name in _read_record(f)["files"]} for f in (folder, whole))
        names = sorted(new, key=lambda name: name in KNOWN_BY)
        for name in [*reversed(names), *(old - new)]:
            path = folder / name
            if name not in new or os.path.lexists(whole / name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for name in names:
            if os.path.lexists(whole / name):
                (whole / name).rename(folder / name)
        (whole / RECORD).replace(folder / RECORD)
        _sync(folder)
    shutil.rmtree(whole, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------- whole files


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A file to write to, of the same suffix, that takes the place of `file` when the block is through."""
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{PART}{secrets.token_hex(8)}{file.suffix}")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where there are no locks, nobody tidies
            stack.enter_context(_taken(part))
        stack.callback(part.unlink, missing_ok=True)
        stack.enter_context(_full_disk_named(file))
        try:
            yield part
        except OSError as error:
            if error.filename == str(part):
                error.filename = str(file)
            raise
        _sync(part)
        part.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write `file` in UTF-8, whole or not at all."""
    with whole_file(file) as part:
        part.write_text(text, encoding="utf-8")


def write_json(file: Path, data: object, indent: int = 2) -> None:
    """Write `data` as JSON, whole or not at all; NaN and infinities, which JSON has not, as null."""
    write_text(file, json.dumps(_finite(data), indent=indent, allow_nan=False) + "\n")


def _finite(data: object) -> object:
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def read_json(file: Path) -> dict:
    """The JSON object in `file`; ValueError that names the file if it is missing, empty, cut short or none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected a JSON object, found a {type(data).__name__}")
    return data


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """A full disk's error gets the path that Python and safetensors leave out."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            text = getattr(error, "strerror", None) or "No space left on device"
            raise ValueError(f"{path}: {text}; make room or choose another folder") from error
        raise


# ----------------------------------------------------------------------------------------------- names, room on disks


def check_name(flag: str, name: str) -> None:
    """ValueError unless `name`, given with `flag`, is the name of one folder."""
    if not name.strip() or name.startswith(PREFIX) or name in (".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"{flag} {name!r}: expected the name of one folder, without a path")
    if len(name.encode()) > 255:
        raise ValueError(f"{flag} {name[:20]}…: a folder's name has at most 255 bytes")


def check_disks(needs: Sequence[tuple[Path, int, str]]) -> None:
    """ValueError unless each (folder, bytes, what they are) can be written, all of them together, disk by disk."""
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for folder, needed, what in needs:
        place = _nearest(folder)
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            reason = "no permission to write there" if place.is_dir() else "that is a file"
            raise ValueError(f"{folder}: {what} cannot be written to {place}: {reason}; choose another folder")
        disks.setdefault(place.stat().st_dev, []).append((folder, needed, what))
    for on_disk in disks.values():
        folder, needed, what = on_disk[0]
        verb = "takes"
        if len(on_disk) > 1:
            needed, verb = sum(size for _, size, _ in on_disk), "take"
            what = " and ".join(f"{what} ({_gigabytes(size)})" for _, size, what in on_disk)
        free = shutil.disk_usage(_nearest(folder)).free
        if free < needed:
            raise ValueError(
                f"{folder}: {what} {verb} {_gigabytes(needed)} but only {_gigabytes(free)} are free; "
                "make room or choose another folder"
            )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.{1 if size >= 1e8 else 4}f} GB"


def check_disk(folder: Path, needed: int, what: str) -> None:
    """ValueError unless `folder` can be written to and its disk has `needed` bytes free."""
    check_disks([(folder, needed, what)])


def _nearest(folder: Path) -> Path:
    """`folder` or the first of its parents that exists: it is on the same disk."""
    place = folder.resolve()
    return next(path for path in (place, *place.parents) if path.exists())
