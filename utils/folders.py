"""Folders that are written whole or not at all, on disks that have room for them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the place of `folder` when the block is through, and not before."""
    partial = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_disk(folder: Path, needed: int, what: str) -> None:
    """ValueError unless the disk that will hold `folder` has `needed` bytes free."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"{folder}: {what} takes {needed / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free; "
            "make room or choose another folder"
        )
