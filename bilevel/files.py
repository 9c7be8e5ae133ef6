"""Files: written whole or not at all, read only if they are regular, and a sentence for each fault."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, final

from bilevel.errors import WriteError

_HOUR = 3600.0
_MOST = 2**30  # bytes of a text file: a record of a million lines is a third of that
_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], size: int | None = None) -> Iterator["Writer"]:
    """A new content of `path`: written beside it, flushed to the disk, then renamed over it.

    Whatever stops the writing, the file before stays and nothing is left beside it. After a kill the
    temporary file stays; those older than an hour are removed here, the others by `sweep`.

    Args:
        path: the file; missing folders are made.
        size: bytes that will be written, if known: said where the disk is full.

    Raises:
        WriteError: if the file cannot be written, with the space and what is still whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer: Writer | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget(path.parent.glob(f".{path.name}.*.tmp"), _HOUR)
        with open(temporary, "wb") as file:
            writer = Writer(file)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        # a library that writes here may turn a failure of the disk into an error of its own
        cause = error if isinstance(error, OSError) else (writer.failure if writer else None)
        if cause is None:
            raise
        _forget([temporary])
        whole = "the file before it is whole" if path.exists() else "nothing of it was left behind"
        raise _said(cause, path, whole, size or (writer.count if writer else 0)) from error
    finally:
        _forget([temporary])


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a text file, whole or not at all.

    Raises:
        WriteError: as `replacing`.
    """
    content = text.encode("utf-8", errors="backslashreplace")  # names of files need not be text
    with replacing(path, len(content)) as file:
        file.write(content)


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Add to a file all of the text, or none of it.

    Raises:
        WriteError: if it cannot be written; the file is as it was.
    """
    path = Path(path)
    before = path.stat().st_size if path.exists() else None
    content = text.encode()
    try:
        with open(path, "ab") as file:
            file.write(content)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(path, before or 0)
        whole = "what it held before is whole" if before else "nothing of it was left behind"
        raise _said(error, path, whole, len(content)) from error


def read_bytes(path: str | os.PathLike[str], most: int = _MOST) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it cannot be read.
        ValueError: if it is something else, such as a pipe, or larger than `most` bytes.
    """
    regular(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"`{path}` is larger than {amount(most)}; it is none of our files")
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a regular text file.

    Raises:
        ValueError: if it is not text; otherwise as `read_bytes`.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`{path}` is damaged: byte {error.start} is no text (UTF-8); restore it from a copy"
        ) from None


def regular(path: str | os.PathLike[str]) -> int:
    """Refuse what is not a regular file: a pipe would wait for ever, a device would never end.

    Returns:
        The size in bytes.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: naming what is there instead.
    """
    found = os.stat(path)
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise ValueError(f"`{os.fspath(path)}` is {kind}, not a file; give a regular file")
    return found.st_size


def sweep(folder: Path) -> None:
    """Remove temporary files that a killed process left in a folder.

    To be called where no other process writes: when a run is started or taken up again.
    """
    _forget([*folder.glob(".*.tmp"), *folder.glob("*.tmp")])


@final
class Writer:
    """A file being written that counts, adds up a checksum and remembers what went wrong.

    Attributes:
        count: bytes written so far.
        digest: SHA-256 of them.
        failure: the first failure of the disk.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write bytes."""
        try:
            written = self._file.write(content)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.count += written
        self.digest.update(content)
        return written

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()

    @property
    def raw(self) -> BinaryIO:
        """The file itself, for a caller that must seek in it."""
        return self._file


def amount(size: float) -> str:
    """Bytes in words.

    Example:
        >>> amount(512), amount(59_200_000)
        ('512 bytes', '59.2 MB')
    """
    if size < 1000:
        return f"{size:.0f} bytes"
    unit = next((u for u in ("kB", "MB", "GB") if (size := size / 1000) < 1000), "TB")
    return f"{size if unit != 'TB' else size / 1000:.1f} {unit}"


def reason(error: OSError) -> str:
    """What the system says, without number and name."""
    return (error.strerror or str(error)).lower()


def _said(error: OSError, path: Path, whole: str, size: int) -> WriteError:
    space = ""
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            room = next(parent for parent in path.resolve().parents if parent.exists())
            free = amount(shutil.disk_usage(room).free)
            space = f" ({amount(size)} are needed, {free} are free there)"
    advice = "make room and try again" if error.errno in _FULL else "check the disk and its rights"
    sentence = f"`{path}` could not be written: {reason(error)}{space}; {whole}; {advice}"
    return WriteError(error.errno or errno.EIO, sentence)


def _forget(files: Iterable[Path], older_than: float = 0.0) -> None:
    for left in files:
        with contextlib.suppress(OSError):
            if not older_than or time.time() - left.stat().st_mtime > older_than:
                left.unlink()


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
