"""Files: atomic writes, JSON, weights and their hashes, the commit."""

import errno
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

# A file system that is full, a quota that is used up, and the limit of a process.
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def git_commit():
    """The short commit of this checkout, with "+" if tracked files differ from it.

    Outside a checkout, or without git, it is "unknown".
    """
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        # Without locks: a process that is killed meanwhile must not leave one in the user's repository.
        is_changed = _git("--no-optional-locks", "status", "--porcelain", "-uno") != ""
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + "+" if is_changed else commit


def _git(*arguments):
    """What a git command prints about this checkout."""
    # A repository on a slow network disk must not hold up a training run.
    command = ["git", *arguments]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def write_atomically(path, write, keep=None):
    """Call write(temporary path), then rename it to path.

    A reader never sees half a file, and a failed write leaves the old file as it was. Makes the
    folder if needed. A full disk is an OSError that names path.
    keep: where an old file at path goes; None: it is replaced.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        # mkstemp lets only the owner read its file; give it the permissions of any other new file.
        os.chmod(temporary, 0o666 & ~_umask())
        # Without this, a power cut after the rename can leave an empty file under the final name.
        _sync(temporary)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # Also on Ctrl-C, which is no Exception.
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if _is_disk_full(error):
            # The error of the system names no file, or the one aside.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _is_disk_full(error):
    """Whether a file could not be written to its end for lack of room."""
    if isinstance(error, OSError):
        return error.errno in DISK_IS_FULL
    # torch.save fails so, and does not say why.
    return isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "inline_container" in str(error))


def _sync(path):
    """Wait until a file's content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder):
    """Wait until the names in a folder are on the disk, where the system can do that."""
    # A rename is a change of the folder: after a power cut the old file may be there again.
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    # Windows does not open folders, and some network disks do not sync them.
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _umask():
    """The permission bits that this process removes from new files."""
    # The system has no call that only reads the mask: setting it returns the old one.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write a value as indented JSON, atomically. Raises ValueError for a number that JSON does not have."""
    text = _json_text(path, value)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def _json_text(path, value):
    """A value as indented JSON, for a file at path."""
    # Python writes NaN by default, and no other reader of JSON takes it.
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path} is not written: a value in it is infinite or not a number ({error})") from None


# More than any manifest, record or patches.json has, and little to read.
SEALED_LIMIT = 1 << 26


def write_sealed(path, facts):
    """Write a dict as JSON with the sha256 of its other entries in the entry "sha256", atomically.

    Raises ValueError for a number that JSON does not have.
    """
    # As JSON gives it back, because the hash is compared with what a reader gets: its keys are
    # strings, its tuples lists.
    text = sealed_text(json.loads(_json_text(path, facts)))
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def sealed_text(facts):
    """What `write_sealed` writes."""
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return json.dumps(facts | {"sha256": digest}, indent=2) + "\n"


def read_sealed(path, version, error=ValueError):
    """Read a `write_sealed` file whose "format" is `version`.

    error: the type of exception, a ValueError, for a file that is missing or is not as it was written.
    """
    path = Path(path)
    try:
        # Before it is read: a file of gigabytes must not fill the memory to be refused.
        n_bytes = path.stat().st_size
        text = path.read_text(encoding="utf-8") if n_bytes <= SEALED_LIMIT else None
        facts = {} if text is None else json.loads(text)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise error(f"{path} is missing") from None
    # Invalid UTF-8 and invalid JSON are ValueErrors; nested brackets without end are the other.
    except (ValueError, RecursionError):
        raise error(f"{path} is damaged: it is no JSON") from None
    if text is None:
        raise error(f"{path} is damaged: {n_bytes:,} bytes")
    if not isinstance(facts, dict):
        raise error(f"{path} is damaged: it is no JSON object")
    # Before the hash: earlier versions wrote none, and "damaged" would be the wrong word.
    if facts.get("format") != version:
        raise error(f"{path} is outdated: format {facts.get('format', 1)!r}, not {version}")
    without_hash = {name: value for name, value in facts.items() if name != "sha256"}
    # The text, not only the values: a changed byte that means the same is a sign of damage too.
    if text != sealed_text(without_hash):
        raise error(f"{path} is damaged or was edited: it is not as it was written")
    return without_hash


def save_weights(path, model):
    """Write a model's state dict, atomically."""
    write_state(path, model.state_dict())


def write_state(path, state):
    """Write a state dict, atomically. The file holds CPU tensors only, so any machine can load it."""
    state = {name: value.detach().cpu() for name, value in state.items()}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_weights(path, model, assign=False):
    """Read a `save_weights` file into the model, and return its state dict.

    assign: let the model (on the meta device) take the file's own memory and dtype instead of a copy.
    Raises ValueError if the file does not hold this model's weights.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=assign)
        model.load_state_dict(state, assign=assign)
    # torch raises many types for a file that is no state dict of these shapes.
    except Exception as error:
        # Some of its errors have no text at all.
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise ValueError(
            f"{path} does not hold the model that the JSON beside it describes ({reason}); train it again"
        ) from None
    return state


def model_hash(model):
    """sha256 (hex) over the names and values of a model's weights. It does not depend on the device."""
    return state_hash(model.state_dict())


def state_hash(state):
    """`model_hash` of a state dict, {name: tensor}."""
    digest = hashlib.sha256()
    # Sorted, so that the order in which a model defines its layers does not matter.
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        # NumPy has no bfloat16, so hash the memory and not the numbers.
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def add_to_hash(digest, document):
    """Add a document to a hash: its length (8 bytes, little endian), then its bytes.

    Every hash of documents in this project is made this way.
    """
    # Without the lengths, "ab" + "c" and "a" + "bc" would have the same hash.
    digest.update(len(document).to_bytes(8, "little"))
    digest.update(document)


def hash_of_documents(documents):
    """sha256 (hex) of a list of documents. For all documents of a store with no named split it equals `Corpus.hash`."""
    digest = hashlib.sha256()
    for document in documents:
        add_to_hash(digest, np.ascontiguousarray(document))
    return digest.hexdigest()
