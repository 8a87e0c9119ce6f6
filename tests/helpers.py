"""What several test files share: tiny models, texts, and scripts run in this process or as their users run them."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.config import run_script
from blt.files import model_hash, write_sealed
from blt.records import RunRecord, save_model
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from save_entropy_model import save_entropy_model

ROOT = Path(__file__).resolve().parent.parent
# Every file at the root that a user runs.
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if "run_script(" in path.read_text())

# How often the tests of SIGKILL kill: BLT_KILLS=50 for the long test; without it a sample.
KILLS = int(os.environ.get("BLT_KILLS", 8))

# Models

TINY_BLT = dict(
    encoder_dim=32, global_dim=48, global_layers=1, decoder_dim=32, decoder_layers=1, hash_rows=64, window=16
)
TINY_ENTROPY = dict(d_model=32, n_heads=2, n_layers=1, max_seq_len=16)


def tiny_blt(seed=0, **changes):
    """A `BLTModel` of TINY_BLT with random weights."""
    torch.manual_seed(seed)
    return BLTModel(BLTConfig(**(TINY_BLT | changes)))


def tiny_entropy_model(seed=0, **changes):
    """A `MinimalLLM` of TINY_ENTROPY with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return MinimalLLM(EntropyConfig(**(TINY_ENTROPY | changes))).eval()


def write_blt(folder, model, patch_config, entropy_model=None, precision="fp32", **settings):
    """Write an output folder as training with these settings leaves it.

    The entropy model goes beside the folder, as entropy_model.pth.
    """
    folder = Path(folder)
    record = RunRecord(
        kind="blt",
        model_config=asdict(model.config),
        settings=settings,
        corpus={"dataset": None, "sha256": None},
        patch_config=asdict(patch_config),
        precision=precision,
    )
    if entropy_model is not None:
        path = folder.parent / "entropy_model.pth"
        save_entropy_model(entropy_model, path)
        record.entropy_model_path = str(path)
        record.entropy_model_sha256 = model_hash(entropy_model)
    save_model(model, folder / "best.pt", record, folder / "model.json")
    return folder


# Texts

WORDS = b"the cat sat on the mat and the dog ate the food that the cat had left on the mat. ".split()


def some_words(n, seed=0):
    """n words of a small vocabulary in random order: bytes that a tiny model learns in seconds."""
    return b" ".join(np.random.default_rng(seed).choice(WORDS, n).tolist())


def random_bytes(n, seed=0):
    """uint8 [n] from 0 to 255."""
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)


def edit_record(path, change):
    """Change the values in a JSON file, such as a record: change(values)."""
    record = json.loads(path.read_text())
    change(record)
    # With a hash that is right: what is tried is what the values are, not that they were changed.
    if "format" in record:
        record.pop("sha256")
        write_sealed(path, record)
    else:
        path.write_text(json.dumps(record))


# Scripts

# Settings with which the three main scripts take seconds.
CORPUS_FLAGS = "--max_bytes 60000 --val_bytes 20000 --device cpu".split()
ENTROPY_FLAGS = [
    *"--d_model 32 --n_heads 2 --n_layers 1 --max_seq_len 16 --row_bytes 128 --batch_rows 4".split(),
    *"--steps 12 --eval_every 6 --overwrite".split(),
    *CORPUS_FLAGS,
]
BLT_FLAGS = [
    *"--encoder_dim 32 --global_dim 32 --global_layers 1 --decoder_dim 32 --decoder_layers 1".split(),
    *"--hash_rows 64 --window 16 --row_bytes 128 --batch_rows 4 --steps 12 --eval_every 6 --sample_bytes 5".split(),
    "--overwrite",
    *CORPUS_FLAGS,
]


def entry_point(script):
    """(main, config class) of a script: what the last line of its file gives to `run_script`."""
    source = (ROOT / f"{script}.py").read_text()
    main, config_class = re.search(r"    run_script\((\w+), (\w+), __doc__\)\n$", source).groups()
    module = importlib.import_module(script)
    return getattr(module, main), getattr(module, config_class)


def run_command(folder, script, *flags, stdin=b""):
    """Run a script in a process of its own, as its user does, and expect success: its standard output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, ROOT / f"{script}.py", *map(str, flags)]
    done = subprocess.run(command, cwd=folder, input=stdin, capture_output=True, env=environment, timeout=300)
    printed, errors = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    assert done.returncode == 0, printed[-2000:] + errors[-2000:]
    assert "Warning" not in errors, errors[-2000:]
    return printed


def run_here(folder, script, *flags, stdin=b""):
    """Run a script in a folder, without the seconds that a new process takes: (exit status, stdout, stderr)."""
    main, config_class = entry_point(script)
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    errors = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        try:
            run_script(main, config_class, importlib.import_module(script).__doc__)
        except SystemExit as stopped:
            status = stopped.code
    printed.flush()
    return status, printed.buffer.getvalue().decode(errors="replace"), errors.getvalue()


def output_of(folder, script, *flags, stdin=b""):
    """Run a script in this process and expect success, without warnings: its standard output."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        status, printed, errors = run_here(folder, script, *flags, stdin=stdin)
    assert status == 0, printed[-2000:] + errors[-2000:]
    assert not [warning for warning in caught if issubclass(warning.category, UserWarning)]
    return printed


def error_of(folder, script, *flags):
    """Run a script in this process and expect it to fail: the one line in which it says why."""
    status, printed, errors = run_here(folder, script, *flags)
    assert status != 0, printed[-2000:]
    lines = [line for line in errors.splitlines() if "error:" in line]
    assert len(lines) == 1 and "Traceback" not in errors, errors[-2000:]
    return lines[0]


def is_png(path):
    """Whether a file is a PNG picture, and no tiny one."""
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000
