"""Save and load trained models: an entropy model's pair of files, and the output folder of a BLT.

    model, record = load_entropy_model("entropy_model.pth")
    model, patcher, record = load_blt("checkpoints")

`record` is a `RunRecord` (blt/records.py): what the model is and what made it.
"""

import dataclasses
import shutil
from functools import partial
from pathlib import Path

from blt.commands import command
from blt.files import write_atomically
from blt.patch_rules import PatchConfig
from blt.records import RunRecord, load_model, read_record, record_beside, save_model
from blt_model import BLTConfig, uninitialized
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher

# The name of the copy in a BLT's output folder.
ENTROPY_MODEL = "entropy_model.pth"


def save_entropy_model(model, path="entropy_model.pth", **facts):
    """Write a `MinimalLLM` as a plain state dict, and its `RunRecord` as JSON beside it.

    facts: further fields of the record, such as settings, corpus and result.
    """
    if Path(path).suffix == ".json":
        raise ValueError(f"{path} is where the record goes; name the weights otherwise, such as entropy_model.pth")
    facts = {"settings": {}, "corpus": {"dataset": None, "sha256": None}} | facts
    record = RunRecord(kind="entropy", model_config=dataclasses.asdict(model_config_of(model)), **facts)
    save_model(model, path, record, record_beside(path))


def model_config_of(model):
    """The `EntropyConfig` of a `MinimalLLM`, without the settings of the run that a script's config has as well."""
    names = [field.name for field in dataclasses.fields(EntropyConfig)]
    return EntropyConfig(**{name: getattr(model.config, name) for name in names})


def load_entropy_model(path="entropy_model.pth", device="cpu", retrain=None):
    """Read a `MinimalLLM`, in evaluation mode, and its `RunRecord`.

    retrain: the command that makes it, for messages; None: that of the bundled sample.
    Raises FileNotFoundError or ValueError saying what to do.
    """
    path = Path(path)
    retrain = command("entropy_llm.py", output=path) if retrain is None else retrain
    for file in (path, record_beside(path)):
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; run: {retrain}")
    record = RunRecord.load(record_beside(path))
    if record.kind != "entropy":
        raise ValueError(f"{path} is not an entropy model but a model of kind {record.kind!r}; run: {retrain}")

    def make_model():
        return MinimalLLM(record.config(EntropyConfig))

    model = load_model(make_model, path, record, retrain)
    return model.eval().requires_grad_(False).to(device), record


def load_blt(folder, device="cpu"):
    """Read a trained BLT from its output folder: (BLTModel in fp32 and evaluation mode, EntropyPatcher, RunRecord).

    Raises FileNotFoundError or ValueError saying what to do.
    """
    folder = Path(folder)
    record = read_record(folder, "blt")

    def make_model():
        return uninitialized(record.config(BLTConfig), device)

    model = load_model(make_model, folder / "best.pt", record, command("llm.py", output=folder))
    patch_config = record.config(PatchConfig, "patch_config")
    entropy_model = entropy_model_of(folder, record, device)[0] if patch_config.needs_entropies else None
    return model.eval(), EntropyPatcher(entropy_model, patch_config, precision=record.precision), record


def entropy_model_path(folder, record):
    """Where a BLT's entropy model is: the copy in its output folder, else where training read it."""
    path = Path(record.entropy_model_path)
    folder = Path(folder)
    # Folders of earlier versions have no copy; the model may still be beside them.
    candidates = [folder / ENTROPY_MODEL, folder / path.name, path, folder.parent / path.name]
    for candidate in candidates:
        if candidate.exists() and _recorded_hash(candidate) == record.entropy_model_sha256:
            return str(candidate)
    # None is the right one; the error of whoever opens it names the first that is there.
    there = [candidate for candidate in candidates if candidate.exists()]
    return str(there[0] if there else path)


def _recorded_hash(path):
    """The hash of the weights that the record beside an entropy model names; None without a readable record."""
    try:
        return RunRecord.load(record_beside(path)).weights_sha256
    except (FileNotFoundError, ValueError):
        return None


def keep_entropy_model(path, sha256, folder, overwrite=False):
    """Copy an entropy model, weights and record, into a BLT's output folder, which then works wherever it is moved.

    sha256: the hash that the model must have.
    overwrite: another entropy model that is in the folder may be replaced.
    Raises ValueError if the copy is not that model.
    """
    path = Path(path)
    copy = Path(folder) / ENTROPY_MODEL
    if copy.exists() and _recorded_hash(copy) != sha256 and not overwrite:
        raise ValueError(f"{copy} is another entropy model; pass another --output, or --overwrite to replace it")
    if copy.exists() and copy.samefile(path):
        return
    # The record first: if this is stopped in between, weights without one would look like another model.
    for source, target in ((record_beside(path), record_beside(copy)), (path, copy)):
        write_atomically(target, partial(shutil.copyfile, source))
    # The file may have been replaced since it was opened.
    if load_entropy_model(copy)[1].weights_sha256 != sha256:
        raise ValueError(f"{path} was replaced while it was copied; run the same command again with --overwrite")


def entropy_model_of(folder, record, device="cpu"):
    """The entropy model that an output folder's BLT was trained with, and its record.

    Raises ValueError if another entropy model has taken its place.
    """
    path = entropy_model_path(folder, record)
    entropy_model, entropy_record = load_entropy_model(path, device)
    if entropy_record.weights_sha256 != record.entropy_model_sha256:
        raise ValueError(
            f"{folder} was trained on patches of another entropy model than {path} holds now; "
            "train again, or put that model back"
        )
    return entropy_model, entropy_record
