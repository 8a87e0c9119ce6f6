"""A trained model on disk: its weights, and the record beside them that says what it is and what made it.

    checkpoints/best.pt, checkpoints/model.json        a BLT or a baseline, in its output folder
    entropy_model.pth, entropy_model.json              an entropy model

`RunRecord` is what the JSON holds. `save_model` writes a finished pair and `load_model` reads one. During a
run the loop writes best.pt, and the record beside it has no hash yet.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from blt.commands import command
from blt.files import load_weights, model_hash, read_sealed, save_weights, state_hash, write_sealed

# The version of a record's file.
FORMAT = 2
# Which script trains a kind of model, with which flags, and what it is called in messages.
SCRIPTS = {
    "blt": ("llm.py", {}),
    "flat": ("template_llm.py", {"model": "flat"}),
    "bpe": ("template_llm.py", {"model": "bpe"}),
}
NAMES = {"blt": "BLT", "flat": "flat byte transformer", "bpe": "BPE transformer", "entropy": "entropy model"}


@dataclass
class RunRecord:
    """What is in model.json and entropy_model.json. Fields that do not apply to a kind of model are None."""

    kind: str  # blt, flat, bpe or entropy
    model_config: dict  # fields of BLTConfig, FlatConfig, BPEConfig or EntropyConfig
    settings: dict  # every setting of the run
    corpus: dict  # {"dataset", "sha256"} of the training text
    weights_sha256: str | None = None  # `files.model_hash` of the best weights; None until the run has ended
    result: dict | None = None  # val_bpb and the other results of the best weights; None until the run has ended
    # blt
    patch_config: dict | None = None  # fields of PatchConfig
    precision: str | None = None  # in which the entropies of the training patches were computed
    entropy_model_path: str | None = None  # where the entropy model was
    entropy_model_sha256: str | None = None  # its weights_sha256; None for patches without entropies
    init_from: dict | None = None  # the folder that training started from, its weights' hash and bits per byte
    # bpe
    bytes_per_token: float | None = None  # mean over the training text
    tokenizer_sha256: str | None = None  # of the file tokenizer.json
    # converted models
    converted_from: str | None = None  # folder or Hugging Face id
    commit: str | None = None  # of the code that converted it
    dtype: str | None = None  # of the weights

    def save(self, path):
        """Write the record as JSON with a hash of its own, aside and renamed."""
        write_sealed(path, {"format": FORMAT} | asdict(self))

    @classmethod
    def load(cls, path):
        """Read a record. Raises FileNotFoundError, or ValueError for a file that is no record or was changed."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} not found")
        values = _read_values(path)
        # Strict in both directions: a file with other keys was written by other code.
        known = {field.name for field in dataclasses.fields(cls)}
        needed = {"kind", "model_config", "settings", "corpus"}
        if not needed <= set(values) or not set(values) <= known:
            raise ValueError(
                f"{path} is not the record of a trained model: it needs {', '.join(sorted(needed))}; "
                "if an older version of these scripts wrote it, train the model again"
            )
        record = cls(**values)
        record.check(path)
        return record

    def check(self, path):
        """Raise ValueError, naming the file at path, unless the fields have values that a record can have."""
        if self.kind not in list(NAMES):
            raise ValueError(f"{path} describes a model of kind {self.kind!r}; it must be one of {', '.join(NAMES)}")
        for name in ("model_config", "settings", "corpus"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{path} is damaged: its {name} is no object; restore the file, or train again")
        needs_path = self.entropy_model_sha256 is not None
        if needs_path and not isinstance(self.entropy_model_path, str):
            raise ValueError(f"{path} is damaged: its entropy_model_path is no text; restore the file, or train again")
        if self.precision not in (None, "bf16", "fp16", "fp32"):
            raise ValueError(f"{path} is damaged: its precision is {self.precision!r}; it must be bf16, fp16 or fp32")

    def row_bytes(self):
        """The bytes of a row in training. Raises ValueError for a record that does not say it."""
        row_bytes = self.settings.get("row_bytes")
        if not isinstance(row_bytes, int) or row_bytes < 2:
            raise ValueError(
                "the record of this model does not say in which rows it was trained; "
                "pass --context_bytes (evaluate.py: --row_bytes)"
            )
        return row_bytes

    def config(self, config_class, name="model_config"):
        """The config in a field of the record. Raises ValueError for settings that are missing or too many.

        A missing setting must not become a default: the model would compute something else. An
        exception are the config class's ADDED_FIELDS, which earlier versions did not have.
        """
        file = "entropy_model.json" if self.kind == "entropy" else "model.json"
        start = f"{file} of the {NAMES[self.kind]} is damaged, or of another version"
        advice = "restore the file, or train again"
        values = getattr(self, name)
        if not isinstance(values, dict):
            raise ValueError(f"{start}: it has no {name}; {advice}")
        known = {field.name for field in dataclasses.fields(config_class)}
        added = set(getattr(config_class, "ADDED_FIELDS", ()))
        wrong = [f"lacks {key}" for key in sorted(known - set(values) - added)]
        wrong += [f"has {key}, which is no setting" for key in sorted(set(values) - known)]
        if wrong:
            raise ValueError(f"{start}: its {name} {', '.join(wrong)}; {advice}")
        try:
            return config_class(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{start}: in its {name}, {error}; {advice}") from None


def _read_values(path):
    """The dict in a record's file. Raises ValueError if it is no JSON, or is not as it was written."""
    advice = "restore the file, or train the model again"
    try:
        values = json.loads(path.read_text())
    # Brackets in brackets, thousands deep, are a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {advice}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not the record of a trained model; {advice}")
    # Records of before had neither a format nor a hash.
    if not {"format", "sha256"} & set(values):
        return values
    try:
        values = read_sealed(path, FORMAT)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    return {name: value for name, value in values.items() if name != "format"}


def record_beside(weights_path):
    """Where the record of weights in a file of their own is: entropy_model.json beside entropy_model.pth."""
    return Path(weights_path).with_suffix(".json")


def save_model(model, weights_path, record, record_path):
    """Write a model's weights and, with their hash in it, its record."""
    # The hash ties the two files together: `load_model` refuses a pair that does not belong together.
    record.weights_sha256 = model_hash(model)
    save_weights(weights_path, model)
    record.save(record_path)


def read_record(folder, *kinds):
    """The record in an output folder, whose model must be of one of these kinds (none: any but an entropy model)."""
    folder = Path(folder)
    kinds = kinds or ("blt", "flat", "bpe")
    for file in (folder / "model.json", folder / "best.pt"):
        if not file.exists():
            commands = [command(SCRIPTS[kind][0], **SCRIPTS[kind][1], output=folder) for kind in kinds]
            raise FileNotFoundError(f"{file} not found; run: {' or '.join(commands)}")
    record = RunRecord.load(folder / "model.json")
    if record.kind not in kinds:
        wanted = " or a ".join(NAMES[kind] for kind in kinds)
        raise ValueError(f"{folder} holds a {NAMES.get(record.kind, record.kind)}, not a {wanted}; pass another folder")
    return record


def load_model(make_model, weights_path, record, retrain):
    """Make a model and read its weights, which must be those that the record describes.

    make_model: called without arguments.
    retrain: the command that makes such a file, for the error message.
    Raises FileNotFoundError or ValueError.
    """
    if not Path(weights_path).exists():
        raise FileNotFoundError(f"{weights_path} not found; run: {retrain}")
    try:
        model = make_model()
    # Sizes that are numbers, but that no model can have.
    except (RuntimeError, MemoryError, OverflowError, TypeError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"the JSON beside {weights_path} describes a model that cannot be made ({reason}); "
            f"restore it, or run: {retrain}"
        ) from None
    # The file's weights are hashed, not the model's: a bf16 file may be read into an fp32 model.
    state = load_weights(weights_path, model)
    if record.weights_sha256 is not None and record.weights_sha256 != state_hash(state):
        raise ValueError(f"{weights_path} and the JSON beside it belong to different models; run: {retrain}")
    return model
