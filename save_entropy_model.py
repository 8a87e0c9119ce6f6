"""Save and load an entropy model: weights as a plain state dict (.pth), what made them as JSON of the same name."""

import dataclasses
import json
from pathlib import Path

from blt.files import load_weights, model_hash, save_weights, write_json
from blt.patch_rules import NEEDS_ENTROPIES, PatchConfig
from blt_model import BLTConfig, uninitialized
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher


def load_blt(folder, device="cpu"):
    """Read a trained model from its output folder: (BLTModel in fp32, EntropyPatcher, the record in model.json)."""
    folder = Path(folder)
    record = read_record(folder)
    model = uninitialized(BLTConfig(**record["model_config"]), device)
    load_weights(folder / "best.pt", model)
    patch_config = PatchConfig(**record["patch_config"])
    entropy_model = None
    if patch_config.method in NEEDS_ENTROPIES:
        entropy_model, _ = entropy_model_of(folder, record, device)
    return model.eval(), EntropyPatcher(entropy_model, patch_config, precision=record["precision"]), record


def read_record(folder):
    """The record in the model.json of an output folder of a BLT."""
    folder = Path(folder)
    for file in (folder / "model.json", folder / "best.pt"):
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; run: python llm.py --output {folder}")
    record = json.loads((folder / "model.json").read_text())
    if "patch_config" not in record:
        raise ValueError(
            f"{folder} holds no BLT but a baseline without patches; read it with template_llm.load_template"
        )
    return record


def entropy_model_path(folder, record):
    """Where the entropy model of an output folder lies: in it (convert_hf.py writes it there), else where it was in training."""
    path = Path(record["entropy_model_path"])
    inside = Path(folder) / path.name
    return str(inside if inside.exists() else path)


def entropy_model_of(folder, record, device="cpu"):
    """The entropy model that an output folder's BLT was trained with, and its record. Raises ValueError if another is in its place."""
    path = entropy_model_path(folder, record)
    entropy_model, entropy_record = load_entropy_model(path, device)
    if entropy_record["sha256"] != record["entropy_model_sha256"]:
        raise ValueError(
            f"{folder} was trained on patches of another entropy model than {path} holds now; train again, or put that model back"
        )
    return entropy_model, entropy_record


def save_entropy_model(model, path="entropy_model.pth", metadata=None):
    """Write the weights to path and {"config", "sha256", **metadata} to the .json beside it."""
    path = Path(path)
    record = {"config": dataclasses.asdict(model.config), "sha256": model_hash(model), **(metadata or {})}
    save_weights(path, model)
    write_json(path.with_suffix(".json"), record)


def load_entropy_model(path="entropy_model.pth", device="cpu"):
    """Read a `MinimalLLM` in evaluation mode, and its JSON record. Raises FileNotFoundError or ValueError saying what to do."""
    path = Path(path)
    for file in (path, path.with_suffix(".json")):
        if not file.exists():
            raise FileNotFoundError(f"{file} not found; run: python entropy_llm.py --output {path}")
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        known = {field.name for field in dataclasses.fields(EntropyConfig)}
        config = EntropyConfig(**{name: value for name, value in record["config"].items() if name in known})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path.with_suffix('.json')} is no record of an entropy model ({error}); run entropy_llm.py again"
        ) from None
    model = MinimalLLM(config)
    load_weights(path, model)
    if record.get("sha256") != model_hash(model):
        raise ValueError(f"{path} and {path.with_suffix('.json')} belong to different models; run entropy_llm.py again")
    return model.eval().requires_grad_(False).to(device), record
