"""Checkpoints of a run: written whole with a hash, the last two kept. And which run may go on from one, and where.

    last.pt        everything to go on from
    previous.pt    the one before it, for when last.pt is damaged
    best.pt        weights of the best evaluation

A checkpoint is a file of `torch.save` with one more line at its end, the sha256 of all before.
torch.load reads it without looking at that line.
"""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import torch

from blt.files import write_atomically
from blt.processes import is_main

# The files by which a folder shows that a run has begun in it.
RUN_FILES = ("best.pt", "last.pt", "previous.pt")
# The report of a batch with which a run went wrong.
BAD_BATCH = "bad_batch.json"
# What a new run in a used folder removes first: a mixture of two runs would pass for one.
OLD_FILES = (*RUN_FILES, "last.pt.damaged", "metrics.jsonl", "curves.png", BAD_BATCH)
# What is kept of an earlier run that nobody asked to replace.
EARLIER_FILES = (*OLD_FILES, "model.json", "tokenizer.json", "entropy_model.pth", "entropy_model.json")

# Settings that may differ between the run that stopped and the one that goes on: they change no
# number of the training. `epochs` does so through `steps`, which is compared.
FREE_TO_CHANGE = {
    "preset", "quick_demo", "resume", "overwrite", "eval_every", "log_every", "checkpoint_minutes", "tensorboard",
    "epochs", "spike", "data_cache", "device", "compile", "recompute", "val_bytes", "output", "prompt", "sample_bytes",
    "shard",
}  # fmt: skip
# Ways to name the text, the patches and the start. A run that says by their hashes what it
# depends on may name them in another way: a folder moves, a path becomes absolute.
NAMES_OF_INPUTS = {
    "dataset", "val_dataset", "text_field", "corpus_bytes", "max_document_bytes", "patch_cache", "entropy_model_path",
    "patch_method", "entropy_threshold", "target_patch_size", "init_from",
}  # fmt: skip
# Changes that a user needs in the middle of a run: gentler steps after a loss that was no number,
# and a longer run.
GENTLER = ("lr", "adam_lr", "table_lr", "clip")

# The parts of a checkpoint and their types. A hash says that a file is as it was written, not who wrote it.
NONE = type(None)
PARTS = {
    "step": int,
    "settings": dict,
    "depends_on": dict,
    "model": dict,
    "optimizers": list,
    "scaler": dict,
    "random": torch.Tensor,
    "random_cuda": list,
    "best": (dict, NONE),
    "best_sha256": (str, NONE),
    "last": (dict, NONE),
    "evaluated": int,
    "bytes": int,
    "seconds": float,
    "validation_sha256": str,
    "lowest_loss": (float, NONE),
    "precision": (str, NONE),
}

HASH_LABEL = b"\nsha256 "
HASH_LINE_BYTES = len(HASH_LABEL) + 64 + 1


def save_checkpoint(path, model, optimizers, scaler, config, state):
    """Write everything that `load_checkpoint` needs to go on as if never stopped; the old file becomes previous.pt.

    The main process writes; the others are asked for their parts of a sharded model.

    state: a dict of plain values; it needs "step", and "depends_on" (see `load_checkpoint`).
    """
    path = Path(path)
    checkpoint = {
        **state,
        "settings": dataclasses.asdict(config),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        # The loss scale of fp16 adapts during training.
        "scaler": scaler.state_dict(),
        # Dropout draws from these.
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }

    if not is_main():
        return

    def write(temporary):
        torch.save(checkpoint, temporary)
        # Inside the file, because two files cannot be renamed at once.
        line = _hash_line(temporary, os.path.getsize(temporary))
        with open(temporary, "ab") as file:
            file.write(line)

    write_atomically(path, write, keep=path.with_name("previous.pt"))


