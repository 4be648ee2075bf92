"""Keep damaged and foreign files in `quarantine/`. Only a purge deletes them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from harvester.store import paths
from harvester.store.shards.parquet_file import translate_disk_errors
from harvester.system.files import fsync
from harvester.system.own_files import ForeignFileError


def move_in(store: Path, path: Path, *, keep: bool, name: str = "") -> str:
    """Move a file or folder to quarantine under a free name; return that name.

    Args:
        keep: make a hard link and leave the file in place, because its rows are still to be saved.
        name: the wanted name, its own where empty.

    Raises:
        StoreError, StoreFull: the disk refuses.
    """
    folder, wanted = store / paths.QUARANTINE, Path(name or path.name)
    with translate_disk_errors(folder):
        _require_folder(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        target, again = folder / wanted, 0
        while os.path.lexists(target):
            again += 1
            target = folder / f"{wanted.stem}~{again}{wanted.suffix}"
        if keep:
            target.hardlink_to(path)
        else:
            path.rename(target)
        fsync(folder)
    return target.name


def _require_folder(folder: Path) -> None:
    """Refuse a link to a folder elsewhere: its files are not ours to delete.

    Raises:
        ForeignFileError: it is a link or a file.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ForeignFileError(errno.ENOTDIR, "is not a folder of the store", str(folder))


def delete_damaged(store: Path) -> None:
    """Delete shards and logs in quarantine, because it is unknown which answers damaged ones hold.

    Raises:
        StoreError: the disk refuses.
    """
    with translate_disk_errors(store / paths.QUARANTINE):
        _require_folder(store / paths.QUARANTINE)
        for pattern in ("part-*", f"{paths.JOURNAL}*"):
            for path in (store / paths.QUARANTINE).glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
