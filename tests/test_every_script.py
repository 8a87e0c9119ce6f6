"""Faults that can occur with every script: one clear line each, found before the work, and nothing lost."""

import contextlib
import importlib
import os
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import BLT_FLAGS, CORPUS_FLAGS, ENTROPY_FLAGS, ROOT, SCRIPTS, error_of, output_of, run_here

from blt.patch_rules import PatchConfig
from blt.tokens import load_tokenizer, train_tokenizer
from entropy_patcher import EntropyPatcher
from template_llm import load_template

TEMPLATE_FLAGS = [
    *"--dim 32 --n_layers 1 --n_heads 2 --row_bytes 128 --batch_rows 4 --steps 2 --eval_every 2".split(),
    *CORPUS_FLAGS,
]
BENCH_FLAGS = [
    *"--models custom --encoder_dim 32 --global_dim 32 --global_layers 1 --decoder_dim 32 --decoder_layers 1".split(),
    *"--hash_rows 64 --window 16 --row_bytes 128 --batch_rows 2 --device cpu --repeats 1 --warmup 1".split(),
    *"--no_entropy_pass --no_repatching".split(),
]

# Packages

# While all packages are there: a script that is first imported without one does without it until the process ends.
for name in SCRIPTS:
    importlib.import_module(name)

# What each script needs, with the flags that make it need it.
NEEDED = [
    ("entropy_llm", ENTROPY_FLAGS, ["matplotlib", "pyarrow"]),
    ("create_patches", CORPUS_FLAGS, ["matplotlib"]),
    ("create_patches", [*CORPUS_FLAGS, "--method", "bpe"], ["tokenizers"]),
    ("llm", BLT_FLAGS, ["matplotlib", "pyarrow"]),
    ("llm", [*BLT_FLAGS, "--tensorboard"], ["tensorboard"]),
    ("llm_large", BLT_FLAGS, ["matplotlib"]),
    ("train_blt", BLT_FLAGS, ["matplotlib"]),
    ("template_llm", ["--model", "bpe", *TEMPLATE_FLAGS], ["matplotlib", "tokenizers"]),
    ("complete_entropy_workflow", BLT_FLAGS, ["matplotlib", "pyarrow"]),
    ("compress", ["t.txt"], ["constriction"]),
    ("evaluate", ["--file", "t.txt"], ["matplotlib", "pyarrow"]),
    ("show_patches", ["--text", "a"], ["matplotlib"]),
    ("convert_hf", ["--to_hf", "checkpoints"], ["transformers", "safetensors", "tokenizers"]),
    ("convert_hf", ["--from_hf", "hf_model"], ["transformers", "safetensors", "tokenizers"]),
    ("bench", [*BENCH_FLAGS, "--scaling"], ["matplotlib"]),
    ("bench", [*BENCH_FLAGS, "--against", "transformers"], ["transformers"]),
    ("entropy_llm", [*ENTROPY_FLAGS, "--dataset", "a/b", "--corpus_bytes", "1000"], ["datasets"]),
]


