"""Locks of files and folders that one process at a time may write: the operating system's, which die with their holder.

Who holds one is written into it, for the message to the next; that text decides nothing. Windows has no such lock here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Lock"]

_log = logging.getLogger(__name__)
_GUARD = threading.Lock()
_HELD: dict[tuple[int, Path], list[int]] = {}  # process and path -> descriptor and number of holders within the process


class Lock:
    """Holds `path`, a file made for it, until `close` or the end of the process; a context manager.

    Within one process it may be held several times over, as the steps of one piece of work do.
    Raises ValueError that says who holds it where another process does, OSError where it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], what: str | os.PathLike[str]) -> None:
        """what: the file or folder that it guards, for the message."""
        place = Path(path).absolute()
        # A forked child has its parent's table and holds nothing.
        self._key: tuple[int, Path] | None = None
        key = (os.getpid(), place.parent.resolve() / place.name)
        with _GUARD:
            if key not in _HELD:
                _HELD[key] = [_taken(key[1], os.fspath(what)), 0]
            _HELD[key][1] += 1
        self._key = key

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Let go; again is nothing."""
        key, self._key = self._key, None
        if key is None or key[0] != os.getpid():
            return
        with _GUARD:
            held = _HELD[key]
            held[1] -= 1
            if held[1]:
                return
            del _HELD[key]
            # While it is held: whoever has opened it meanwhile finds it gone, and makes another.
            with contextlib.suppress(OSError):
                key[1].unlink()
            os.close(held[0])


def _taken(path: Path, what: str) -> int:
    """The descriptor of the locked file."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, path)
            if not _is(handle, path):
                os.close(handle)  # its holder removed it between the two calls
                continue
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            raise ValueError(f"{what}: in use by {holder}; wait until it has ended, or name another place") from None
        except BaseException:
            os.close(handle)
            raise
        with contextlib.suppress(OSError):  # a full disk: held all the same
            os.ftruncate(handle, 0)
            since = datetime.now().astimezone().isoformat(" ", "seconds")
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
            os.pwrite(handle, json.dumps(facts).encode(), 0)
        return handle


def _lock(handle: int, path: Path) -> None:
    """Lock, or BlockingIOError where another process does."""
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:  # a file system without locks
        _log.warning("%s: cannot be locked (%s); let no other process write here", path, error.strerror)


def _is(handle: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(handle: int) -> str:
    try:
        facts = json.loads(os.pread(handle, 1000, 0))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
