"""Several processes started by torchrun: the numbers of one process, a resumed run by another number of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import helpers
import numpy as np
import pytest
import torch
from helpers import ROOT, error_of, random_bytes, run_command, tiny_blt

import blt.loop
from blt.device import choose_precision
from blt.loop import RunConfig, batches_of_step, fit, read_metrics, share_of_update
from blt.rows import DocumentStream, TrainingRows

# On CPUs with bf16 instructions the scripts take bf16, which rounds a pass of one row otherwise than
# one of two.
FP32 = ["--precision", "fp32"]
# What losses may differ by. There Muon's updates are made orthogonal in bf16, whatever the precision of
# the passes: the last digit of a gradient can then change a number by 0.4%.
HAS_BF16 = choose_precision("auto", torch.device("cpu")) == "bf16"
WITHIN = 2e-3 if HAS_BF16 else 1e-4
CORPUS_FLAGS = [*helpers.CORPUS_FLAGS, *FP32]
ENTROPY_FLAGS = [*helpers.ENTROPY_FLAGS, *FP32]
# Tables of more than 32,768 rows have sparse gradients. Three passes of two rows are three of one row in each of two
# processes.
BLT_FLAGS = [
    *"--encoder_dim 32 --global_dim 32 --global_layers 2 --decoder_dim 32 --decoder_layers 1 --window 16".split(),
    *"--ngram_sizes 2 3 --hash_rows 40000 --patch_method space --row_bytes 128 --batch_rows 2 --accumulate 3".split(),
    *"--steps 50 --eval_every 25 --log_every 1 --sample_bytes 0 --data_cache ../data_cache".split(),
    *CORPUS_FLAGS,
]


def start(folder, n, script, *flags):
    """Start a script by torchrun."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    command = [*torchrun, ROOT / f"{script}.py", *map(str, flags)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, env=environment, text=True)


def end(process):
    """Wait for what `start` returned: (exit status, stdout, stderr)."""
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def run_together(folder, script, *flags, n=2):
    """Run a script as n processes and expect success: its standard output."""
    status, printed, errors = end(start(folder, n, script, *flags))
    assert status == 0, printed[-2000:] + errors[-2000:]
    assert "UserWarning" not in errors, errors[-2000:]
    return printed


def losses_of(folder):
    """{update: loss} and {update: validation bits per byte} of a run."""
    lines = read_metrics(folder / "metrics.jsonl")
    return (
        {line["step"]: line["loss"] for line in lines if "loss" in line},
        {line["step"]: line["val_bpb"] for line in lines if "val_bpb" in line},
    )


def assert_same_run(folder, other, within=WITHIN):
    """Two folders have the same losses and the same scores."""
    losses, scores = losses_of(folder)
    other_losses, other_scores = losses_of(other)
    assert losses.keys() == other_losses.keys() and scores.keys() == other_scores.keys() and len(scores) == 2
    for step in losses:
        assert losses[step] == pytest.approx(other_losses[step], abs=within), step
    assert scores == pytest.approx(other_scores, abs=within)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the run `one` of one process, and `two` of two."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "one").mkdir()
    run_command(folder / "one", "llm", *BLT_FLAGS)
    printed = run_together(folder / "two", "llm", *BLT_FLAGS)
    assert "| 2 processes" in printed and printed.count("leak gate passed") == 1
    return folder


def resume(runs, begun, folder):
    """Copy a run as it was after 25 of its 50 updates. Returns its folder, and the flags to go on."""
    shutil.copytree(runs / begun / "checkpoints", folder / "checkpoints")
    # The checkpoint before the last one is that of the first evaluation.
    os.replace(folder / "checkpoints" / "previous.pt", folder / "checkpoints" / "last.pt")
    return folder, [*BLT_FLAGS, "--data_cache", runs / "data_cache", "--resume"]


