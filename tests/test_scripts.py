"""Every script with tiny settings, in pipeline order; pictures and files; errors in one line.

The three main scripts run as commands (the fixture `pipeline`), the others in this process. Each of the others
runs as a command once too, in `test_other_scripts_as_commands` or in the test file of its own.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import (
    BLT_FLAGS,
    CORPUS_FLAGS,
    ENTROPY_FLAGS,
    ROOT,
    SCRIPTS,
    entry_point,
    error_of,
    is_png,
    output_of,
    run_command,
    run_here,
)

from blt.config import field_comments
from blt.corpus import open_corpus
from blt.entropy_cache import open_entropies
from blt.patch_rules import PatchConfig, count_sizes, patch_sizes
from blt.records import RunRecord
from blt.training_patches import training_patch_sizes, training_starts
from entropy_llm import EntropyRunConfig
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_entropy_model

# What the pipeline leaves


def test_entropy_model_files(pipeline):
    folder, printed = pipeline
    state = torch.load(folder / "entropy_model.pth", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    record = RunRecord.load(folder / "entropy_model.json")
    assert record.kind == "entropy" and record.model_config["d_model"] == 32
    assert len(record.corpus["sha256"]) == 64 and 0 < record.result["val_bpb"] < 8
    assert is_png(folder / "entropy_model_run" / "curves.png")
    assert "leak gate passed" in printed["entropy_llm"]
    # With the folder of the script that ran, so that the command runs from here.
    assert re.search(r"next: python \S*create_patches.py --", printed["entropy_llm"])


def test_patch_files(pipeline):
    folder, printed = pipeline
    saved = json.loads((folder / "patch_cache" / "patches.json").read_text())
    # The default target, as near as this model comes: after 12 updates its entropies have few different values.
    assert saved["statistics"]["avg_patch_size"] == pytest.approx(4.5, abs=0.5)
    assert "percentiles" in printed["create_patches"] and "thresholds for global" in printed["create_patches"]
    assert is_png(folder / "patch_cache" / "entropy.png") and is_png(folder / "patch_cache" / "patch_sizes.png")
    assert (folder / "patch_cache" / "patches.html").stat().st_size > 10_000
    (cache,) = (folder / "patch_cache").glob("entropies-*")
    manifest = json.loads((cache / "manifest.json").read_text())
    assert {"corpus_sha256", "entropy_model_sha256", "dtype"} <= set(manifest)


def test_blt_files(pipeline):
    folder, printed = pipeline
    line = r"val \d\.\d+ bpb over [\d,]+ bytes .*gzip -9 \d\.\d+, xz -9 \d\.\d+"
    assert re.search(line, printed["llm"])
    assert "leak gate passed" in printed["llm"] and "continuation of" in printed["llm"]
    for name in ("best.pt", "last.pt", "model.json", "metrics.jsonl"):
        assert (folder / "checkpoints" / name).exists()
    assert is_png(folder / "checkpoints" / "curves.png")
    record = RunRecord.load(folder / "checkpoints" / "model.json")
    assert record.entropy_model_sha256 == RunRecord.load(folder / "entropy_model.json").weights_sha256


@pytest.fixture
def entropies_of_pipeline(pipeline):
    """(corpus, entropy cache, patcher) of the pipeline's folder."""
    folder, _ = pipeline
    corpus = open_corpus("sample", cache_dir=str(folder / "data_cache"))
    model, record = load_entropy_model(folder / "entropy_model.pth")
    cache = open_entropies(folder / "patch_cache", corpus, record, "entropy_model.pth")
    patcher = EntropyPatcher(model, PatchConfig(entropy_threshold=3.0), precision=cache.manifest["precision"])
    return corpus, cache, patcher


def test_cached_entropies_are_the_live_ones(entropies_of_pipeline):
    corpus, cache, patcher = entropies_of_pipeline
    for place in (0, 3, len(cache.train)):
        (live,) = patcher.entropies_with_end([corpus.document(cache.numbers[place])])
        np.testing.assert_allclose(cache.document(place), live, atol=0.1 if patcher.precision == "bf16" else 2e-3)
        assert np.abs(cache.document(place) - live).mean() < 0.02


