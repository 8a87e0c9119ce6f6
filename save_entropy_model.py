"""Save and load an entropy model: weights as a plain state dict (.pth), what made them as JSON of the same name."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from entropy_llm import EntropyConfig, MinimalLLM
from training import load_weights, save_weights, write_json


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
        raise ValueError(f"{path.with_suffix('.json')} is no record of an entropy model ({error}); run entropy_llm.py again") from None
    model = MinimalLLM(config)
    load_weights(path, model)
    if record.get("sha256") != model_hash(model):
        raise ValueError(f"{path} and {path.with_suffix('.json')} belong to different models; run entropy_llm.py again")
    return model.eval().requires_grad_(False).to(device), record


def model_hash(model):
    """sha256 over the names and values of a model's weights: the same for the same model on any device."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
