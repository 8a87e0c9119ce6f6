"""Every script as its user runs it, in pipeline order, with tiny settings; pictures and files; errors in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ENTROPY = "--d_model 32 --n_heads 2 --n_layers 1 --max_seq_len 16 --row_bytes 128 --batch_rows 4 --steps 12 --eval_every 6".split()
BLT = (
    "--encoder_dim 32 --global_dim 32 --global_layers 1 --decoder_dim 32 --decoder_layers 1 --hash_rows 64 --window 16 "
    "--row_bytes 128 --batch_rows 4 --steps 12 --eval_every 6 --val_bytes 20000 --max_bytes 60000 --sample_bytes 5"
).split()


def run(folder, script, *flags, ok=True):
    """Run a script in a folder; returns stdout (and stderr if it must fail, which then is one line without a traceback)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=300,
        env=environment,
    )
    if ok:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "Warning" not in done.stderr, done.stderr[-2000:]
        return done.stdout
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, done.stderr[-2000:]
    return lines[0]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The three scripts in order; returns their folder and what they printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    out = {}
    out["entropy"] = run(folder, "entropy_llm.py", *ENTROPY, "--max_bytes", 60000, "--val_bytes", 20000)
    out["patches"] = run(folder, "create_patches.py", "--max_bytes", 60000, "--val_bytes", 20000)
    out["llm"] = run(folder, "llm.py", *BLT)
    return folder, out


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_entropy_model_files(pipeline):
    folder, out = pipeline
    state = torch.load(folder / "entropy_model.pth", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    record = json.loads((folder / "entropy_model.json").read_text())
    assert record["config"]["d_model"] == 32 and len(record["corpus"]["sha256"]) == 64 and 0 < record["val_bpb"] < 8
    assert is_png(folder / "entropy_model_run" / "curves.png")
    assert "leak gate passed" in out["entropy"] and "next: python create_patches.py" in out["entropy"]


def test_patch_files(pipeline):
    folder, out = pipeline
    saved = json.loads((folder / "patch_cache" / "patches.json").read_text())
    assert saved["statistics"]["avg_patch_size"] == pytest.approx(4.5, abs=0.3)  # the default target
    assert "percentiles" in out["patches"] and "thresholds for global" in out["patches"]
    assert is_png(folder / "patch_cache" / "entropy.png") and is_png(folder / "patch_cache" / "patch_sizes.png")
    assert (folder / "patch_cache" / "patches.html").stat().st_size > 10_000
    (cache,) = (folder / "patch_cache").glob("entropies-*")
    manifest = json.loads((cache / "manifest.json").read_text())
    assert {"corpus_sha256", "entropy_model_sha256", "dtype"} <= set(manifest)


def test_cached_entropies_are_the_live_ones(pipeline):
    from blt.corpus import open_corpus
    from blt.entropies import open_entropies, training_patch_sizes, training_starts
    from blt.patch_rules import PatchConfig
    from entropy_patcher import EntropyPatcher
    from save_entropy_model import load_entropy_model

    folder, _ = pipeline
    corpus = open_corpus("sample", cache_dir=str(folder / "data_cache"))
    model, record = load_entropy_model(folder / "entropy_model.pth")
    cache = open_entropies(folder / "patch_cache", corpus, record, "entropy_model.pth")
    patcher = EntropyPatcher(model, PatchConfig(entropy_threshold=3.0), precision=cache.manifest["precision"])
    for place in (0, 3, len(cache.train)):
        live = patcher._entropies_with_end([corpus.document(cache.numbers[place])])[0]
        np.testing.assert_allclose(cache.document(place), live, atol=0.1 if patcher.precision == "bf16" else 2e-3)
        assert np.abs(cache.document(place) - live).mean() < 0.02
    # The stream of starts is each document's starts, one after the other.
    starts = training_starts(corpus, cache.train, patcher.config, cache)
    alone = np.concatenate(
        [[True], *(patcher.starts(corpus.document(n), cache.document(i)) for i, n in enumerate(cache.train))]
    )
    assert starts.read(0, len(starts)).tolist() == alone.tolist()
    sizes = training_patch_sizes(starts, corpus, cache.train)
    want = [
        len(p)
        for i, n in enumerate(cache.train)
        for p in np.split(
            corpus.document(n), np.flatnonzero(patcher.starts(corpus.document(n), cache.document(i))[1:-1]) + 1
        )
    ]
    assert sizes.tolist() == want
    for method, level in (("space", 1.0), ("static", 5.0)):
        other = EntropyPatcher(None, PatchConfig(method, level))
        got = training_starts(corpus, cache.train, other.config)
        assert (
            got.read(0, len(got)).tolist()
            == np.concatenate([[True], *(other.starts(corpus.document(n)) for n in cache.train)]).tolist()
        )


def test_blt_files_and_generation(pipeline):
    folder, out = pipeline
    assert re.search(r"val \d\.\d+ bpb over [\d,]+ bytes .*gzip -9 \d\.\d+, xz -9 \d\.\d+", out["llm"])
    assert "leak gate passed" in out["llm"] and "continuation of" in out["llm"]
    for name in ("best.pt", "last.pt", "model.json", "metrics.jsonl"):
        assert (folder / "checkpoints" / name).exists()
    assert is_png(folder / "checkpoints" / "curves.png")
    text = run(folder, "generate.py", "--prompt", "The ", "--max_new_bytes", 5, "--device", "cpu", "--draft_bytes", 3)
    assert text.startswith("The ")


def test_what_was_trained_compresses(pipeline):
    folder, _ = pipeline
    (folder / "some.txt").write_bytes(b"The history of the world, in bytes. " * 8)
    out = run(folder, "compress.py", "some.txt", "--streams", 2)
    assert "restored and compared" in out and (folder / "some.txt.blt").stat().st_size < 288
    run(folder, "compress.py", "--decompress", "some.txt.blt", "--output", "back.txt")
    assert (folder / "back.txt").read_bytes() == (folder / "some.txt").read_bytes()


def test_repatching_needs_no_model_pass(pipeline, tmp_path):
    folder, _ = pipeline
    shutil.copytree(folder, tmp_path / "copy")
    out = run(
        tmp_path / "copy",
        "create_patches.py",
        "--max_bytes",
        60000,
        "--val_bytes",
        20000,
        "--method",
        "monotonic",
        "--target_patch_size",
        6,
    )
    assert "is there already" in out
    size = json.loads((tmp_path / "copy" / "patch_cache" / "patches.json").read_text())["statistics"]["avg_patch_size"]
    assert size == pytest.approx(6, abs=0.4)
    out = run(
        tmp_path / "copy",
        "create_patches.py",
        "--max_bytes",
        60000,
        "--val_bytes",
        20000,
        "--method",
        "bpe",
        "--bpe_vocab_size",
        400,
    )
    assert "bpe" in out
    assert "looks ahead" in run(tmp_path / "copy", "llm.py", *BLT, ok=False)


def test_extreme_thresholds_warn_with_numbers(pipeline, tmp_path):
    folder, _ = pipeline
    shutil.copytree(folder, tmp_path / "copy")
    for threshold, words in ((0.001, "1.00 bytes a patch"), (9.0, "documents")):
        out = run(
            tmp_path / "copy",
            "create_patches.py",
            "--max_bytes",
            60000,
            "--val_bytes",
            20000,
            "--entropy_threshold",
            threshold,
        )
        assert "warning" in out and words in out


def test_another_entropy_model_is_refused(pipeline, tmp_path):
    folder, _ = pipeline
    shutil.copytree(folder, tmp_path / "copy")
    run(tmp_path / "copy", "entropy_llm.py", *ENTROPY, "--max_bytes", 60000, "--val_bytes", 20000, "--seed", 2)
    line = run(tmp_path / "copy", "llm.py", *BLT, ok=False)
    assert "another entropy model" in line and "run: python create_patches.py" in line
    assert "trained on patches of another entropy model" in run(tmp_path / "copy", "generate.py", ok=False)


def test_resume(pipeline, tmp_path):
    folder, _ = pipeline
    shutil.copytree(folder, tmp_path / "copy")
    out = run(tmp_path / "copy", "llm.py", *BLT, "--resume")
    assert "at step 12" in out


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("llm.py", ["--dataset", "no_such_file.txt"], "not found"),
        ("llm.py", ["--steps", "0"], "steps is 0"),
        ("llm.py", ["--nonsense", "1"], "unknown flags"),
        ("llm.py", ["--preset", "nonsense"], "unknown preset"),
        ("llm.py", ["--max_bytes", "5000000"], "python create_patches.py"),
        ("llm.py", ["--entropy_model_path", "none.pth", "--patch_method", "global"], "python entropy_llm.py"),
        ("llm.py", ["--patch_cache", "none"], "python create_patches.py"),
        ("llm.py", ["--patch_method", "static"], "--target_patch_size"),
        ("llm_large.py", ["--global_dim", "33", "--preset", "cpu"], "33"),
        ("entropy_llm.py", ["--d_model", "30", "--n_heads", "4"], "d_model is 30"),
        ("entropy_llm.py", ["--dataset", "empty.txt"], "empty"),
        ("entropy_llm.py", ["--dataset", "empty_folder"], "empty_folder"),
        ("entropy_llm.py", ["--dataset", "records.jsonl", "--text_field", "body"], "text field 'body' not found"),
        ("entropy_llm.py", ["--data_cache", "empty.txt/cache"], "empty.txt"),
        ("create_patches.py", ["--min_patch_size", "0"], "min_patch_size is 0"),
        ("create_patches.py", ["--target_patch_size", "0.5"], "target_patch_size is 0.5"),
        ("create_patches.py", ["--entropy_model_path", "records.jsonl"], "not found"),
        ("create_patches.py", ["--cache_dir", "empty.txt/cache"], "empty.txt"),
        ("train_blt.py", ["--entropy_model_path", "none.pth", "--quick_demo"], "python entropy_llm.py"),
        ("complete_entropy_workflow.py", ["--methods", "bpe"], "methods is"),
        ("generate.py", ["--model", "none"], "python llm.py"),
        ("generate.py", ["--draft_bytes", "500"], "draft_bytes is 500"),
        ("compress.py", ["records.jsonl", "--model", "none"], "python llm.py"),
    ],
)
def test_mistakes_get_one_line(pipeline, script, flags, words):
    folder, _ = pipeline
    (folder / "empty.txt").touch()
    (folder / "empty_folder").mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text('{"text": "abc"}\n{"text": "def"}\n')
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    line = (
        run(folder, script, *(["--preset", "cpu"] if "--preset" not in flags else []), *flags, ok=False)
        if script not in ("generate.py", "compress.py")
        else run(folder, script, *flags, ok=False)
    )
    assert words in line
    assert all(path.exists() and path.stat().st_mtime_ns == when for path, when in before.items())  # nothing lost


