"""Faults that can occur with every script: one clear line each, found before the work, and nothing lost."""

import shutil
import subprocess
import sys

import pytest
from helpers import BLT_FLAGS, CORPUS_FLAGS, ENTROPY_FLAGS, ROOT, SCRIPTS, error_of

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
    shutil.copy(pipeline[0] / "entropy_model.pth", tmp_path)
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
    packages = "matplotlib pyarrow tokenizers transformers safetensors datasets constriction filelock tensorboard".split()
    code = HELP.format(packages=packages, tests=str(ROOT / "tests"), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