def test_starts_of_a_corpus_are_those_of_each_document(entropies_of_pipeline):
    corpus, cache, patcher = entropies_of_pipeline
    documents = [corpus.document(number) for number in cache.train]
    starts_of_each = [patcher.starts(document, cache.document(i)) for i, document in enumerate(documents)]
    starts = training_starts(corpus, cache.train, patcher.config, cache)
    # The stream begins with a boundary, which is a patch of its own.
    assert starts.read(0, len(starts)).tolist() == np.concatenate([[True], *starts_of_each]).tolist()
    sizes = np.concatenate([patch_sizes(is_start[:-1]) for is_start in starts_of_each])
    assert training_patch_sizes(starts, corpus, cache.train) == count_sizes(sizes)
    for method, level in (("space", 1.0), ("static", 5.0)):
        other = EntropyPatcher(None, PatchConfig(method, level))
        starts = training_starts(corpus, cache.train, other.config)
        expected = np.concatenate([[True], *(other.starts(document) for document in documents)])
        assert starts.read(0, len(starts)).tolist() == expected.tolist()


# Using what was trained


def test_generation(pipeline):
    flags = ["--prompt", "The ", "--max_new_bytes", 5, "--device", "cpu", "--draft_bytes", 3]
    assert output_of(pipeline[0], "generate", *flags).startswith("The ")


def test_what_was_trained_compresses(pipeline, tmp_path):
    text = b"The history of the world, in bytes. " * 8
    (tmp_path / "some.txt").write_bytes(text)
    printed = output_of(pipeline[0], "compress", tmp_path / "some.txt", "--streams", 2, "--device", "cpu")
    assert "restored and compared" in printed
    assert (tmp_path / "some.txt.blt").stat().st_size < len(text)
    flags = ["--decompress", tmp_path / "some.txt.blt", "--output", tmp_path / "back.txt", "--device", "cpu"]
    output_of(pipeline[0], "compress", *flags)
    assert (tmp_path / "back.txt").read_bytes() == text


# Running again


def test_repatching_needs_no_model_pass(pipeline_copy):
    chosen = ["--method", "monotonic", "--target_patch_size", 6]
    assert "is there already" in output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, *chosen)
    statistics = json.loads((pipeline_copy / "patch_cache" / "patches.json").read_text())["statistics"]
    assert statistics["avg_patch_size"] == pytest.approx(6, abs=0.4)
    chosen = ["--method", "bpe", "--bpe_vocab_size", 400]
    assert "bpe" in output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, *chosen)
    assert "looks ahead" in error_of(pipeline_copy, "llm", *BLT_FLAGS)


@pytest.mark.parametrize("threshold, words", [(0.001, "1.00 bytes a patch"), (9.0, "documents")])
def test_extreme_thresholds_warn_with_numbers(pipeline_copy, threshold, words):
    printed = output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, "--entropy_threshold", threshold)
    assert "warning" in printed and words in printed


def test_another_entropy_model_is_refused(pipeline_copy):
    output_of(pipeline_copy, "entropy_llm", *ENTROPY_FLAGS, "--seed", 2)
    line = error_of(pipeline_copy, "llm", *BLT_FLAGS)
    assert "another entropy model" in line and "run: python create_patches.py" in line
    # The trained folder has a copy of its own.
    flags = ["--prompt", "The ", "--max_new_bytes", 5, "--device", "cpu"]
    assert output_of(pipeline_copy, "generate", *flags).startswith("The ")


def test_resume(pipeline_copy):
    assert "at step 12" in output_of(pipeline_copy, "llm", *BLT_FLAGS, "--resume")


# The other scripts

WORKFLOW_FLAGS = "--quick_demo --train_entropy --entropy_steps 4 --methods global static".split()


def copy_entropy_model(folder, target):
    for name in ("entropy_model.pth", "entropy_model.json"):
        shutil.copy(folder / name, target)
    (target / "data_cache").symlink_to(folder / "data_cache")