def test_train_blt_in_one_go(pipeline, tmp_path):
    shutil.copy(pipeline[0] / "entropy_model.pth", tmp_path)
    shutil.copy(pipeline[0] / "entropy_model.json", tmp_path)
    out = run(tmp_path, "train_blt.py", "--entropy_model_path", "entropy_model.pth", "--quick_demo", *BLT)
    assert "entropies:" in out and re.search(r"val \d\.\d+ bpb", out)


def test_large_model_in_small(pipeline):
    assert "val " in run(pipeline[0], "llm_large.py", "--preset", "cpu", *BLT)


def test_complete_workflow(tmp_path):
    flags = "--quick_demo --train_entropy --entropy_steps 12 --methods global space static --seeds 2".split()
    out = run(tmp_path, "complete_entropy_workflow.py", *flags, *BLT)
    rows = json.loads((tmp_path / "workflow" / "comparison.json").read_text())
    assert {row["method"] for row in rows} == {"global", "space", "static"} and all(
        len(row["val_bpb_of_each_seed"]) == 2 for row in rows
    )
    assert all(2 < row["avg_patch_size"] < 9 and 0 < row["val_bpb"] < 8 for row in rows)
    assert is_png(tmp_path / "workflow" / "comparison.png") and "| global |" in out


@pytest.mark.parametrize(
    "script",
    [
        "entropy_llm",
        "create_patches",
        "llm",
        "llm_large",
        "train_blt",
        "complete_entropy_workflow",
        "generate",
        "template_llm",
        "bench",
        "compress",
        "convert_hf",
        "show_patches",
        "evaluate",
    ],
)
def test_help(tmp_path, script):
    out = run(tmp_path, f"{script}.py", "--help")
    assert "Run     python" in out and "default:" in out


