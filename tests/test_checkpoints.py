"""Nothing of a run is lost: resume, damaged files, numbers that are not finite, signals, folders that are used."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from helpers import BLT_FLAGS, ENTROPY_FLAGS, KILLS, entry_point, error_of, output_of, run_here, some_words, tiny_blt

from blt import checkpoints, loop, loss_watch
from blt.checkpoints import has_checkpoint
from blt.config import run_script
from blt.files import model_hash, write_json, write_sealed
from blt.ids import BYTES
from blt.locks import CLAIMED, claim_folder
from blt.loop import read_metrics
from blt.records import RunRecord
from blt.runs import claim_output
from blt.training import PatchedDataset, TrainingConfig, train_blt
from entropy_llm import EntropyRunConfig
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt

OPTIONS = dict(
    row_bytes=64, batch_rows=4, steps=12, eval_every=5, log_every=1, cooldown=0.4, device="cpu", precision="fp32"
)


def dataset(validation=1, method="space", threshold=1.0):
    patcher = EntropyPatcher(None, method=method, threshold=threshold)
    texts = [some_words(40, 100 + seed) for seed in range(validation)]
    return PatchedDataset.from_documents([some_words(80, seed) for seed in range(12)], texts, patcher, 64, 4)


def train(folder, data=None, **changes):
    """Train a tiny BLT in a folder: `train_blt`'s dict."""
    config = TrainingConfig(output=str(folder), **(OPTIONS | changes))
    return train_blt(tiny_blt(), dataset() if data is None else data, config)