@pytest.mark.parametrize(
    ("script", "flags", "package"), [(*case[:2], package) for case in NEEDED for package in case[2]]
)
def test_a_missing_package_is_found_before_the_work(tmp_path, monkeypatch, script, flags, package):
    (tmp_path / "t.txt").write_text("the cat")
    # So Python marks a package that cannot be imported.
    monkeypatch.setitem(sys.modules, package, None)
    assert error_of(tmp_path, script, *flags).endswith(f"missing packages: {package}; run: pip install {package}")
    # Not even a folder is left: nothing was begun.
    assert {path.name for path in tmp_path.iterdir()} <= {"t.txt", "data_cache"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_script_needs(tmp_path, monkeypatch, script):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    flags = {"compress": ["t.txt"], "convert_hf": ["--to_hf", "checkpoints"]}.get(script, [])
    assert "pip install tqdm" in error_of(tmp_path, script, *flags)


def test_a_package_that_is_found_missing_late_is_one_line(pipeline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("entropy_model.pth", "entropy_model.json"):
        shutil.copy(pipeline[0] / name, tmp_path)
    line = error_of(tmp_path, "create_patches", "--dataset", "a.parquet", "--device", "cpu")
    assert line.endswith("run: pip install pyarrow")


HELP = """
import sys
for name in {packages!r}:
    sys.modules[name] = None
sys.path[:0] = [{tests!r}, {root!r}]
import importlib
from blt.config import make_parser
from helpers import SCRIPTS, entry_point
for script in SCRIPTS:
    make_parser(entry_point(script)[1], importlib.import_module(script).__doc__).format_help()
"""


def test_help_needs_no_package_but_torch_and_numpy():
    packages = (
        "matplotlib pyarrow tokenizers transformers safetensors datasets constriction filelock tensorboard".split()
    )
    code = HELP.format(packages=packages, tests=str(ROOT / "tests"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]


# Printed commands


def test_the_command_before_is_complete(pipeline_copy, monkeypatch):
    """What is to be run first is named with the script's path, the text of this run and its paths, quoted."""
    (pipeline_copy / "my text").mkdir()
    for number in range(30):
        (pipeline_copy / "my text" / f"{number}.txt").write_text(f"the cat sat on mat {number} " * 20)
    text = ["--dataset", "my text", "--val_fraction", "0.2", "--device", "cpu"]
    wanted = "--dataset 'my text' --val_fraction 0.2 --device cpu"
    before = f"run: python create_patches.py {wanted}"
    entropy = f"run: python entropy_llm.py {wanted} --output none.pth"
    other = ["--entropy_model_path", "none.pth"]
    assert error_of(pipeline_copy, "create_patches", *text, *other).endswith(entropy)
    assert error_of(pipeline_copy, "train_blt", *text, *other, "--quick_demo").endswith(entropy)
    assert error_of(pipeline_copy, "llm", *text, *other, "--patch_method", "global").endswith(entropy)
    for flags in (["--patch_cache", "my cache"], ["--patch_method", "global", "--patch_cache", "my cache"]):
        line = error_of(pipeline_copy, "llm", *text, *flags)
        assert line.endswith(f"{before} --entropy_model_path entropy_model.pth --cache_dir 'my cache'")
    # create_patches.py knows no preset quick_demo.
    line = error_of(pipeline_copy, "llm", *text, "--preset", "quick_demo", "--patch_cache", "my cache")
    assert before in line and "--preset" not in line
    output_of(pipeline_copy, "create_patches", *text, "--max_bytes", "1000", "--val_bytes", "1000")
    line = error_of(pipeline_copy, "llm", *text, "--max_bytes", "2000")
    assert "--max_bytes 2000" in line and before.removesuffix(" --device cpu") in line
    # A message that is printed elsewhere names the script where it is.
    monkeypatch.setattr("sys.argv", [str(ROOT / "llm.py")])
    with pytest.raises(ValueError, match=re.escape(f"python {ROOT}/entropy_llm.py")):
        EntropyPatcher(None, PatchConfig("global"))
    with pytest.raises(FileNotFoundError, match=re.escape(f"python {ROOT}/create_patches.py --method bpe --cache_dir")):
        load_tokenizer(pipeline_copy / "none" / "tokenizer.json")


# Files that would be replaced, and files that are damaged


def test_no_script_replaces_the_files_of_another(pipeline_copy):
    (pipeline_copy / "t.txt").write_text("the cat")
    baseline = pipeline_copy / "baseline"
    baseline.mkdir()
    for name in ("tokenizer.json", "model.json", "best.pt"):
        (baseline / name).write_text(name)
    theirs = pipeline_copy / "theirs"
    theirs.mkdir()
    for name in ("tokenizer.json", "config.json", "card.json", "bench.json"):
        (theirs / name).write_text("{}")
    before = {path: path.read_bytes() for folder in (baseline, theirs) for path in folder.iterdir()}
    model = pipeline_copy / "checkpoints" / "model.json"
    for script, flags in (
        ("create_patches", ["--method", "bpe", "--cache_dir", baseline, *CORPUS_FLAGS]),
        ("template_llm", ["--model", "bpe", "--output", theirs, *TEMPLATE_FLAGS]),
        ("convert_hf", ["--to_hf", "checkpoints", "--output", baseline]),
        ("convert_hf", ["--to_hf", "checkpoints", "--output", theirs]),
        ("convert_hf", ["--to_hf", "checkpoints", "--output", "patch_cache"]),
        ("convert_hf", ["--from_hf", theirs, "--output", "."]),
        ("evaluate", ["--file", "t.txt", "--output", theirs]),
        ("bench", [*BENCH_FLAGS, "--output", theirs / "bench.json"]),
        ("bench", ["--models", model, "--output", model]),
        ("bench", [*BENCH_FLAGS, "--output", theirs / "bench.json" / "x.json"]),
    ):
        assert "give another --" in error_of(pipeline_copy, script, *flags), script
    assert before == {path: path.read_bytes() for path in before}


def test_no_result_takes_the_name_of_an_input(tmp_path, pipeline_copy):
    for name in ("em.json", "best.pt", "data.jsonl"):
        (tmp_path / name).write_text("{}")
    entropy = [*ENTROPY_FLAGS, "--output"]
    for script, flags in (
        ("entropy_llm", [*entropy, "data.jsonl", "--dataset", "data.jsonl"]),
        ("entropy_llm", [*entropy, "em.pth", "--dataset", "em.json"]),
        ("llm", [*BLT_FLAGS, "--output", ".", "--dataset", "best.pt"]),
        ("compress", ["em.json", "--output", "checkpoints/best.pt"]),
        ("compress", ["--decompress", "em.json", "--output", "checkpoints/model.json"]),
    ):
        shutil.copytree(pipeline_copy / "checkpoints", tmp_path / "checkpoints", dirs_exist_ok=True)
        before = files_in(tmp_path)
        assert "would be overwritten" in error_of(tmp_path, script, *flags)
        assert before == files_in(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xfe{", b"[" * 100_000, b"{}", b"null"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer"):
        load_tokenizer(path)


def test_the_tokenizer_of_another_model_is_refused(pipeline_copy):
    flags = ["--model", "bpe", "--vocab_size", "300", *TEMPLATE_FLAGS]
    output_of(pipeline_copy, "template_llm", *flags)
    load_template(pipeline_copy / "checkpoints_bpe")
    # As many tokens, but others.
    documents = [np.frombuffer(b"xyzzy " * 400 + bytes(range(256)) * 9, np.uint8)]
    train_tokenizer(documents, 300, pipeline_copy / "checkpoints_bpe" / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is not the one of the model beside it"):
        load_template(pipeline_copy / "checkpoints_bpe")


def test_patches_that_look_ahead_lead_nowhere(pipeline_copy):
    printed = output_of(pipeline_copy, "create_patches", "--method", "bpe", "--bpe_vocab_size", "300", *CORPUS_FLAGS)
    assert "next:" not in printed and "no model can be trained on them" in printed


# A full disk


@contextlib.contextmanager
def disk_for(n_bytes):
    """Files can be no longer than n_bytes, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "data_cache" not in path.parts}


@pytest.mark.parametrize(
    ("script", "flags", "n_bytes"),
    [
        ("entropy_llm", [*ENTROPY_FLAGS, "--output", "other.pth"], 3000),
        ("entropy_llm", [*ENTROPY_FLAGS, "--output", "other.pth"], 40_000),
        ("create_patches", [*CORPUS_FLAGS, "--cache_dir", "other"], 3000),
        ("create_patches", [*CORPUS_FLAGS, "--cache_dir", "other"], 150_000),
        ("llm", [*BLT_FLAGS, "--output", "other"], 3000),
        ("llm", [*BLT_FLAGS, "--output", "other"], 200_000),
        ("template_llm", [*TEMPLATE_FLAGS, "--output", "other"], 3000),
        ("evaluate", ["--file", "t.txt", "--preset", "cpu", "--device", "cpu", "--output", "other"], 3000),
        ("show_patches", ["--text", "the cat", "--device", "cpu", "--output", "other"], 3000),
        ("convert_hf", ["--to_hf", "checkpoints", "--output", "other"], 3000),
        ("convert_hf", ["--to_hf", "checkpoints", "--output", "other"], 40_000),
        ("compress", ["noise", "--output", "other", "--device", "cpu", "--context_bytes", "64"], 100),
    ],
)
def test_a_full_disk_is_one_line_and_damages_nothing(pipeline_copy, script, flags, n_bytes):
    (pipeline_copy / "t.txt").write_text("the cat sat on the mat")
    (pipeline_copy / "noise").write_bytes(bytes(range(128)))
    before = files_in(pipeline_copy)
    with disk_for(n_bytes):
        line = error_of(pipeline_copy, script, *flags)
    assert "free some" in line
    after = files_in(pipeline_copy)
    assert before == {path: after[path] for path in before}
    assert not [path for path in after if path.suffix == ".tmp"]


# Names and numbers


def test_names_that_are_not_utf8(pipeline_copy):
    name = os.fsdecode(b"na\xefve")
    bpe = ["--model", "bpe", "--vocab_size", "300", *TEMPLATE_FLAGS, "--output", name]
    output_of(pipeline_copy, "template_llm", *bpe)
    load_template(pipeline_copy / name)
    line = error_of(pipeline_copy, "convert_hf", "--to_hf", "checkpoints", "--output", name + "hf")
    assert "is not UTF-8" in line and not (pipeline_copy / (name + "hf")).exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_on_the_command_line_are_finite(tmp_path, value):
    for script, flag in (("generate", "temperature"), ("bench", "patch_size"), ("show_patches", "target_patch_size")):
        assert f"{flag} is {float(value)}; it must be a finite" in error_of(tmp_path, script, f"--{flag}={value}")


# Stopped early


def test_what_was_stopped_before_its_first_file_goes_on(pipeline_copy, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    workflow = [*BLT_FLAGS, "--methods", "static", "--output", "compared"]
    workflow.remove("--overwrite")
    run = [*BLT_FLAGS, "--output", "run"]
    run.remove("--overwrite")
    with monkeypatch.context() as patch:
        patch.setattr("complete_entropy_workflow.compare", stop)
        patch.setattr("llm.open_patches", stop)
        assert run_here(pipeline_copy, "complete_entropy_workflow", *workflow)[0] == 130
        assert run_here(pipeline_copy, "llm", *run)[0] == 130
    assert "val" in output_of(pipeline_copy, "llm", *run, "--resume")
    # Killed before the folder was made.
    shutil.rmtree(pipeline_copy / "compared")
    output_of(pipeline_copy, "complete_entropy_workflow", *workflow, "--resume")
    assert (pipeline_copy / "compared" / "comparison.md").exists()
