"""Files: written aside and renamed, JSON, weights and their hashes, the commit."""

import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch


def git_commit():
    """The checkout's short commit, with + if files differ from it; 'unknown' outside a checkout."""
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_atomically(path, write):
    """Call write(temporary path), then rename it to path: a reader never sees half a file, a failure leaves the old one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path, value):
    """Write JSON aside and rename it."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(value, indent=2) + "\n"))


def save_weights(path, model):
    """Write a plain state dict, aside and renamed."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_weights(path, model, assign=False):
    """Read a `save_weights` file into the model. Raises ValueError for a file that does not hold this model's weights.

    assign: let the model (on the meta device) have the file's own memory and dtype instead of a copy.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=assign), assign=assign)
    except Exception as error:  # torch raises many kinds for a file that is no state dict of these shapes
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} does not hold the model that the JSON beside it describes ({reason}); train it again"
        ) from None


def model_hash(model):
    """sha256 over the names and values of a model's weights: the same for the same model on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def add_to_hash(digest, document):
    """Add a document's length (8 bytes, little endian) and bytes to a hash: how documents are told from others everywhere."""
    digest.update(len(document).to_bytes(8, "little"))
    digest.update(document)


def hash_of_documents(documents):
    """sha256 of a list of documents in hex; of all documents of a store, the store's."""
    digest = hashlib.sha256()
    for document in documents:
        add_to_hash(digest, np.ascontiguousarray(document))
    return digest.hexdigest()