def load_checkpoint(path, model, optimizers, scaler, config, depends_on):
    """Restore a `save_checkpoint` file into model, optimizers, scaler and random state; returns its state.

    A damaged file is named, and previous.pt is read in its place.

    depends_on: {name: value} of what the run depends on beside its settings, such as the hash of
    the text.
    Raises FileNotFoundError, or ValueError if no file is whole or the stopped run was another one.
    """
    path, checkpoint = _read_last_whole(Path(path))
    _check_same_run(path, checkpoint, config, depends_on)
    # Loading an optimizer replaces its rates by the saved ones.
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    try:
        model.load_state_dict(checkpoint["model"])
        for optimizer, saved in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        # Empty where the run was not in fp16.
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["random"])
        if checkpoint["random_cuda"] and torch.cuda.is_available():
            # The run may have had more cards.
            torch.cuda.set_rng_state_all(checkpoint["random_cuda"][: torch.cuda.device_count()])
    # torch raises many types for a state that does not fit.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is of another model ({reason}); {_ways_on()}") from None
    for optimizer, peaks_of_groups in zip(optimizers, peaks):
        for group, peak in zip(optimizer.param_groups, peaks_of_groups):
            # The saved group has the peak of the stopped run; the rate may have been lowered since.
            group["initial_lr"] = peak
    print(f"resumed {path} at step {checkpoint['step']}")
    not_state = {"settings", "model", "optimizers", "scaler", "random", "random_cuda"}
    return {name: value for name, value in checkpoint.items() if name not in not_state}


def _ways_on():
    return "use what the run began with, or begin again with another --output or with --overwrite"


# Whole or damaged


def _hash_line(path, n_bytes):
    """The line, as bytes, that names the sha256 of a file's first n_bytes."""
    digest = hashlib.sha256()
    # In pieces: a checkpoint may be larger than the memory that is left.
    with open(path, "rb") as file:
        while n_bytes > 0:
            piece = file.read(min(n_bytes, 1 << 20))
            if not piece:
                break
            digest.update(piece)
            n_bytes -= len(piece)
    return HASH_LABEL + digest.hexdigest().encode() + b"\n"


def _read_whole(path):
    """The dict in a checkpoint. Raises ValueError if its hash is missing or wrong."""
    n_bytes = path.stat().st_size - HASH_LINE_BYTES
    line = b""
    if n_bytes > 0:
        with open(path, "rb") as file:
            file.seek(n_bytes)
            line = file.read()
    if not line.startswith(HASH_LABEL):
        raise ValueError("the hash at its end is missing: the file was cut, or is no checkpoint of this version")
    if line != _hash_line(path, n_bytes):
        raise ValueError("its bytes do not have the hash at its end")
    try:
        # weights_only: a checkpoint from elsewhere cannot run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises many types for a file that it cannot read.
    except Exception as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if not isinstance(checkpoint, dict):
        raise ValueError("it is no checkpoint of this version")
    # Earlier versions saved neither.
    checkpoint.setdefault("lowest_loss", None)
    checkpoint.setdefault("precision", None)
    for name, kind in PARTS.items():
        if name not in checkpoint or not isinstance(checkpoint[name], kind):
            raise ValueError(f"it is no checkpoint of this version: its {name} is missing or of another type")
    scores = [checkpoint[name] for name in ("best", "last") if checkpoint[name] is not None]
    if checkpoint["step"] < 0 or not all(isinstance(score.get("val_bpb"), float) for score in scores):
        raise ValueError("it is no checkpoint of this version: its step or a score is no number")
    return checkpoint


def _read_last_whole(path):
    """(path, dict) of the checkpoint, or of the one before it if that is damaged or missing."""
    previous = path.with_name("previous.pt")
    if not path.exists() and not previous.exists():
        raise FileNotFoundError(f"{path} not found: nothing to resume; run without --resume")
    # A run is killed between the two renames when only previous.pt is there.
    damages = []
    for candidate in (path, previous):
        if not candidate.exists():
            continue
        try:
            checkpoint = _read_whole(candidate)
        except ValueError as error:
            damages.append(f"{candidate} is damaged ({error})")
            continue
        if damages:
            # Set aside, so that the next checkpoint does not push the whole one out.
            damaged = path.with_name("last.pt.damaged")
            os.replace(path, damaged)
            print(f"warning: {damages[0]}; it is now {damaged}, and the one before it is used")
        return candidate, checkpoint
    raise ValueError("; ".join(damages) + "; begin again with another --output or with --overwrite")


# The same run