def test_two_processes_train_as_one_does(runs):
    """Rows, losses, clipping, all three optimizers, accumulation, sparse tables and evaluation."""
    one, two = runs / "one" / "checkpoints", runs / "two" / "checkpoints"
    assert_same_run(one, two)
    # Every byte is counted once.
    of_one, of_two = (read_metrics(folder / "metrics.jsonl")[-1]["bytes"] for folder in (one, two))
    assert of_one == of_two
    weights, other = (torch.load(folder / "best.pt", weights_only=True) for folder in (one, two))
    errors = {name: ((weights[name] - other[name]).norm() / weights[name].norm()).item() for name in weights}
    if HAS_BF16:
        assert max(errors.values()) < 0.1, errors
    else:
        assert all(torch.allclose(weights[name], other[name], atol=1e-3) for name in weights)
    records = [json.loads((folder / "model.json").read_text()) for folder in (one, two)]
    assert records[0]["model_config"] == records[1]["model_config"] and records[1]["result"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("begun, n", [("two", 1), ("one", 2)])
def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path, begun, n):
    folder, flags = resume(runs, begun, tmp_path / "resumed")
    printed = run_command(folder, "llm", *flags) if n == 1 else run_together(folder, "llm", *flags, n=n)
    assert "at step 25" in printed
    assert_same_run(folder / "checkpoints", runs / begun / "checkpoints")


@pytest.mark.slow
def test_sharded_weights_are_trained_as_whole_ones(runs, tmp_path):
    """Three processes hold 11, 11 and 10 of 32 rows. They go on with the run of one, and one with theirs."""
    folder, flags = resume(runs, "one", tmp_path / "sharded")
    assert "at step 25" in run_together(folder, "llm", *flags, "--shard", "yes", "--eval_every", 15, n=3)
    of_one = losses_of(runs / "one" / "checkpoints")[0]
    assert losses_of(folder / "checkpoints")[0] == pytest.approx(of_one, abs=WITHIN)
    # Their checkpoint of update 45.
    os.replace(folder / "checkpoints" / "previous.pt", folder / "checkpoints" / "last.pt")
    assert "at step 45" in run_command(folder, "llm", *flags)
    assert losses_of(folder / "checkpoints")[0] == pytest.approx(of_one, abs=WITHIN)


PASSES = """
import sys

import torch
import torch.distributed as dist

sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from blt.layers import without_zeros, zero_outputs
from blt.sharding import is_sharded, local, sharded
from helpers import tiny_blt

dist.init_process_group("gloo")
model = tiny_blt()
zero_outputs(model)
shards = sharded(model)
assert all(is_sharded(p) for p in shards.parameters()) and not any(is_sharded(p) for p in model.parameters())
assert len(local(shards.head.weight)) == (129, 128)[dist.get_rank()]
batch = torch.tensor([[256, 97, 98, 99]]), torch.tensor([[1, 1, 2]])
before = shards(*batch)
with torch.no_grad(), without_zeros(shards):
    assert not torch.allclose(shards(*batch), before)
assert torch.equal(shards(*batch), before) and torch.allclose(model(*batch), before, atol=1e-6)
# What was gathered for the last pass is gone, so weights may be changed and loaded.
shards.load_state_dict(tiny_blt(seed=1).state_dict())
assert torch.allclose(shards(*batch), tiny_blt(seed=1)(*batch), atol=1e-6)
"""


@pytest.mark.slow
def test_weights_of_a_sharded_model_may_change_between_passes(tmp_path):
    """As `compile_losses` does: layers that are still the identity get other weights for a moment."""
    (tmp_path / "passes.py").write_text(PASSES.format(root=str(ROOT)))
    run_together(tmp_path, tmp_path / "passes")


@pytest.mark.slow
def test_sharded_tables_with_dense_gradients(tmp_path):
    flags = (
        "--model flat --dim 32 --n_layers 1 --ngram_sizes 2 3 --hash_rows 501 --row_bytes 128 --batch_rows 4".split()
    )
    flags += [*"--steps 12 --eval_every 6 --log_every 1 --table_decay 0.1".split(), *CORPUS_FLAGS]
    (tmp_path / "one").mkdir()
    run_command(tmp_path / "one", "template_llm", *flags)
    run_together(tmp_path / "two", "template_llm", *flags, "--shard", "yes")
    assert_same_run(tmp_path / "one" / "checkpoints_flat", tmp_path / "two" / "checkpoints_flat")


