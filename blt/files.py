"""Files: atomic writes, JSON, weights and their hashes, the commit."""

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch


def git_commit():
    """The short commit of this checkout, with "+" if tracked files differ from it.

    Outside a checkout, or without git, it is "unknown".
    """
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        is_changed = _git("status", "--porcelain", "-uno") != ""
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
    folder if needed.
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
    # Also on Ctrl-C, which is no Exception.
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync(path):
    """Wait until a file's content is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _umask():
    """The permission bits that this process removes from new files."""
    # The system has no call that only reads the mask: setting it returns the old one.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write a value as indented JSON, atomically. Raises ValueError for a number that JSON does not have."""
    # Python writes NaN by default, and no other reader of JSON takes it.
    try:
        text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path} is not written: a value in it is infinite or not a number ({error})") from None
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def save_weights(path, model):
    """Write a model's state dict, atomically. It holds CPU tensors only, so any machine can load it."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
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
