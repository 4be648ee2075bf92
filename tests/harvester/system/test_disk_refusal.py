"""Let the operating system refuse, and check that each refusal has words and a remedy of its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from harvester.errors import StoreError, StoreFull
from harvester.store.journal.sqlite import disk_error
from harvester.system import disk_refusal


def write_into_a_full_disk(_folder: Path) -> None:
    with Path("/dev/full").open("wb", buffering=0) as full:
        full.write(b"x")


def write_below_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "file" / "below").write_text("")


def make_a_folder_of_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    (folder / "file").mkdir(exist_ok=True)


def write_over_a_folder(folder: Path) -> None:
    folder.write_text("")


def write_a_long_name(folder: Path) -> None:
    (folder / ("x" * 300)).write_text("")


def open_a_link_to_itself(folder: Path) -> None:
    (folder / "link").symlink_to("link")
    os.close(os.open(folder / "link", os.O_RDONLY))


def rename_over_a_full_folder(folder: Path) -> None:
    for name in ("new", "old"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("")
    (folder / "new").rename(folder / "old")


@pytest.mark.parametrize(
    ("refused", "number", "words", "helps"),
    [
        (write_into_a_full_disk, errno.ENOSPC, "the disk is full", "free some space"),
        (write_below_a_file, errno.ENOTDIR, "a file lies where a folder should", "move the file away"),
        (make_a_folder_of_a_file, errno.EEXIST, "a file lies where a folder should", "move the file away"),
        (write_over_a_folder, errno.EISDIR, "a folder lies where a file should", "move the folder away"),
        (write_a_long_name, errno.ENAMETOOLONG, "the name is too long", "choose a shorter one"),
        (open_a_link_to_itself, errno.ELOOP, "a symbolic link leads to itself", "remove the link"),
        (rename_over_a_full_folder, errno.ENOTEMPTY, "what lies there can't be removed", "owner"),
    ],
)
def test_a_refusal_is_named_and_only_a_full_disk_is_called_one(tmp_path, refused, number, words, helps):
    with pytest.raises(OSError) as raised:  # noqa: PT011 - which one is checked below
        refused(tmp_path)
    error = raised.value
    assert error.errno == number
    assert disk_refusal.reason(error) == words
    assert helps in disk_refusal.remedy(error)
    told = disk_error(error, tmp_path)
    assert isinstance(told, StoreFull) == (number == errno.ENOSPC)
    assert isinstance(told, StoreError)
    # Where a store is read or written, a file in a folder's place is a wrong name of the store.
    ending = "a folder of the store should" if number == errno.ENOTDIR else words
    assert ending in told.message
    assert told.remedy


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EDQUOT, "quota"),
        (errno.EIO, "the disk reports an error"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EFBIG, "may not be so large"),
    ],
)
def test_what_no_test_can_bring_about_has_words_too(tmp_path, number, words):
    told = disk_error(OSError(number, os.strerror(number), str(tmp_path)), tmp_path)
    assert isinstance(told, StoreFull) == (number == errno.EDQUOT)
    assert words in told.message
    assert told.remedy


def test_a_detail_that_is_not_the_systems_own_text_is_kept():
    error = OSError(errno.ENOSPC, "3 MiB free, 5 MiB needed")
    assert disk_refusal.reason(error) == "the disk is full: 3 MiB free, 5 MiB needed"


def test_the_number_is_read_from_the_text_of_a_library_in_rust():
    text = 'Error while serializing: I/O error: No space left on device (os error 28) at path "/x/.tmp1"'
    assert disk_refusal.is_full(RuntimeError(text))
    assert disk_refusal.reason(RuntimeError(text)) == "the disk is full"
    assert disk_refusal.reason(RuntimeError("header too large")) == "header too large"