def test_importing_does_nothing(tmp_path):
    names = [path.stem for path in ROOT.glob("*.py")]
    code = f"import torch; s = torch.get_rng_state(); import {', '.join(names)}; assert torch.equal(s, torch.get_rng_state())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout == "" and os.listdir(tmp_path) == [], done.stderr


def test_readme_commands_exist():
    """Every script and flag that the README shows is real."""
    import importlib

    from blt.config import field_comments

    readme = (ROOT / "README.md").read_text()
    classes = {"entropy_llm": "EntropyConfig", "create_patches": "CreatePatchesConfig", "llm": "LLMConfig", "llm_large": "LLMLargeConfig",
               "train_blt": "BLTRunConfig", "complete_entropy_workflow": "WorkflowConfig", "generate": "GenerateConfig", "template_llm": "TemplateConfig", "bench": "BenchConfig",
               "compress": "CompressConfig", "evaluate": "EvaluateConfig", "convert_hf": "ConvertConfig", "show_patches": "ShowPatchesConfig"}  # fmt: skip
    commands = re.findall(r"python (\w+)\.py((?:[^\n`]|\\\n)*)", readme)
    assert {"entropy_llm", "create_patches", "llm"} <= {script for script, _ in commands}
    for script, rest in commands:
        assert (ROOT / f"{script}.py").exists(), script
        module = importlib.import_module(script)
        known = set(field_comments(getattr(module, classes[script])))
        assert set(re.findall(r"--(\w+)", rest)) <= known, (script, rest)
        presets = re.search(r"--preset ([\w ]+)", rest)
        if presets:
            assert set(presets[1].split()) <= set(module.PRESETS), (script, rest)


def test_notebook_is_valid_and_runs_real_scripts():
    notebook = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text())
    source = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    scripts = re.findall(r"!python (\w+\.py)", source)
    assert {"entropy_llm.py", "create_patches.py", "llm.py"} <= set(scripts) and all(
        (ROOT / script).exists() for script in scripts
    )
