"""Models on disk: files that are whole, the record beside the weights, and what is refused."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import TINY_BLT, tiny_blt, tiny_entropy_model, write_blt

from blt import records
from blt.files import model_hash, save_weights, write_atomically
from blt.patch_rules import PatchConfig
from blt.records import RunRecord, load_model, read_record, save_model
from blt_model import BLTConfig, BLTModel
from save_entropy_model import load_blt, load_entropy_model, save_entropy_model
from template_llm import load_template

RETRAIN = "python llm.py --output checkpoints"


def record_of(model, **facts):
    corpus = {"dataset": "sample", "sha256": "abc"}
    return RunRecord("blt", asdict(model.config), settings={"seed": 7}, corpus=corpus, **facts)


@pytest.fixture
def saved(tmp_path):
    """(weights, record file, model, record) of a model that was saved."""
    model = tiny_blt()
    record = record_of(model, patch_config=asdict(PatchConfig("static", 4.0)), precision="fp32")
    save_model(model, tmp_path / "best.pt", record, tmp_path / "model.json")
    return tmp_path / "best.pt", tmp_path / "model.json", model, record


def make():
    return BLTModel(BLTConfig(**TINY_BLT))


# Files


def test_a_reader_never_sees_half_a_file(tmp_path):
    """A file that is open while it is written again stays as it was; the next reader gets the new one."""
    path = tmp_path / "file"
    path.write_text("old")
    with open(path) as reader:
        write_atomically(path, lambda temporary: Path(temporary).write_text("new and longer"))
        assert reader.read() == "old"
    assert path.read_text() == "new and longer"


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "full"), RuntimeError("[enforce fail at inline_container.cc:659] .")])
def test_a_full_disk_names_the_file(tmp_path, error):
    def fail(temporary):
        raise error

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "best.pt", fail)
    assert caught.value.filename == str(tmp_path / "best.pt") and not list(tmp_path.iterdir())


# Records


def test_a_record_comes_back_as_it_was(tmp_path):
    record = record_of(
        tiny_blt(), result={"val_bpb": 1.5}, init_from={"folder": "there"}, bytes_per_token=3.5, precision="bf16"
    )
    record.save(tmp_path / "new" / "model.json")
    assert RunRecord.load(tmp_path / "new" / "model.json") == record
    # The fields that do not apply are in the file too, so that a reader sees which there are.
    values = json.loads((tmp_path / "new" / "model.json").read_text())
    assert values.pop("format") == records.FORMAT and len(values.pop("sha256")) == 64
    assert values == asdict(record)


OLDER = {"model_config": {}, "patch_config": {}, "precision": "fp32", "entropy_model_sha256": "abc", "result": {}}


@pytest.mark.parametrize(
    "text",
    [
        "not JSON",
        '{"kind": "blt"',
        "",
        "[]",
        "3",
        json.dumps({"kind": "blt", "model_config": {}, "settings": {}}),
        json.dumps({"kind": "blt", "model_config": {}, "settings": {}, "corpus": {}, "colour": "red"}),
        json.dumps(OLDER),
    ],
    ids=["text", "half a file", "empty", "a list", "a number", "a key is missing", "an unknown key", "older format"],
)
def test_a_file_that_is_no_record_gets_one_clear_error(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="model.json is no.*train the model again") as caught:
        RunRecord.load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_only_fields_that_were_added_may_be_missing(saved):
    """A model of earlier code is what the defaults of later fields say; without any other field nobody knows."""
    record = RunRecord.load(saved[1])
    for name in BLTConfig.ADDED_FIELDS:
        del record.model_config[name]
    assert record.config(BLTConfig) == saved[2].config
    del record.model_config["window"]
    with pytest.raises(ValueError, match="lacks window"):
        record.config(BLTConfig)


def test_a_missing_record_names_its_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json not found"):
        RunRecord.load(tmp_path / "model.json")


def test_folders_are_read_by_kind(tmp_path):
    folder = write_blt(tmp_path / "checkpoints", tiny_blt(), PatchConfig("static", 4.0))
    assert read_record(folder).kind == read_record(folder, "blt").kind == "blt"
    with pytest.raises(ValueError, match="holds a BLT, not a flat byte transformer or a BPE transformer"):
        read_record(folder, "flat", "bpe")
    with pytest.raises(ValueError, match="holds a BLT"):
        load_template(folder)
    with pytest.raises(FileNotFoundError, match=r"none/model.json not found; run: python llm.py --output \S*none$"):
        read_record(tmp_path / "none", "blt")
    with pytest.raises(FileNotFoundError, match="python template_llm.py --model flat"):
        read_record(tmp_path / "none")
    (folder / "best.pt").unlink()
    with pytest.raises(FileNotFoundError, match="best.pt not found; run: python llm.py"):
        load_blt(folder)


# Weights


def test_a_model_comes_back_with_its_weights(saved):
    weights, path, model, record = saved
    assert record.weights_sha256 == model_hash(model)
    again = load_model(make, weights, RunRecord.load(path), RETRAIN)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_weights_of_another_model_are_refused(saved):
    weights, path, _, record = saved
    save_weights(weights, tiny_blt(seed=1))
    with pytest.raises(ValueError, match=f"best.pt and the JSON beside it belong to different models; run: {RETRAIN}"):
        load_model(make, weights, record, RETRAIN)
    # A run that has not ended has written weights, but not yet their hash.
    record.weights_sha256 = None
    load_model(make, weights, record, RETRAIN)
    save_weights(weights, tiny_blt(hash_rows=128))
    with pytest.raises(ValueError, match="best.pt does not hold the model that the JSON beside it describes"):
        load_model(make, weights, record, RETRAIN)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"best.pt not found; run: {RETRAIN}"):
        load_model(make, weights, record, RETRAIN)


def test_a_bf16_file_is_read_into_an_fp32_model(tmp_path):
    model = tiny_blt().bfloat16()
    record = record_of(model, dtype="bfloat16")
    save_model(model, tmp_path / "best.pt", record, tmp_path / "model.json")
    again = load_model(make, tmp_path / "best.pt", RunRecord.load(tmp_path / "model.json"), RETRAIN)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.equal(a, b.float()) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["junk", "truncated"])
def test_a_damaged_blt_gets_an_error_that_says_what_to_do(tmp_path, damage):
    model = tiny_blt()
    folder = write_blt(tmp_path / "checkpoints", model, PatchConfig("static", 4.0))
    loaded, patcher, _ = load_blt(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert patcher.config.method == "static" and not loaded.training
    whole = (folder / "best.pt").read_bytes()
    (folder / "best.pt").write_bytes(b"junk" if damage == "junk" else whole[:-100])
    with pytest.raises(ValueError, match="best.pt does not hold .* train it again"):
        load_blt(folder)


def test_saving_is_atomic(saved, monkeypatch):
    """A save that fails leaves both files as they were."""
    weights, path, model, record = saved
    before = (weights.read_bytes(), path.read_bytes())

    def full_disk(value, temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_model(tiny_blt(seed=1), weights, record_of(model), path)
    assert (weights.read_bytes(), path.read_bytes()) == before
    assert sorted(entry.name for entry in weights.parent.iterdir()) == ["best.pt", "model.json"]


def test_a_crash_between_weights_and_record_is_noticed(saved, monkeypatch):
    weights, path, model, record = saved

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_sealed", crash)
        with pytest.raises(KeyboardInterrupt):
            save_model(tiny_blt(seed=1), weights, record_of(model), path)
    with pytest.raises(ValueError, match="different models"):
        load_model(make, weights, RunRecord.load(path), RETRAIN)


# Entropy models


def test_an_entropy_model_comes_back(tmp_path):
    entropy_model = tiny_entropy_model()
    path = tmp_path / "entropy_model.pth"
    save_entropy_model(entropy_model, path, result={"val_bpb": 3.0})
    loaded, record = load_entropy_model(path)
    assert record.kind == "entropy" and record.result == {"val_bpb": 3.0}
    assert record.weights_sha256 == model_hash(loaded) == model_hash(entropy_model)
    assert loaded.config == entropy_model.config and not loaded.training
    # The file is a plain state dict, which other code can read.
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in entropy_model.state_dict().items())


def test_a_damaged_entropy_model_is_refused(tmp_path):
    path = tmp_path / "entropy_model.pth"
    save_entropy_model(tiny_entropy_model(), path)
    save_weights(path, tiny_entropy_model(seed=1))
    with pytest.raises(ValueError, match="different models; run: python entropy_llm.py --output"):
        load_entropy_model(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not hold"):
        load_entropy_model(path)
    with pytest.raises(FileNotFoundError, match="none.pth not found; run: python entropy_llm.py"):
        load_entropy_model(tmp_path / "none.pth")
    record_of(tiny_blt()).save(path.with_suffix(".json"))
    with pytest.raises(ValueError, match="is not an entropy model but a model of kind 'blt'"):
        load_entropy_model(path)


def test_a_blt_wants_the_entropy_model_that_made_its_patches(tmp_path):
    folder = write_blt(tmp_path / "checkpoints", tiny_blt(), PatchConfig("global", 5.0), tiny_entropy_model())
    assert load_blt(folder)[1].entropy_model is not None
    save_entropy_model(tiny_entropy_model(seed=1), tmp_path / "entropy_model.pth")
    with pytest.raises(ValueError, match="trained on patches of another entropy model"):
        load_blt(folder)
    # One inside the folder, as convert_hf.py writes it, comes first.
    save_entropy_model(tiny_entropy_model(), folder / "entropy_model.pth")
    assert load_blt(folder)[1].entropy_model is not None