@pytest.mark.slow
def test_sigterm_saves_the_step_and_the_run_goes_on(runs, tmp_path):
    """With dropout too it gives the numbers of the run straight through, to the last digit."""
    folder = tmp_path / "stopped"
    flags = [*BLT_FLAGS, "--data_cache", runs / "data_cache", "--dropout", 0.2, "--ngram_dropout", 0.2]
    run_together(tmp_path / "straight", "llm", *flags)
    flags += ["--checkpoint_minutes", 1000]
    process = start(folder, 2, "llm", *flags)
    metrics = folder / "checkpoints" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status, _, errors = end(process)
    assert status != 0
    assert "stopped after step" in errors and (folder / "checkpoints" / "last.pt").exists(), errors[-2000:]
    run_together(folder, "llm", *flags, "--resume")
    assert_same_run(folder / "checkpoints", tmp_path / "straight" / "checkpoints", within=0)


STOPPED_EVALUATION = """
import signal
from types import SimpleNamespace
from blt.loop import Interrupted, StopSignals
from blt.metric import evaluate_together
from blt.processes import joined, process_number, sum_over_processes
import blt.metric

with joined(SimpleNamespace(RUNS_TOGETHER=True, device="cpu")):
    stop = StopSignals()
    seen = []

    def before_batch():
        seen.append(1)
        # The signal reaches one process alone, in the middle of its share.
        if process_number() == 1 and len(seen) == 2:
            stop._receive(signal.SIGTERM, None)
        stop.check()

    blt.metric.score_batches = lambda model, batches, *rest: (None for _ in batches)
    blt.metric.add_up = lambda scored: [None for _ in scored] and {"nats": 0.0}
    with stop.at_once():
        try:
            evaluate_together(None, list(range(7)), "cpu", before_batch=before_batch)
        except Interrupted:
            # Both are at the same place: what they tell each other next belongs together.
            (total,) = sum_over_processes(len(seen))
            print(f"stopped, {total} batches begun", flush=True)
"""


@pytest.mark.slow
def test_a_signal_to_one_process_stops_the_evaluation_of_all(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED_EVALUATION)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "stopped.py")], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0 and done.stdout == "stopped, 4 batches begun\n", done.stdout + done.stderr


