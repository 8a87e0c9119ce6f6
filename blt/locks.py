"""Locks that keep a second process out of an output folder in use."""

import os
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

# Folders that this process holds by `claim_folder`.
CLAIMED = set()


@contextmanager
def claim_folder(folder):
    """Hold a folder that exists while the block runs. Raises ValueError if it is held already."""
    name = Path(folder).resolve()
    descriptor = _lock(folder)
    CLAIMED.add(name)
    try:
        yield
    finally:
        CLAIMED.discard(name)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def claim_unless_claimed(folder):
    """`claim_folder`, but nothing if this process holds the folder already, as a script does around its training."""
    if Path(folder).resolve() in CLAIMED:
        yield
        return
    with claim_folder(folder):
        yield


def _lock(folder):
    """An open descriptor that keeps others out of a folder until it is closed; None where that is unknown."""
    if fcntl is None:
        return None
    # The folder itself is locked, so that no lock file is left behind by a process that is killed.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another process is training in {folder}; wait until it ends, stop it, or pass another --output"
        ) from None
    # Some network disks have no locks.
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