def check_workflow(folder, printed, seeds):
    rows = json.loads((folder / "workflow" / "comparison.json").read_text())
    assert {row["method"] for row in rows} == {"global", "static"}
    assert all(len(row["val_bpb_of_each_seed"]) == seeds and ("std" in row) == (seeds > 1) for row in rows)
    assert all(2 < row["avg_patch_size"] < 9 and 0 < row["val_bpb"] < 8 for row in rows)
    assert is_png(folder / "workflow" / "comparison.png") and "| global |" in printed


def test_train_blt_in_one_go(pipeline, tmp_path):
    copy_entropy_model(pipeline[0], tmp_path)
    printed = output_of(tmp_path, "train_blt", "--quick_demo", *BLT_FLAGS)
    assert "entropies:" in printed and re.search(r"val \d\.\d+ bpb", printed)


def test_large_model_in_small(pipeline_copy):
    assert "val " in output_of(pipeline_copy, "llm_large", *BLT_FLAGS)
    assert (pipeline_copy / "checkpoints_large" / "best.pt").exists()


def test_complete_workflow(pipeline, tmp_path, monkeypatch):
    (tmp_path / "data_cache").symlink_to(pipeline[0] / "data_cache")
    # The workflow trains its entropy model as the preset says; a smaller validation text saves seconds.
    machines = EntropyRunConfig.PRESETS.machines
    monkeypatch.setitem(machines, "cpu", machines["cpu"] | {"val_bytes": 20000})
    flags = [*WORKFLOW_FLAGS, *BLT_FLAGS, "--seeds", 2]
    check_workflow(tmp_path, output_of(tmp_path, "complete_entropy_workflow", *flags), seeds=2)


SLOW_COMMAND = pytest.param("complete_entropy_workflow", marks=pytest.mark.slow)


@pytest.mark.parametrize("script", ["train_blt", "llm_large", SLOW_COMMAND, "generate", "compress"])
def test_other_scripts_as_commands(script, pipeline, pipeline_copy, tmp_path):
    (tmp_path / "some.txt").write_bytes(b"The history of the world. " * 8)
    flags = {
        "train_blt": ["--quick_demo", *BLT_FLAGS, "--output", "of_train_blt"],
        "llm_large": BLT_FLAGS,
        "complete_entropy_workflow": [*WORKFLOW_FLAGS, *BLT_FLAGS, "--entropy_model_path", "other.pth"],
        "generate": ["--prompt", "The ", "--max_new_bytes", 5, "--device", "cpu"],
        "compress": [tmp_path / "some.txt", "--streams", 2, "--device", "cpu"],
    }[script]
    if script == "complete_entropy_workflow":
        # Its entropy model is another one, so it needs an empty cache.
        shutil.rmtree(pipeline_copy / "patch_cache")
    printed = run_command(pipeline_copy, script, *flags)
    words = {"generate": "The ", "compress": "restored and compared"}.get(script, "bpb")
    assert words in printed
    if script == "complete_entropy_workflow":
        check_workflow(pipeline_copy, printed, seeds=1)


# Mistakes