def differing_settings(then, now, depends_on):
    """What differs between two runs: (list of differences that make them two runs, list of allowed differences).

    then, now: {name: value} of settings and what the runs depend on.
    depends_on: the names among them that say by content what the run reads.
    """
    # Without the text's hash the names are all that is known of it.
    free = FREE_TO_CHANGE | (NAMES_OF_INPUTS if "corpus_sha256" in depends_on else set())
    refused, allowed = [], []
    for name, value in now.items():
        before = then.get(name)
        if name in free or before == value:
            continue
        words = f"{name}: {_shown(before)} then, {_shown(value)} now"
        both_given = before is not None and value is not None
        is_gentler = name in GENTLER and both_given and value < before
        is_longer = name == "steps" and both_given and value > before
        if is_gentler or is_longer or (name == "precision" and value == "fp32"):
            allowed.append(words)
        else:
            refused.append(words)
    return refused, allowed


def _shown(value):
    """A value for a message: the first digits of a hash."""
    is_hash = isinstance(value, str) and len(value) == 64
    return value[:12] if is_hash else repr(value)


def _check_same_run(path, checkpoint, config, depends_on):
    """Raise ValueError if the checkpoint's run differs from this one in what changes its numbers."""
    then = checkpoint["settings"] | checkpoint["depends_on"]
    now = dataclasses.asdict(config) | depends_on
    refused, allowed = differing_settings(then, now, depends_on)
    # Half a run with one setting and half with another would be a run that no command repeats.
    if refused:
        raise ValueError(f"cannot resume {path} as another run ({'; '.join(refused)}); {_ways_on()}")
    for words in allowed:
        print(f"note: {words}; the steps from {checkpoint['step'] + 1} on follow the new value")


# Folders of runs


def keep_earlier_run(folder, *files, names=None):
    """Move what an earlier run has left in a folder to FOLDER.earlier-1, or -2, ..., so that nothing is lost.

    files: results of that run beside the folder; they are copied there and stay until the new run
    replaces them.
    names: what belongs to a run in the folder; None: `EARLIER_FILES`.
    Returns the new folder, or None if there was nothing to keep.
    """
    folder = Path(folder)
    found = [folder / name for name in names or EARLIER_FILES if (folder / name).exists()]
    beside = [path for path in map(Path, files) if path.exists()]
    # A record alone, or an entropy model that a user has put there, is no run.
    is_run = names is not None or any(path.name in RUN_FILES for path in found)
    if not (found and is_run) and not beside:
        return None
    number = 1
    while (earlier := folder.with_name(f"{folder.name}.earlier-{number}")).exists():
        number += 1
    earlier.mkdir(parents=True)
    try:
        for path in beside:
            shutil.copy2(path, earlier / path.name)
    # A full disk: nothing was moved yet, and half a copy helps nobody.
    except BaseException:
        shutil.rmtree(earlier, ignore_errors=True)
        raise
    for path in found:
        os.replace(path, earlier / path.name)
    print(
        f"note: the earlier run in {folder} is kept in {earlier}; --overwrite would replace it, --resume go on with it"
    )
    return earlier


def has_checkpoint(folder):
    """Whether a folder has a checkpoint, whole or damaged, to resume from."""
    return any((Path(folder) / name).exists() for name in ("last.pt", "previous.pt"))


def check_resumable(folder, config, *files):
    """Raise FileNotFoundError if config.resume asks for a run that is not there.

    A folder without weights counts: its run was killed before its first checkpoint and starts again.
    Weights without a checkpoint, in the folder or beside it, do not: --resume must not replace them.
    """
    folder = Path(folder)
    if not config.resume or has_checkpoint(folder):
        return
    is_used = any(path.exists() for path in (folder / "best.pt", *map(Path, files)))
    if not folder.exists() or (is_used and not config.overwrite):
        raise FileNotFoundError(f"{folder / 'last.pt'} not found: nothing to resume; run without --resume")


def remove_old_run(folder):
    """Remove the files of an earlier run, so that none is taken for one of the new run's."""
    for name in OLD_FILES:
        (Path(folder) / name).unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove what a killed process was writing aside: as large as a checkpoint, and read by nobody."""
    for name in EARLIER_FILES:
        for path in Path(folder).glob(f"{name}*.tmp"):
            path.unlink(missing_ok=True)
