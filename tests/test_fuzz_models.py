"""Damaged and hostile files of trained models and of checkpoints: one clear error each, and nothing wrong is used."""

import io
import os
import resource
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import some_words, tiny_blt, tiny_entropy_model, write_blt

from blt import checkpoints
from blt.files import model_hash
from blt.optimizers import make_optimizers
from blt.patch_rules import PatchConfig
from blt.training import PatchedDataset, TrainingConfig, train_blt
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt

# BLT_FUZZ_CASES=1000 makes that many cases of each kind; without it a sample.
CASES = int(os.environ.get("BLT_FUZZ_CASES", 60))
FILES = ("model.json", "best.pt", "entropy_model.json", "entropy_model.pth")


def damaged(rng, data, other):
    """A file's bytes after one random damage: cut, changed in a few bytes, or mixed with another file."""
    data = bytearray(data)
    kind = rng.choice(["cut", "flip", "swap", "whole", "grow", "zero"])
    place = int(rng.integers(len(data)))
    if kind == "cut":
        del data[place:]
    elif kind == "flip":
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] ^= 1 << int(rng.integers(8))
    elif kind == "swap":
        data[place:] = other[place:]
    elif kind == "whole":
        data[:] = other
    elif kind == "grow":
        data[place:place] = rng.bytes(int(rng.integers(1, 100)))
    else:
        data[place : place + int(rng.integers(1, 5000))] = b"\0" * min(len(data) - place, 100)
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_is_refused_or_unharmed(tmp_path, name):
    """A random damage of one file of a trained folder. Only bytes that hold no weight may change unnoticed."""
    rule = PatchConfig("global", 5.0)
    folders = [
        write_blt(tmp_path / f"of {seed}" / "checkpoints", tiny_blt(seed), rule, tiny_entropy_model(seed))
        for seed in range(2)
    ]
    for folder in folders:
        for file in FILES[2:]:
            os.replace(folder.parent / file, folder / file)
    model, patcher, record = load_blt(folders[0])
    right = model_hash(model), model_hash(patcher.entropy_model), record
    data, other = ((folder / name).read_bytes() for folder in folders)
    rng = np.random.default_rng(0)
    unharmed = 0
    for _ in range(CASES):
        new = damaged(rng, data, other)
        if new == data:
            continue
        (folders[0] / name).write_bytes(new)
        try:
            model, patcher, record = load_blt(folders[0])
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error), error
            continue
        # Padding and dates of a zip file. A record has no such bytes.
        assert name.endswith(("pt", "pth"))
        assert (model_hash(model), model_hash(patcher.entropy_model), record) == right
        unharmed += 1
    assert unharmed < CASES / 2


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(path of a small checkpoint, its config)."""
    folder = tmp_path_factory.mktemp("run")
    patcher = EntropyPatcher(None, method="space")
    data = PatchedDataset.from_documents([some_words(200)], [some_words(40, 1)], patcher, 64, 4)
    config = TrainingConfig(
        output=str(folder), row_bytes=64, batch_rows=4, steps=2, eval_every=1, device="cpu", precision="fp32"
    )
    train_blt(tiny_blt(), data, config)
    return folder / "last.pt", config


def load(path, config):
    """Read a checkpoint as a resumed run does."""
    model = tiny_blt()
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    depends_on = torch.load(path.with_name("right.pt"), weights_only=True)["depends_on"]
    return checkpoints.load_checkpoint(path, model, optimizers, scaler, config, depends_on)


def with_hash(path, data):
    """Write bytes to a file with a right hash line: what an attacker would do."""
    path.write_bytes(data)
    line = checkpoints._hash_line(path, len(data))
    path.write_bytes(data + line)


def hostile(rng, data):
    """A checkpoint's zip file with a changed pickle, and right checksums in the zip."""
    source = zipfile.ZipFile(io.BytesIO(data))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as zipped:
        for name in source.namelist():
            content = bytearray(source.read(name))
            if name.endswith("data.pkl"):
                for at in rng.integers(len(content), size=rng.integers(1, 12)):
                    content[at] = int(rng.integers(256))
                if rng.random() < 0.2:
                    place = int(rng.integers(len(content)))
                    content[place:place] = content[place : place + int(rng.integers(1, 200))] * int(rng.integers(1, 50))
            zipped.writestr(name, bytes(content))
    return target.getvalue()


@pytest.mark.parametrize("kind", ["damaged", "hostile"])
def test_fuzzed_checkpoints(checkpoint, tmp_path, kind):
    path, config = checkpoint
    whole = path.read_bytes()
    data = whole[: -checkpoints.HASH_LINE_BYTES]
    shutil.copy(path, tmp_path / "right.pt")
    rng = np.random.default_rng(1)
    bad = tmp_path / "last.pt"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for _ in range(CASES):
        if kind == "damaged":
            with_hash(bad, damaged(rng, data, data[::-1]))
        else:
            with_hash(bad, hostile(rng, data))
        began = time.perf_counter()
        try:
            state = load(bad, config)
        except ValueError as error:
            assert "\n" not in str(error), error
            refused += 1
        else:
            assert state["step"] == 2
        assert time.perf_counter() - began < 5
        bad.with_name("last.pt.damaged").unlink(missing_ok=True)
    assert refused > CASES / 2
    # In kB. A checkpoint of 300 kB must not cost hundreds of megabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000


WRONG_PARTS = [
    ("step", "x"), ("step", -1), ("settings", []), ("depends_on", 3), ("model", {}), ("model", [1]),
    ("model", {"head.weight": 1}), ("optimizers", None), ("optimizers", []), ("optimizers", [{}, {}, {}]),
    ("scaler", None), ("random", torch.zeros(3)), ("random", "x"), ("random_cuda", 5), ("best", 7), ("last", 5),
    ("bytes", "many"), ("seconds", None), ("evaluated", {}), ("lowest_loss", "low"), ("validation_sha256", 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG_PARTS, ids=[f"{name} {value}" for name, value in WRONG_PARTS])
@pytest.mark.parametrize("is_missing", [False, True])
def test_a_checkpoint_with_a_wrong_part_is_refused(checkpoint, tmp_path, name, value, is_missing):
    path, config = checkpoint
    content = torch.load(path, weights_only=True)
    if is_missing:
        if name == "lowest_loss":
            return
        del content[name]
    else:
        content[name] = value
    shutil.copy(path, tmp_path / "right.pt")
    torch.save(content, tmp_path / "last.pt")
    with_hash(tmp_path / "last.pt", (tmp_path / "last.pt").read_bytes())
    with pytest.raises(ValueError, match=r"^[^\n]*last.pt[^\n]*$"):
        load(tmp_path / "last.pt", config)