@pytest.mark.slow
def test_all_steps_of_the_pipeline_run_together(tmp_path):
    """Entropy model, entropies, patches and BLT; the entropies are those of one process, and so are the patches."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    run_command(one, "entropy_llm", *ENTROPY_FLAGS)
    run_together(two, "entropy_llm", *ENTROPY_FLAGS)
    assert_same_run(one / "entropy_model_run", two / "entropy_model_run")
    for name in ("entropy_model.pth", "entropy_model.json"):
        shutil.copy(one / name, two / name)
    run_command(one, "create_patches", *CORPUS_FLAGS, "--streams", 4)
    printed = run_together(two, "create_patches", *CORPUS_FLAGS, "--streams", 2)
    assert "patches: global" in printed
    (of_one,), (of_two,) = (list((folder / "patch_cache").glob("entropies-*")) for folder in (one, two))
    assert sorted(path.name for path in of_one.iterdir()) == sorted(path.name for path in of_two.iterdir())
    assert np.array_equal(*(np.fromfile(folder / "entropies.f16", np.float16) for folder in (of_one, of_two)))
    rules = [json.loads((folder / "patch_cache" / "patches.json").read_text())["patch_config"] for folder in (one, two)]
    assert rules[0] == rules[1]
    # With patches made on the way.
    shutil.rmtree(two / "patch_cache")
    flags = [flag for flag in BLT_FLAGS if flag not in ("--patch_method", "space")]
    printed = run_together(two, "train_blt", *flags)
    assert "entropies: " in printed and (two / "checkpoints" / "curves.png").exists()


@pytest.mark.slow
def test_the_bpe_transformer_has_one_tokenizer(tmp_path):
    flags = [*"--model bpe --dim 32 --n_layers 1 --vocab_size 300 --row_bytes 128 --batch_rows 4".split()]
    flags += [*"--steps 12 --eval_every 6 --log_every 1".split(), *CORPUS_FLAGS]
    (tmp_path / "one").mkdir()
    run_command(tmp_path / "one", "template_llm", *flags)
    run_together(tmp_path / "two", "template_llm", *flags)
    one, two = (tmp_path / name / "checkpoints_bpe" for name in ("one", "two"))
    assert (one / "tokenizer.json").read_text() == (two / "tokenizer.json").read_text()
    assert_same_run(one, two)


@pytest.mark.slow
def test_what_cannot_be_shared_is_said(tmp_path):
    status, _, errors = end(start(tmp_path / "a", 2, "generate", "--model", "checkpoints"))
    assert status != 0 and "this script runs as one process; start it with python instead of torchrun" in errors
    status, _, errors = end(start(tmp_path / "b", 2, "llm", *BLT_FLAGS, "--batch_rows", 1))
    assert status != 0 and "2 processes cannot share the 3 rows of an update equally" in errors
    assert "llm.py, process " in errors
    assert not (tmp_path / "b" / "checkpoints").exists()


# Without torchrun


def test_one_process_has_nothing_to_shard(tmp_path):
    assert "shard shares a model out among processes" in error_of(tmp_path, "llm", *BLT_FLAGS, "--shard", "yes")
    assert not (tmp_path / "checkpoints").exists()


def test_the_flag_shards_the_model(monkeypatch, tmp_path):
    """The numbers would be the same without it."""

    def stop(model):
        raise InterruptedError

    several(monkeypatch, 2)
    monkeypatch.setattr(blt.loop, "sharded", stop)
    rows = TrainingRows(DocumentStream.of_documents([random_bytes(500)]), row_bytes=50)
    with pytest.raises(InterruptedError):
        fit(tiny_blt(), RunConfig(shard=True, device="cpu"), rows, [], tmp_path / "run")


def several(monkeypatch, n, number=0):
    """Let the loop believe that it is process `number` of n."""
    monkeypatch.setattr(blt.loop, "n_processes", lambda: n)
    monkeypatch.setattr(blt.loop, "process_number", lambda: number)


@pytest.mark.parametrize(
    "accumulate, batch_rows, n, share",
    [(1, 8, 1, (1, 8)), (3, 2, 1, (3, 2)), (2, 8, 2, (1, 8)), (2, 8, 4, (1, 4)), (3, 2, 2, (3, 1)), (5, 4, 2, (5, 2))],
)
def test_processes_share_an_update_in_passes_of_equal_size(monkeypatch, accumulate, batch_rows, n, share):
    several(monkeypatch, n)
    config = RunConfig(accumulate=accumulate, batch_rows=batch_rows, device="cpu")
    assert share_of_update(config) == share


@pytest.mark.parametrize("n", [2, 3, 6])
def test_processes_read_each_row_of_an_update_once(monkeypatch, n):
    rows = TrainingRows(DocumentStream.of_documents([random_bytes(5000)]), row_bytes=50)
    config = RunConfig(accumulate=3, batch_rows=4, seed=7, device="cpu")
    for step in (0, 1, 20):
        several(monkeypatch, 1)
        alone = torch.cat([batch.ids for batch in batches_of_step(rows, config, step)])
        together = []
        for number in range(n):
            several(monkeypatch, n, number)
            together += [batch.ids for batch in batches_of_step(rows, config, step)]
        assert torch.equal(torch.cat(together), alone)
        of_all = batches_of_step(rows, config, step, of_all_processes=True)
        assert torch.equal(torch.cat([batch.ids for batch in of_all]), alone)
