"""Outputs that appear whole or not at all.

Everything is written beside its final name, synced to disk and renamed; a failure leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdopt.config.errors import UserError


def refuse_existing(path: Path | None) -> None:
    """Refuses an output that is already there, before anything is computed for it; None asks for no output.

    Raises:
        UserError: `path` exists.
    """
    if path is not None and os.path.lexists(path):
        raise UserError(f"{path} already exists and is never overwritten; remove it or choose another name.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes `path` when the block ends without an exception.

    Raises:
        UserError: `path` exists, its disk is full, or it cannot be written to.
    """
    with _renamed(Path(path)) as partial:
        partial.mkdir()
        yield partial


@contextmanager
def new_file(path: str | Path) -> Iterator[Path]:
    """Yields the temporary name of a file that becomes `path` when the block ends without an exception.

    Raises:
        UserError: `path` exists, its disk is full, or it cannot be written to.
    """
    with _renamed(Path(path)) as partial:
        yield partial


@contextmanager
def _renamed(final: Path) -> Iterator[Path]:
    refuse_existing(final)
    partial = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # a killed run may have had this process id
        yield partial
        _sync(partial)
        # A rename would replace a file silently: another run may have finished first.
        refuse_existing(final)
        os.rename(partial, final)
        _sync_entry(final.parent)
    except Exception as error:
        if sentence := _sentence(error, final, partial):
            raise UserError(sentence) from error
        raise
    finally:
        _remove(partial)


def _sentence(error: Exception, final: Path, partial: Path) -> str | None:
    """What to tell the user about a failed write that the user can mend."""
    code = getattr(error, "errno", None)
    # safetensors wraps the system's error and keeps only its text.
    if code in (errno.ENOSPC, errno.EDQUOT) or f"os error {errno.ENOSPC}" in str(error):
        return (
            f"The disk that holds {final.absolute().parent} is full{_free(final)}, so {final.name} was not "
            "written; free some space or choose an output on another disk."
        )
    ours = str(getattr(error, "filename", None)) in (str(partial), *map(str, final.parents))
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST) and ours:
        reason = os.strerror(code)
        return f"{final} cannot be written ({reason}); choose an output in a folder that you may write to."
    return None


def _free(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.absolute().parent).free / 1e6:.0f} MB free)"
    except OSError:
        return ""


def _sync(path: Path) -> None:
    for entry in sorted(path.rglob("*")) if path.is_dir() else []:
        _sync_entry(entry)
    _sync_entry(path)


def _sync_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()