@pytest.fixture(scope="module")
def folder_of_mistakes(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes") / "copy"
    shutil.copytree(pipeline[0], folder, ignore=shutil.ignore_patterns("data_cache"))
    (folder / "data_cache").symlink_to(pipeline[0] / "data_cache")
    (folder / "empty.txt").touch()
    (folder / "empty_folder").mkdir()
    (folder / "records.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')
    return folder


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("llm", "--dataset no_such_file.txt", "not found"),
        ("llm", "--steps 0", "steps is 0"),
        ("llm", "--nonsense 1", "unknown flags"),
        ("llm", "--preset nonsense", "unknown preset"),
        ("llm", "--preset small medium", "set the same fields"),
        ("llm", "--max_bytes 5000000", "python create_patches.py"),
        ("llm", "--entropy_model_path none.pth --patch_method global", "python entropy_llm.py"),
        ("llm", "--patch_cache none", "python create_patches.py"),
        ("llm", "--patch_method space --target_patch_size 6", "leave out target_patch_size"),
        ("llm", "--device abacus", "device is 'abacus'"),
        ("llm_large", "--global_dim 33 --preset cpu", "33"),
        ("complete_entropy_workflow", "--epochs 1", "use --steps instead of --epochs"),
        ("entropy_llm", "--d_model 30 --n_heads 4", "d_model is 30"),
        ("entropy_llm", "--dataset empty.txt", "empty"),
        ("entropy_llm", "--dataset empty_folder", "empty_folder"),
        ("entropy_llm", "--dataset records.jsonl --text_field body", "text field 'body' not found"),
        ("entropy_llm", "--data_cache empty.txt/cache", "empty.txt"),
        ("create_patches", "--min_patch_size 0", "min_patch_size is 0"),
        ("create_patches", "--target_patch_size 0.5", "target_patch_size is 0.5"),
        ("create_patches", "--entropy_model_path records.jsonl", "not found"),
        ("create_patches", "--cache_dir empty.txt/cache", "empty.txt"),
        ("create_patches", "--method greedy", "choose from global, monotonic"),
        ("train_blt", "--entropy_model_path none.pth --quick_demo", "python entropy_llm.py"),
        ("complete_entropy_workflow", "--methods bpe", "invalid choice: 'bpe'"),
        ("generate", "--model none", "python llm.py"),
        ("generate", "--draft_bytes 500", "draft_bytes is 500"),
        ("compress", "records.jsonl --model none", "python llm.py"),
        ("template_llm", "--model bpe --vocab_size 3", "vocab_size is 3"),
    ],
)
def test_mistakes_get_one_line(folder_of_mistakes, script, flags, words):
    def times():
        files = (path for path in folder_of_mistakes.rglob("*") if path.is_file())
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    flags = flags.split()
    if script in ("llm", "entropy_llm", "train_blt"):
        # Checked first: the folder holds a run of these scripts.
        flags += ["--output", "new.pth"]
    assert words in error_of(folder_of_mistakes, script, *flags)
    # Nothing is lost, and no output is begun that a user would take for a result.
    assert before.items() <= times().items()


# Help, and imports without side effects


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(tmp_path, script):
    status, printed, errors = run_here(tmp_path, script, "--help")
    assert status == 0 and errors == ""
    assert "Run     python" in printed and "default:" in printed


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_has_help(script):
    config_class = entry_point(script)[1]
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        assert field.metadata.get("help") or comments.get(field.name), f"{field.name} has no comment at its line's end"


@pytest.fixture(scope="module")
def fresh_interpreter(tmp_path_factory):
    """What a new process has imported after each step: {step: modules}, its random state, and what it leaves."""
    folder = tmp_path_factory.mktemp("fresh")
    steps = f"""
import json, sys
import torch
seen, modules = set(sys.modules), {{}}
import blt_model
modules["blt_model"] = sorted(set(sys.modules) - seen)
from blt.config import parse_config
from llm import LLMConfig
parse_config(LLMConfig, "", ["--steps", "5"])
modules["llm's settings"] = sorted(set(sys.modules) - seen)
before = torch.get_rng_state()
import {", ".join(SCRIPTS)}
print(json.dumps([modules, torch.equal(before, torch.get_rng_state())]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", steps], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    modules, is_same_state = json.loads(line)
    return {step: {name.split(".")[0] for name in names} | set(names) for step, names in modules.items()}, (
        is_same_state,
        list(folder.iterdir()),
    )


SLOW_TO_IMPORT = {"transformers", "datasets", "matplotlib", "pyarrow", "tokenizers", "torch._dynamo"}


def test_importing_the_model_loads_torch_and_numpy_only(fresh_interpreter):
    """torch imports tqdm itself where it is installed, so only what comes on top of torch is looked at."""
    modules = fresh_interpreter[0]["blt_model"]
    assert "blt_model" in modules and not modules & (SLOW_TO_IMPORT | {"tqdm"})


def test_settings_of_llm_load_nothing_slow(fresh_interpreter):
    modules = fresh_interpreter[0]["llm's settings"]
    assert "llm" in modules and not modules & SLOW_TO_IMPORT


def test_importing_scripts_does_nothing(fresh_interpreter):
    is_same_state, files = fresh_interpreter[1]
    assert is_same_state and files == []
