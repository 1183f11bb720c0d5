"""Whether another process is at work in a folder. The system tells, so one that was killed is at work no more."""

from __future__ import annotations

import errno
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

FILE = "lock"


class InUse(RuntimeError):
    """Another process is at work there."""


class Lock:
    """Held by this process until it ends, or this object does."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __reduce__(self) -> tuple[type[Lock], tuple[int]]:
        """Copies hold nothing: what they close would be closed here, too."""
        return Lock, (-1,)

    def __del__(self) -> None:
        with suppress(OSError):
            os.close(self._handle)


def take(folder: Path, *, to_look: bool = False) -> Lock | None:
    """Be the process at work in `folder`. None: the system cannot tell who is, as on Windows and on some network disks.

    to_look: only see that no other is; as many as like can look at the same time.

    Raises:
        InUse: another process is; says which.
    """
    if sys.platform == "win32":
        return None
    try:
        handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        return None
    lock = Lock(handle)
    try:
        fcntl.lockf(handle, (fcntl.LOCK_SH if to_look else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        who = os.read(handle, 1000).decode(errors="replace") or "another process"
        raise InUse(f"{folder.parent} is in use: {who} is at work in it. Nothing was done; wait until it ends.") from None
    if to_look:
        return lock
    with suppress(OSError):  # no room for the name
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
    return lock


def refuse_in_use(folder: Path) -> None:
    """Raise `InUse` if another process is at work in `folder`, which is there."""
    if (folder / FILE).exists():
        take(folder, to_look=True)
