"""A trained model on disk: its weights, and the record beside them that says what it is and what made it.

    checkpoints/best.pt, checkpoints/model.json        a BLT or a baseline, in its output folder
    entropy_model.pth, entropy_model.json              an entropy model

`RunRecord` is what the JSON holds. `save_model` and `load_model` are the only code that writes
and reads such pairs.
"""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from blt.files import load_weights, model_hash, save_weights, state_hash, write_json

# Which script trains a kind of model, and what it is called in messages.
SCRIPTS = {"blt": "llm.py", "flat": "template_llm.py --model flat", "bpe": "template_llm.py --model bpe"}
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
    # converted models
    converted_from: str | None = None  # folder or Hugging Face id
    commit: str | None = None  # of the code that converted it
    dtype: str | None = None  # of the weights

    def save(self, path):
        """Write the record as JSON, aside and renamed."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path):
        """Read a record. Raises FileNotFoundError, or ValueError for a file that is no record."""
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} not found")
        try:
            values = json.loads(path.read_text())
        # RecursionError: thousands of brackets, one inside the other.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}; restore the file, or train the model again") from None
        # Strict in both directions: a file with other keys was written by other code.
        known = {field.name for field in dataclasses.fields(cls)}
        needed = {"kind", "model_config", "settings", "corpus"}
        if not isinstance(values, dict) or not needed <= set(values) or not set(values) <= known:
            raise ValueError(
                f"{path} is not the record of a trained model: it needs {', '.join(sorted(needed))}; "
                "if an older version of these scripts wrote it, train the model again"
            )
        dicts = {
            "model_config": dict,
            "settings": dict,
            "corpus": dict,
            "kind": str,
            "patch_config": (dict, type(None)),
        }
        for name, wanted in dicts.items():
            if not isinstance(values.get(name), wanted):
                raise ValueError(
                    f"{path} is damaged: its {name} is {values.get(name)!r:.40}; restore it, or train again"
                )
        return cls(**values)


def config_from(config_class, values, path):
    """A config of the values in a record. Raises ValueError, which names the record's path, if they do not fit."""
    # TypeError: a name that the class does not have, or a word in place of a number.
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not fit this version ({error}); restore the file, or train the model again"
        ) from None


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
            commands = " or ".join(f"python {SCRIPTS[kind]} --output {folder}" for kind in kinds)
            raise FileNotFoundError(f"{file} not found; run: {commands}")
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
    model = make_model()
    # The file's weights are hashed, not the model's: a bf16 file may be read into an fp32 model.
    state = load_weights(weights_path, model)
    if record.weights_sha256 is not None and record.weights_sha256 != state_hash(state):
        raise ValueError(f"{weights_path} and the JSON beside it belong to different models; run: {retrain}")
    return model
