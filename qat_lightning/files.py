"""Files that are there whole or not at all, and files from strangers."""

import os
import stat
import tempfile
from pathlib import Path

# Not everywhere; on a file that is a regular one they change nothing.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` so that a kill at any moment leaves the old file or the new one, never a part.

    Args:
        path: the file; its folder is made if there is none.
        content: text (UTF-8) or bytes.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        limit: how many bytes it may have.

    Raises:
        OSError: it cannot be read.
        ValueError: a link, a folder, a pipe or a device, or a file that is larger.
    """
    _size(path.lstat())  # opening a device may do something
    with os.fdopen(os.open(path, _OPEN_FLAGS), "rb") as file:
        size = _size(os.fstat(file.fileno()))
        content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise ValueError(f"it has {size} bytes, and at most {limit} belong there")
    return content


def _size(status: os.stat_result) -> int:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file but a link, a folder, a pipe or a device")
    return status.st_size