def stop_in_step(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while it computes a step."""
    original = loop.set_learning_rates
    steps = iter(range(10**6))

    def and_signal(*arguments):
        if next(steps) == step:
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(loop, "set_learning_rates", and_signal)


def state_of(folder):
    """What two equal runs have in common: last and best weights, scores and losses."""
    last = torch.load(folder / "last.pt", weights_only=True)
    lines = [
        {name: value for name, value in line.items() if name != "bytes_per_second"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    best = torch.load(folder / "best.pt", weights_only=True)
    return last["model"], best, last["best"], last["last"], last["bytes"], lines


def assert_same(one, other):
    for a, b in zip(one[:2], other[:2]):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert one[2:] == other[2:]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run straight through: (folder, what `train_blt` returned). Tests must not write to it."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return folder, train(folder)


@pytest.fixture
def finished(straight, tmp_path):
    """A copy of the folder of a finished run."""
    return shutil.copytree(straight[0], tmp_path / "run")


# Stopped


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_saves_the_step_and_the_run_goes_on(tmp_path, straight, monkeypatch, capsys, number, status):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6, number)
        with pytest.raises(SystemExit if status else KeyboardInterrupt) as stopped:
            train(tmp_path / "run")
    if status:
        assert stopped.value.code == status
    assert signal.getsignal(number) == before
    assert "saved in" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 7
    result = train(tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))
    assert result["val_bpb"] == straight[1]["val_bpb"] and result["last_val_bpb"] == straight[1]["last_val_bpb"]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_signal_in_an_evaluation_saves_the_step_and_the_evaluation_is_done_later(
    tmp_path, straight, monkeypatch, steps
):
    original = loop.evaluate_together
    calls = iter(range(100))

    def interrupted(*arguments):
        if next(calls) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_together", interrupted)
        with pytest.raises(SystemExit):
            train(tmp_path / "run")
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["step"] == {1: 5, 3: 12}[steps] and last["evaluated"] == {1: 0, 3: 10}[steps]
    train(tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))


def test_checkpoints_by_time(tmp_path, straight, monkeypatch):
    saved = []
    original = loop.save_checkpoint

    def save(path, model, optimizers, scaler, config, state):
        saved.append(state["step"])
        original(path, model, optimizers, scaler, config, state)

    monkeypatch.setattr(loop, "save_checkpoint", save)
    train(tmp_path / "run", checkpoint_minutes=1e-9)
    assert saved == list(range(1, 13))
    assert torch.load(tmp_path / "run" / "previous.pt", weights_only=True)["step"] == 11
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))


def test_lines_after_the_checkpoint_and_a_cut_line_are_dropped(tmp_path, straight, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(SystemExit):
            train(tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')
    (tmp_path / "run" / "last.pt1234.tmp").write_bytes(b"half")
    train(tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_finished_run_has_nothing_left_to_do(finished, straight, capsys):
    assert train(finished, resume=True) == straight[1]
    assert "nothing was left to do" in capsys.readouterr().out
    assert straight[1]["bytes_per_second"] > 0


# Damaged


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "cut": lambda data: data[:-1000],
    "cut by one": lambda data: data[:-1],
    "empty": lambda data: b"",
    "text": lambda data: b"no checkpoint\n" * 100,
    "flipped": flip,
    "grown": lambda data: data + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, straight, capsys, damage):
    last = finished / "last.pt"
    last.write_bytes(damage(last.read_bytes()))
    train(finished, resume=True)
    printed = capsys.readouterr().out
    assert "last.pt is damaged" in printed and f"resumed {finished / 'previous.pt'} at step 10" in printed
    assert_same(state_of(finished), state_of(straight[0]))
    # The damaged file did not push the whole one out.
    (finished / "last.pt").unlink()
    train(finished, resume=True)
    assert_same(state_of(finished), state_of(straight[0]))


@pytest.mark.parametrize("kind", ["cut", "flipped", "exchanged"])
def test_random_damage_is_always_found(finished, tmp_path, kind):
    """200 cases of each kind; none is read."""
    rng = np.random.default_rng(0)
    data = (finished / "last.pt").read_bytes()
    other = (finished / "previous.pt").read_bytes()
    path = tmp_path / "last.pt"
    for _ in range(200):
        place = int(rng.integers(len(data)))
        damaged = {
            "cut": data[:place],
            "flipped": data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :],
            "exchanged": data[:place] + other[place:],
        }[kind]
        if damaged in (data, other):
            continue
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            checkpoints._read_whole(path)


def test_two_damaged_checkpoints_are_an_error(finished):
    for name in ("last.pt", "previous.pt"):
        (finished / name).write_bytes(b"text")
    with pytest.raises(ValueError, match=r"last.pt is damaged.*previous.pt is damaged.*--overwrite"):
        train(finished, resume=True)


# Not finite


def test_a_score_that_is_no_number_is_never_kept(tmp_path, monkeypatch):
    original = loop.evaluate_together
    scores = iter([3.0, math.nan])

    def evaluate(*arguments):
        result = original(*arguments)
        return result | {"val_bpb": next(scores)}

    monkeypatch.setattr(loop, "evaluate_together", evaluate)
    with pytest.raises(ValueError, match=r"val_bpb is nan at step 10, .*lower --lr .*of step 5 in .*last.pt"):
        train(tmp_path / "run")
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["step"] == 5 and last["best"]["val_bpb"] == 3.0
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_first_step_that_is_too_large_saves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"at step 1, and nothing of it was saved; lower --lr") as error:
        train(tmp_path / "run", lr=1e30, adam_lr=1e30, steps=1)
    assert "last.pt" not in str(error.value)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_weights_that_are_not_finite_are_not_saved_between_evaluations(tmp_path, monkeypatch):
    """The loss of the step is still finite: it is of the weights before the update."""
    original = loop.step_optimizers

    def break_weights(*arguments):
        original(*arguments)
        arguments[0][0].param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(loop, "step_optimizers", break_weights)
    with pytest.raises(ValueError, match="a weight is infinite .* at step 1,"):
        train(tmp_path / "run", checkpoint_minutes=1e-9)
    assert not list((tmp_path / "run").glob("*.pt"))


def test_a_gradient_that_is_not_finite_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "clip_gradients", lambda *arguments: torch.tensor(math.inf))
    with pytest.raises(
        ValueError, match=r"norm of the gradient is inf at step 1 \(its batch is in .*bad_batch.json\); lower --lr"
    ):
        train(tmp_path / "run")


# Spikes


ADD = loop.LossWatch.add


def losses_of(monkeypatch, losses):
    """Let the training step report these losses instead of its own; a step without one has 3.0."""

    def add(self, step, loss_nats, gradient_norm, row_nats):
        ADD(self, step, torch.tensor(losses.get(step, 3.0)), gradient_norm, row_nats)

    monkeypatch.setattr(loop.LossWatch, "add", add)


LONG = dict(steps=60, eval_every=20, spike=1.5)


def test_a_loss_that_stays_up_stops_the_run(tmp_path, monkeypatch):
    losses_of(monkeypatch, {step: 5.0 for step in range(25, 99)})
    with pytest.raises(ValueError, match=r"rose at step 25 from 3.00 nats to 5.00 or more.*step 20 in .*last.pt"):
        train(tmp_path / "run", **LONG)
    report = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert report["step"] == 25 and report["losses"][-10:] == [[step, 5.0] for step in range(25, 35)]
    # The text of the batch, rows in order of their losses.
    batch = dataset().train_rows.shuffled_batch(24, 4, 1337)
    texts = {loss_watch.text_of(row, BYTES) for row in batch.ids}
    assert {row["text"] for row in report["rows"]} == texts and len(report["rows"]) == 4
    nats = [row["nats"] for row in report["rows"]]
    assert nats == sorted(nats, reverse=True) and nats[-1] > 0
    # The run goes on from before the spike, and a new run removes the report.
    losses_of(monkeypatch, {})
    train(tmp_path / "run", **LONG, resume=True, lr=0.001)
    train(tmp_path / "run", **LONG, overwrite=True)
    assert not (tmp_path / "run" / "bad_batch.json").exists()


def test_a_checkpoint_from_inside_a_spike_is_not_used(tmp_path, monkeypatch, capsys):
    losses_of(monkeypatch, {step: 5.0 for step in range(38, 99)})
    with pytest.raises(ValueError, match=r"rose at step 38 .*step 20 in .*previous.pt: add --resume"):
        train(tmp_path / "run", **LONG)
    assert torch.load(tmp_path / "run" / "last.pt.damaged", weights_only=True)["step"] == 40
    losses_of(monkeypatch, {})
    train(tmp_path / "run", **LONG, resume=True)
    assert "previous.pt at step 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    "losses, changes",
    [
        ({step: 5.0 for step in range(25, 34)}, {}),
        ({step: 4.4 for step in range(25, 60)}, {}),
        ({step: 9.0 for step in range(25, 60)}, dict(spike=0.0)),
        ({step: 0.01 if step < 25 else 0.4 for step in range(60)}, {}),
    ],
    ids=["nine steps", "not high enough", "switched off", "near zero"],
)
def test_what_is_no_spike(tmp_path, monkeypatch, losses, changes):
    losses_of(monkeypatch, losses)
    assert train(tmp_path / "run", **(LONG | changes))["val_bpb"] > 0


def test_the_lowest_loss_survives_a_resume(tmp_path, monkeypatch):
    losses_of(monkeypatch, {step: 5.0 for step in range(21, 99)})
    train(tmp_path / "run", **(LONG | dict(steps=20)))
    # Only the checkpoint knows that losses of 3 have been.
    with pytest.raises(ValueError, match="rose at step 21 from 3.00 nats"):
        train(tmp_path / "run", **LONG, resume=True)


def test_the_first_bad_step_is_named_however_seldom_losses_are_read(tmp_path, monkeypatch):
    losses_of(monkeypatch, {7: math.nan, 8: math.nan})
    with pytest.raises(ValueError, match=r"the loss is nan at step 7 \(its batch"):
        train(tmp_path / "run", log_every=1000, eval_every=1000)


def test_two_library_runs_in_one_folder(tmp_path):
    (tmp_path / "run").mkdir()
    with claim_folder(tmp_path / "run"):
        CLAIMED.clear()
        with pytest.raises(ValueError, match="another process is training in"):
            train(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="x.json is not written"):
        write_json(tmp_path / "x.json", {"a": [math.nan]})
    assert not (tmp_path / "x.json").exists()


# The same run


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 6)
        with pytest.raises(SystemExit):
            train(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "changes", [dict(seed=2), dict(lr=0.02), dict(steps=11), dict(weight_decay=0.2), dict(table_lr=8.0)]
)
def test_other_settings_are_refused(stopped, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name}: .* then, {changes[name]} now"):
        train(stopped, resume=True, **changes)


def test_other_text_or_patches_are_refused(stopped):
    other = PatchedDataset.from_documents([b"other text " * 80], [b"abc"], dataset().patcher, 64, 4)
    with pytest.raises(ValueError, match="first_row_sha256"):
        train(stopped, other, resume=True)
    with pytest.raises(ValueError, match="patch_rule"):
        train(stopped, dataset(method="static", threshold=5.0), resume=True)


def test_gentler_and_longer_runs_go_on_with_a_note(stopped, capsys):
    train(stopped, resume=True, lr=0.001, table_lr=0.5, steps=14)
    printed = capsys.readouterr().out
    assert "note: lr: 0.005 then, 0.001 now; the steps from 8 on" in printed and "note: steps: 12 then, 14" in printed
    assert "note: table_lr: 2.0 then, 0.5 now" in printed
    rates = {line["step"]: line["lr"] for line in read_metrics(stopped / "metrics.jsonl") if "lr" in line}
    assert rates[7] == 0.005 and rates[8] == pytest.approx(0.001) and max(rates) == 14


def test_another_precision_is_noted(stopped, capsys, monkeypatch):
    """As where `--precision auto` is another one on another machine."""
    monkeypatch.setattr(loop, "choose_precision", lambda name, device: "bf16")
    train(stopped, resume=True)
    assert "note: precision was fp32 and is bf16 here; the steps from 8 on follow it" in capsys.readouterr().out


def test_a_run_of_more_cards_and_another_precision_is_loaded(stopped, monkeypatch):
    """Where it was not in fp16 the scaler begins as new; random states are of the cards that are here."""
    checkpoint = torch.load(stopped / "last.pt", weights_only=True)
    assert checkpoint["scaler"] == {}
    states = [torch.tensor([number], dtype=torch.uint8) for number in (1, 2)]
    checkpoint |= {"random_cuda": states, "optimizers": []}
    monkeypatch.setattr(checkpoints, "_read_last_whole", lambda path: (path, checkpoint))
    monkeypatch.setattr(checkpoints, "_check_same_run", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    set_states = []
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", set_states.extend)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    checkpoints.load_checkpoint(stopped / "last.pt", tiny_blt(), [], scaler, None, {})
    assert set_states == states[:1]


def test_a_moved_folder_goes_on(stopped, straight, tmp_path):
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    stopped.rename(moved)
    train(moved, resume=True, prompt="x", sample_bytes=1, data_cache="other")
    assert_same(state_of(moved), state_of(straight[0]))


@pytest.mark.parametrize("steps", [12, 16])
def test_scores_of_other_text_are_not_compared(finished, steps, capsys):
    """The best so far is measured again on the new text."""
    result = train(finished, dataset(validation=3), resume=True, steps=steps, lr=1e-9, adam_lr=1e-9)
    assert "validation text is another one" in capsys.readouterr().out
    model = tiny_blt()
    loop.load_weights(finished / "best.pt", model)
    data = dataset(validation=3)
    expected = loop.evaluate_together(model, data.validation_batches, torch.device("cpu"), "fp32")
    assert result["val_bpb"] == expected["val_bpb"] and result["val_bytes"] == expected["val_bytes"]
    assert torch.load(finished / "last.pt", weights_only=True)["last"]["val_bytes"] == expected["val_bytes"]


def test_best_weights_newer_than_the_checkpoint(stopped, straight):
    """Killed between best.pt and last.pt: the score of best.pt is that of its weights, not of older ones."""
    shutil.copy(straight[0] / "best.pt", stopped)
    result = train(stopped, resume=True)
    assert result["val_bpb"] == straight[1]["val_bpb"]
    assert_same(state_of(stopped), state_of(straight[0]))


def test_lost_best_weights(stopped, capsys):
    (stopped / "best.pt").unlink()
    assert train(stopped, resume=True)["val_bpb"] > 0
    assert "missing or damaged" in capsys.readouterr().out and (stopped / "best.pt").exists()


# Used folders


def test_an_earlier_run_is_kept_beside(finished, capsys):
    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    before = contents(finished)
    train(finished, steps=3, eval_every=3)
    earlier = finished.with_name(f"{finished.name}.earlier-1")
    assert f"the earlier run in {finished} is kept in {earlier}" in capsys.readouterr().out
    assert contents(earlier).items() <= before.items() and {"best.pt", "last.pt"} <= contents(earlier).keys()
    train(finished, steps=4, eval_every=4)
    second = torch.load(finished.with_name(f"{finished.name}.earlier-2") / "last.pt", weights_only=True)
    assert second["step"] == 3 and contents(earlier).items() <= before.items()


def test_overwrite_replaces_an_earlier_run(finished):
    train(finished, overwrite=True, steps=3, eval_every=3)
    assert not list(finished.parent.glob("*.earlier-*"))
    assert torch.load(finished / "last.pt", weights_only=True)["step"] == 3
    assert torch.load(finished / "previous.pt", weights_only=True)["step"] == 3
    assert max(line["step"] for line in read_metrics(finished / "metrics.jsonl")) == 3


def test_two_runs_in_one_folder(tmp_path):
    config = TrainingConfig(output=str(tmp_path / "run"), **OPTIONS)
    with claim_output(config, config.output):
        with pytest.raises(ValueError, match="another process is training in"):
            with claim_output(config, config.output):
                pass
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_looked_for_first(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainingConfig(output=str(tmp_path / "run"), tensorboard=True, **OPTIONS)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        with claim_output(config, config.output):
            pass
    assert not (tmp_path / "run").exists()


# The scripts

SHORT = dict(steps=4, eval_every=4, val_bytes=20000)
NO_OVERWRITE = [flag for flag in BLT_FLAGS if flag != "--overwrite"]


def test_scripts_keep_an_earlier_run(pipeline_copy):
    def contents(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    model, text = contents(pipeline_copy / "checkpoints"), contents(pipeline_copy)
    entropy_run = contents(pipeline_copy / "entropy_model_run")
    output_of(pipeline_copy, "llm", *NO_OVERWRITE, "--steps", 4, "--eval_every", 4)
    earlier = contents(pipeline_copy / "checkpoints.earlier-1")
    assert earlier.items() <= model.items() and {"best.pt", "model.json", "entropy_model.pth"} <= earlier.keys()
    flags = [flag for flag in ENTROPY_FLAGS if flag != "--overwrite"]
    output_of(pipeline_copy, "entropy_llm", *flags, "--steps", 4, "--eval_every", 4)
    earlier = contents(pipeline_copy / "entropy_model_run.earlier-1")
    assert earlier.items() <= (entropy_run | text).items()
    assert {"best.pt", "entropy_model.pth", "entropy_model.json"} <= earlier.keys()
    assert contents(pipeline_copy)["entropy_model.pth"] != earlier["entropy_model.pth"]


def test_an_output_that_cannot_be_written_is_found_first(pipeline_copy):
    flags = [flag for flag in ENTROPY_FLAGS if flag != "--overwrite"]
    assert "without .json" in error_of(pipeline_copy, "entropy_llm", *flags, "--output", "em.json")
    (pipeline_copy / "file").write_text("")
    assert "file/x" in error_of(pipeline_copy, "llm", *NO_OVERWRITE, "--output", "file/x")
    assert not list(pipeline_copy.glob("*.earlier-*"))


def test_a_resume_on_other_patches_or_text_is_refused(pipeline_copy, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_step(patch, 7)
        status, _, errors = run_here(pipeline_copy, "llm", *BLT_FLAGS)
    assert status == 143 and "go on with the same command and --resume" in errors
    record = (pipeline_copy / "checkpoints" / "model.json").read_bytes()
    resume = [*NO_OVERWRITE, "--resume"]
    chosen = pipeline_copy / "patch_cache" / "patches.json"
    before = chosen.read_text()
    other = json.loads(before)
    other["patch_config"]["entropy_threshold"] += 0.5
    chosen.write_text(json.dumps(other))
    assert "patches.json is damaged or was edited" in error_of(pipeline_copy, "llm", *resume)
    assert other.pop("sha256")
    write_sealed(chosen, other | {"corpus_sha256": "0" * 64})
    assert "patches.json was made for another corpus" in error_of(pipeline_copy, "llm", *resume)
    write_sealed(chosen, other)
    assert "patch_rule: " in error_of(pipeline_copy, "llm", *resume)
    chosen.write_text(before)
    assert "global_dim: 32 then, 48 now" in error_of(pipeline_copy, "llm", *resume, "--global_dim", 48)
    assert (pipeline_copy / "checkpoints" / "model.json").read_bytes() == record
    # What does not matter: names of the same things.
    shutil.copytree(pipeline_copy / "patch_cache", pipeline_copy / "elsewhere")
    (pipeline_copy / "checkpoints").rename(pipeline_copy / "moved")
    free = ["--patch_cache", "elsewhere", "--output", pipeline_copy / "moved", "--prompt", "x"]
    free += ["--entropy_model_path", pipeline_copy / "entropy_model.pth"]
    assert "at step 8" in output_of(pipeline_copy, "llm", *resume, *free)


def test_a_trained_folder_is_complete(pipeline_copy, tmp_path):
    """It is moved, and the entropy model beside it is gone."""
    (pipeline_copy / "checkpoints").rename(tmp_path / "moved")
    for name in ("entropy_model.pth", "entropy_model.json"):
        (pipeline_copy / name).unlink()
    model, patcher, record = load_blt(tmp_path / "moved")
    assert model_hash(patcher.entropy_model) == record.entropy_model_sha256
    flags = ["--model", "moved", "--prompt", "The ", "--max_new_bytes", 5, "--device", "cpu"]
    assert output_of(tmp_path, "generate", *flags).startswith("The ")


def test_killed_before_the_first_checkpoint(tmp_path, straight, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.json").write_text("{}")
    train(tmp_path / "run", resume=True)
    assert "begins at its first step" in capsys.readouterr().out
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))


def test_killed_in_the_first_evaluation(tmp_path, straight, monkeypatch):
    def killed(path, model):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_state", killed)
        with pytest.raises(RuntimeError):
            train(tmp_path / "run")
    # Weights are never there without a checkpoint.
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 5
    train(tmp_path / "run", resume=True)
    assert_same(state_of(tmp_path / "run"), state_of(straight[0]))


def test_weights_without_a_checkpoint_are_not_resumed(finished):
    for name in ("last.pt", "previous.pt"):
        (finished / name).unlink()
    before = (finished / "best.pt").read_bytes()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train(finished, resume=True)
    assert (finished / "best.pt").read_bytes() == before


def test_an_interrupted_workflow_goes_on(pipeline, tmp_path, monkeypatch):
    (tmp_path / "data_cache").symlink_to(pipeline[0] / "data_cache")
    monkeypatch.setitem(EntropyRunConfig.PRESETS.machines, "cpu", EntropyRunConfig.PRESETS.machines["cpu"] | SHORT)
    flags = ["--quick_demo", "--train_entropy", "--methods", "space", "static", *NO_OVERWRITE]
    with monkeypatch.context() as patch:
        # In the second method: the entropy model takes 4 steps and the first method 12.
        stop_in_step(patch, 4 + 12 + 3)
        assert run_here(tmp_path, "complete_entropy_workflow", *flags)[0] == 143
    printed = output_of(tmp_path, "complete_entropy_workflow", *flags, "--resume")
    assert printed.count("nothing was left to do") == 2 and "at step 4" in printed
    rows = json.loads((tmp_path / "workflow" / "comparison.json").read_text())
    assert {row["method"] for row in rows} == {"space", "static"}
    for row in rows:
        record = RunRecord.load(tmp_path / "workflow" / f"{row['method']}_seed1337" / "model.json")
        assert record.result["val_bpb"] == row["val_bpb"]


def test_the_entropy_model_beside_an_older_folder(pipeline_copy, monkeypatch):
    """Its record names a path that held where it was trained; from elsewhere the one beside it is taken."""
    for name in ("entropy_model.pth", "entropy_model.json"):
        (pipeline_copy / "checkpoints" / name).unlink()
    monkeypatch.chdir(pipeline_copy.parent)
    assert load_blt("copy/checkpoints")[1].entropy_model is not None


RECORD_DAMAGES = {
    "a key too many": lambda values: values["model_config"].update(no_such_size=1),
    "a word for a number": lambda values: values["model_config"].update(global_dim="x"),
    "a list for a dict": lambda values: values.update(model_config=[1]),
    "a key missing": lambda values: values.pop("settings"),
    "a rule too many": lambda values: values["patch_config"].update(no_such_setting=1),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGES.values(), ids=RECORD_DAMAGES.keys())
def test_a_damaged_record_is_named(pipeline_copy, damage):
    path = pipeline_copy / "checkpoints" / "model.json"
    values = json.loads(path.read_text())
    damage(values)
    assert values.pop("sha256")
    write_sealed(path, values)
    line = error_of(pipeline_copy, "generate", "--device", "cpu", "--prompt", "x")
    assert "model.json" in line and "train" in line


def test_deep_json_is_no_record(tmp_path):
    (tmp_path / "model.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="model.json is not JSON"):
        RunRecord.load(tmp_path / "model.json")


def test_settings_are_finite():
    with pytest.raises(ValueError, match="clip is inf"):
        TrainingConfig(clip=math.inf)


# Killed


def run_script_here(folder, script, flags):
    """What a killed process runs: a script's main, in a folder."""
    os.chdir(folder)
    torch.set_num_threads(1)
    main, config_class = entry_point(script)
    sys.argv = [f"{script}.py", *map(str, flags)]
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        run_script(main, config_class, "about")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["llm", "entropy_llm"])
def test_killed_at_random_instants(pipeline_copy, script, capsys):
    """SIGKILL at random instants, and each time --resume: what is left at the end is that of the run straight through.

    A run that reaches its end gives way to another one, until there were KILLS kills.
    """
    of_script = {"llm": [*NO_OVERWRITE, "--sample_bytes", 0], "entropy_llm": ENTROPY_FLAGS}[script]
    flags = [flag for flag in of_script if flag != "--overwrite"]
    flags += ["--steps", 60, "--eval_every", 7, "--checkpoint_minutes", 1e-9]
    suffix = {"llm": "", "entropy_llm": ".pth"}[script]

    def folder_of(name):
        return pipeline_copy / (name if script == "llm" else f"{name}_run")

    def record_of(name):
        return RunRecord.load(pipeline_copy / (f"{name}/model.json" if script == "llm" else f"{name}.json"))

    # A process that has imported everything, of which the others are copies: a start takes no seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llm", "entropy_llm", "test_checkpoints"])

    def start(name, *more):
        arguments = (pipeline_copy, script, [*flags, "--output", name + suffix, *more])
        process = context.Process(target=run_script_here, args=arguments)
        process.start()
        return process

    began = time.perf_counter()
    process = start("straight")
    process.join()
    assert process.exitcode == 0
    seconds = time.perf_counter() - began
    rng = np.random.default_rng(0)
    kills, number, in_training = 0, 0, 0
    while kills < KILLS:
        name = f"killed{number}"
        process = start(name, *(["--resume"] if folder_of(name).exists() else []))
        process.join(rng.uniform(0, seconds))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            in_training += has_checkpoint(folder_of(name))
        if process.exitcode == 0 or kills == KILLS:
            if process.exitcode != 0:
                process = start(name, *(["--resume"] if folder_of(name).exists() else []))
                process.join()
            assert process.exitcode == 0
            assert_same(state_of(folder_of(name)), state_of(folder_of("straight")))
            records = [record_of("straight"), record_of(name)]
            assert records[0].weights_sha256 == records[1].weights_sha256
            assert records[0].result["val_bpb"] == records[1].result["val_bpb"]
            number += 1
        assert process.exitcode in (0, -signal.SIGKILL)
    with capsys.disabled():
        print(f"\n{script}: {kills} kills, {in_training} of them after the first step; {number} runs, all as straight")
    assert in_training > KILLS / 3


def test_a_full_disk_keeps_the_earlier_run_where_it_was(finished, tmp_path, monkeypatch):
    (tmp_path / "beside.pth").write_bytes(b"weights")
    before = sorted(path.name for path in finished.iterdir())

    def copy(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(checkpoints.shutil, "copy2", copy)
    with pytest.raises(OSError):
        checkpoints.keep_earlier_run(finished, tmp_path / "beside.pth")
    assert not list(tmp_path.glob("*.earlier-*")) and sorted(path.name for path in finished.iterdir()) == before


def test_damaged_lines_of_metrics_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 2}\n{"st')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
