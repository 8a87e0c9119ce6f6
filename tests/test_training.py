"""Training: it learns, it repeats, it resumes; rows; optimizers and settings; what comes of it."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import TINY_BLT, some_words, tiny_blt, tiny_entropy_model

from blt import training
from blt.config import make_parser
from blt.loop import (
    FEW_EPOCHS,
    REREAD_DROPOUT,
    RunConfig,
    choose_dropout,
    compile_losses,
    read_metrics,
    set_learning_rates,
)
from blt.metric import RowLosses, bits_per_byte
from blt.optimizers import learning_rate_scale, make_optimizers
from blt.patch_rules import PatchConfig
from blt.rows import BitArray, DocumentStream, TrainingRows, evaluation_batches
from blt.segments import check_patch_lengths
from blt.training import PatchedDataset, TrainingConfig, train_blt
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig
from entropy_patcher import EntropyPatcher
from generate import generate
from llm import LLMConfig
from template_llm import TemplateConfig


def dataset(row_bytes=64):
    patcher = EntropyPatcher(None, method="space")
    train = [some_words(80, seed) for seed in range(12)]
    return PatchedDataset.from_documents(train, [some_words(40, 100)], patcher, row_bytes, 4)


def config(tmp_path, **changes):
    settings = dict(
        row_bytes=64,
        batch_rows=4,
        steps=30,
        eval_every=10,
        log_every=5,
        device="cpu",
        precision="fp32",
        output=str(tmp_path / "run"),
    )
    return TrainingConfig(**(settings | changes))


def weights_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)["model"]


# The loop


def test_train_blt_learns_and_reports(tmp_path):
    blt = tiny_blt()
    data = dataset()
    before = bits_per_byte(blt, data.patcher, data.validation, row_bytes=64)
    result = train_blt(blt, data, config(tmp_path, steps=60))
    assert {"val_bpb", "val_loss", "val_accuracy", "bytes_per_second", "avg_patch_size"} <= set(result)
    assert result["val_bpb"] < 0.6 * before
    assert 0 < result["val_accuracy"] < 1 and result["bytes_per_second"] > 0
    # The weights in the model are the best ones.
    after = bits_per_byte(blt, data.patcher, data.validation, row_bytes=64)
    assert after == pytest.approx(result["val_bpb"], rel=1e-4)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "val_bpb" in line] == [10, 20, 30, 40, 50, 60]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_one_batch_overfits(tmp_path):
    patcher = EntropyPatcher(None, threshold=4, method="static")
    data = PatchedDataset.from_documents([some_words(12)], [some_words(12)], patcher, 64, 1)
    settings = config(tmp_path, steps=150, batch_rows=1, eval_every=150)
    assert train_blt(tiny_blt(), data, settings)["val_bpb"] < 0.25


def test_same_seed_same_losses_and_resume_equals_straight_through(tmp_path):
    def run(name, **changes):
        train_blt(tiny_blt(), dataset(), config(tmp_path, output=str(tmp_path / name), **changes))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        return weights_of(tmp_path / name), [(line["step"], line.get("loss"), line.get("val_bpb")) for line in lines]

    straight, losses = run("straight")
    again, losses_again = run("again")
    assert losses == losses_again
    assert all(torch.equal(straight[name], again[name]) for name in straight)

    class Stop(Exception):
        pass

    data = dataset()
    original = data.train_rows.shuffled_batch

    def stopping(position, *args):
        if position > 23:
            raise Stop
        return original(position, *args)

    data.train_rows.shuffled_batch = stopping
    with pytest.raises(Stop):
        train_blt(tiny_blt(), data, config(tmp_path, output=str(tmp_path / "stopped")))
    resumed, losses_resumed = run("stopped", resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert losses_resumed == losses


def test_resume_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train_blt(tiny_blt(), dataset(), config(tmp_path, resume=True))
    train_blt(tiny_blt(), dataset(), config(tmp_path, steps=2))
    with pytest.raises(ValueError, match="seed: 1337 then, 4 now"):
        train_blt(tiny_blt(), dataset(), config(tmp_path, steps=2, seed=4, resume=True))


def test_accumulation_equals_one_large_batch(tmp_path):
    def run(name, **changes):
        folder = tmp_path / name
        train_blt(
            tiny_blt(), dataset(), config(tmp_path, output=str(folder), steps=3, eval_every=3, log_every=1, **changes)
        )
        losses = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
        return losses, weights_of(folder)

    losses, large = run("large", batch_rows=8)
    losses_accumulated, accumulated = run("accumulated", batch_rows=4, accumulate=2)
    np.testing.assert_allclose(losses, losses_accumulated, rtol=1e-4)
    for name in large:
        # Muon's bf16 iterations differ by rounding.
        torch.testing.assert_close(large[name], accumulated[name], atol=2e-3, rtol=0)


def test_a_text_that_is_read_again_gets_dropout(tmp_path, capsys):
    stream = dataset().train_rows.stream
    for steps, given, wanted in (
        (100, {}, (0.1, 0.3)),
        (3, {}, (0.0, 0.0)),
        (100, dict(dropout=0.0), (0.0, 0.3)),
        (3, dict(ngram_dropout=0.2), (0.0, 0.2)),
        (100, dict(ngram_sizes=[]), (0.1, 0.0)),
    ):
        settings = LLMConfig(preset=["nano", "cpu"], row_bytes=64, batch_rows=4, steps=steps, **given)
        epochs = steps * 256 / stream.total_bytes
        assert (epochs > 1.5) == (steps == 100)
        choose_dropout(settings, stream)
        assert (settings.dropout, settings.ngram_dropout) == wanted
        chosen = f"the training text is read {epochs:.1f} times: ngram_dropout 0.3"
        assert (chosen in capsys.readouterr().out) == (wanted[1] == 0.3)


@pytest.mark.parametrize("config_class", [LLMConfig, TemplateConfig])
def test_help_names_the_rates_of_a_text_that_is_read_again(config_class):
    words = " ".join(make_parser(config_class, "about").format_help().split())
    dropout, of_ngrams = REREAD_DROPOUT["dropout"], REREAD_DROPOUT["ngram_dropout"]
    assert f"None: 0, or {dropout} if the text is read more than {FEW_EPOCHS} times" in words
    assert f"None: 0, or {of_ngrams} as dropout" in words


def test_epochs_become_whole_updates():
    """The rows of two patching methods differ in number, and each run reads all of its own, but for a part of one."""
    documents = [some_words(80, seed) for seed in range(12)]
    updates = set()
    for size in (2.0, 4.5):
        patcher = EntropyPatcher(None, PatchConfig("static", size))
        rows = PatchedDataset.from_documents(documents, documents[:1], patcher, 64, 4).train_rows
        for epochs in (0.5, 1.0, 3.0):
            settings = LLMConfig(row_bytes=64, batch_rows=4, accumulate=2, steps=7, epochs=epochs, device="cpu")
            settings.choose_steps(rows)
            unread = epochs * len(rows) - settings.steps * 8
            assert 0 <= unread < 8
            updates.add(settings.steps)
        # Fewer rows than an update has are still an update.
        settings = LLMConfig(row_bytes=64, batch_rows=4, epochs=0.001, device="cpu")
        settings.choose_steps(rows)
        assert settings.steps == 1
    assert len(updates) > 3
    settings = LLMConfig(steps=7, device="cpu")
    settings.choose_steps(rows)
    assert settings.steps == 7


def test_a_run_of_epochs_ends_when_the_text_is_read(tmp_path):
    """Of the library too: the updates that a config has beside `epochs` do not count."""
    data = dataset()
    train_blt(tiny_blt(), data, config(tmp_path, epochs=1.0))
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert last["step"] == len(data.train_rows) // 4 != 30


def test_train_blt_stops_on_a_leak(tmp_path):
    class Leaking(BLTModel):
        def forward(self, ids, lengths):
            return super().forward(ids, lengths) + torch.nn.functional.one_hot(ids.roll(-1, 1), 257)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="leak"):
        train_blt(Leaking(BLTConfig(**TINY_BLT)), dataset(), config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path, monkeypatch):
    blt = tiny_blt()
    blt.head.weight.data[5] = float("inf")
    # The leak gate would refuse such a model before the loop begins.
    monkeypatch.setattr(training, "leak_gate", lambda *args: 0.0)
    with pytest.raises(ValueError, match="lower --lr"):
        train_blt(blt, dataset(), config(tmp_path, eval_every=1, log_every=100))
    # There is no checkpoint of a broken model.
    assert not (tmp_path / "run" / "last.pt").exists()


def test_train_blt_wants_a_patched_dataset(tmp_path):
    with pytest.raises(ValueError, match="PatchedDataset"):
        train_blt(tiny_blt(), [[b"ab", b"c"]], config(tmp_path))


def compiled_as(monkeypatch, error=0.0, **changes):
    """What `compile_losses` does if torch.compile gives nats that are wrong by this much for a row's first byte."""
    blt = tiny_blt(**changes)

    def wrong(losses):
        def compiled(*inputs):
            nats_BT = losses(*inputs)
            moved_T = torch.zeros(nats_BT.shape[1])
            moved_T[0] = error
            return nats_BT + moved_T

        return compiled

    monkeypatch.setattr(torch, "compile", lambda losses, dynamic: wrong(losses))
    settings = RunConfig(compile="yes", batch_rows=4)
    made = compile_losses(blt, settings, dataset().train_rows, torch.device("cpu"), "fp32")
    # Gradients of the trial pass would be added to those of the first step.
    assert all(p.grad is None for p in blt.parameters())
    return blt, made


@pytest.mark.parametrize("error", [9.0, math.nan])
def test_a_wrong_compiled_model_stops_the_run(monkeypatch, error):
    with pytest.raises(ValueError, match="--compile no"):
        compiled_as(monkeypatch, error)


def test_a_right_compiled_model_is_used(monkeypatch):
    _, made = compiled_as(monkeypatch)
    assert not isinstance(made, RowLosses)
    # With dropout two passes differ, and there is nothing to compare.
    for dropout in (dict(dropout=0.1), dict(ngram_dropout=0.1)):
        _, made = compiled_as(monkeypatch, error=9.0, **dropout)
        assert not isinstance(made, RowLosses)


@pytest.mark.parametrize("choice", ["no", "auto"])
def test_no_compilation_on_a_cpu(monkeypatch, choice):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: pytest.fail("torch.compile was called"))
    blt = tiny_blt()
    settings = RunConfig(compile=choice, batch_rows=4)
    row_losses = compile_losses(blt, settings, dataset().train_rows, torch.device("cpu"), "fp32")
    assert isinstance(row_losses, RowLosses) and row_losses.model is blt


# Rows


@pytest.mark.parametrize("row_bytes, slots", [(32, None), (32, 5), (7, 4), (500, None), (64, 64)])
def test_every_id_is_a_target_once_with_its_own_patches(row_bytes, slots):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n, dtype=np.uint8) for n in (40, 0, 3, 100, 1)]
    flags = np.concatenate([[True], *(np.append(True, rng.random(len(d)) < 0.3) for d in documents)])
    starts = BitArray()
    for piece in np.split(flags, [3, 50, 51]):
        starts.append(piece)
    starts.close()
    stream = DocumentStream.of_documents(documents)
    whole = np.concatenate([*(np.append(256, d) for d in documents), [256]])
    assert stream.ids(0, len(stream)).tolist() == whole.tolist()
    assert starts.read(0, len(flags)).tolist() == flags.tolist()
    rows = TrainingRows(stream, row_bytes, starts, slots)
    targets = []
    for number in range(len(rows)):
        batch = rows.batch([number])
        check_patch_lengths(batch.patch_lengths, row_bytes + 1)
        begin = int(rows.row_positions[number])
        size = int(rows.row_lengths[number])
        targets.extend(range(begin + 1, begin + size))
        assert batch.ids[0, :size].tolist() == whole[begin : begin + size].tolist()
        made = np.zeros(row_bytes + 2, dtype=bool)
        made[np.concatenate(([0], batch.patch_lengths[0].cumsum(0).numpy()))] = True
        assert made[2:size].tolist() == flags[begin + 2 : begin + size].tolist()
        assert batch.is_scored[0].sum() == size - 1 == batch.targets
    assert targets == list(range(1, len(whole)))
    # Parts of documents in rows: runs of inputs of one row with one document number.
    inputs = np.concatenate([np.arange(b, b + n - 1) for b, n in zip(rows.row_positions, rows.row_lengths)])
    row_of_input = np.repeat(np.arange(len(rows)), rows.row_lengths - 1)
    runs = Counter(zip(row_of_input.tolist(), (whole == 256).cumsum()[inputs].tolist()))
    assert rows.document_parts().tolist() == list(runs.values())
    assert all(0 <= share < 1 for share in rows.padding())


def test_rows_waste_little():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n, dtype=np.uint8) for n in rng.integers(100, 4000, 200)]
    flags = np.concatenate([[True], *(rng.random(len(d) + 1) < 1 / 4.5 for d in documents)])
    starts = BitArray()
    starts.append(flags)
    starts.close()
    byte_waste, patch_waste = TrainingRows(DocumentStream.of_documents(documents), 4096, starts).padding()
    assert byte_waste < 0.05 and patch_waste < 0.05


def test_rows_of_uneven_patches_waste_bytes_and_slots_alike():
    """Half of the text has patches five times as long: with 4.5% empty slots at most, half of all bytes are padding."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, 3000, dtype=np.uint8) for _ in range(100)]
    shares = np.resize([1 / 4, 1 / 20], len(documents))
    flags = np.concatenate([[True], *(rng.random(len(d) + 1) < share for d, share in zip(documents, shares))])
    starts = BitArray()
    starts.append(flags)
    starts.close()
    stream = DocumentStream.of_documents(documents)
    byte_waste, patch_waste = TrainingRows(stream, 1024, starts).padding()
    assert abs(byte_waste - patch_waste) < 0.05 and byte_waste < 0.25
    assert TrainingRows(stream, 1024, starts, patch_slots=80).padding()[0] > 0.5


def test_shuffle_is_a_permutation_each_epoch():
    stream = DocumentStream.of_documents([np.arange(100, dtype=np.uint8)])
    rows = TrainingRows(stream, 10)

    def order(seed):
        return [rows.shuffled_batch(i, 1, seed=seed).ids[0, 1].item() for i in range(2 * len(rows))]

    seen = order(seed=3)
    first_epoch = seen[: len(rows)]
    second_epoch = seen[len(rows) :]
    assert sorted(first_epoch) == sorted(second_epoch) and first_epoch != second_epoch
    assert seen != order(seed=4)


# Optimizers and settings


def test_every_parameter_has_one_optimizer(tmp_path):
    blt = tiny_blt()
    muon, adam, row_wise = (
        [id(p) for group in optimizer.param_groups for p in group["params"]]
        for optimizer in make_optimizers(blt, config(tmp_path))
    )
    assert sorted(muon + adam + row_wise) == sorted(id(p) for p in blt.parameters())
    assert {id(blt.head.weight), id(blt.encoder.byte_embedding.weight)} <= set(adam)
    assert row_wise == [id(blt.encoder.hash_embedding.tables.weight)]
    assert id(blt.latent.blocks[0].attention.wq.weight) in muon


def test_schedules():
    config = RunConfig(steps=100, warmup=0.1, cooldown=0.4)
    trapezoid = [learning_rate_scale(step, config) for step in range(100)]
    assert trapezoid[0] == 0.1 and trapezoid[80] == 0.5
    assert trapezoid[9] == trapezoid[59] == 1.0
    assert 0 < trapezoid[99] <= 0.026
    config = RunConfig(steps=100, warmup=0.0, schedule="cosine")
    cosine = [learning_rate_scale(step, config) for step in range(100)]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[0] == 1.0 and cosine[99] < 0.01


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_tables_follow_a_power_of_the_schedule(power):
    settings = RunConfig(lr=0.01, adam_lr=0.02, table_lr=2.0, table_schedule=power)
    optimizers = make_optimizers(tiny_blt(), settings)
    # Twice, because a rate must follow from its peak and not from the rate before.
    for _ in range(2):
        assert set_learning_rates(optimizers, 0.25) == 0.0025
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert rates == [0.0025, 0.005, pytest.approx(0.04 * 0.25**power)]


@pytest.mark.parametrize(
    "config_class, bad, words",
    [
        (RunConfig, dict(steps=0), "steps is 0"),
        (RunConfig, dict(epochs=0.0), "epochs is 0"),
        (RunConfig, dict(clip=-1), "clip is -1"),
        (RunConfig, dict(schedule="step"), "schedule is 'step'"),
        (RunConfig, dict(val_fraction=0.9), "val_fraction is 0.9"),
        (RunConfig, dict(warmup=2), "warmup is 2"),
        (TrainingConfig, dict(entropy_threshold=0.5), "patch_method"),
        (EntropyConfig, dict(d_model=30, n_heads=4), "d_model is 30"),
        (EntropyConfig, dict(vocab_size=300), "vocab_size is 300"),
    ],
)
def test_config_errors_name_field_and_value(config_class, bad, words):
    with pytest.raises(ValueError, match=words):
        config_class(**bad)


# What comes of it


def test_generate_is_greedy_by_the_full_pass_and_seeded():
    blt = tiny_blt().eval()
    patcher = EntropyPatcher(tiny_entropy_model(max_seq_len=8), threshold=5.0)
    new = generate(blt, patcher, b"the cat", 12)
    whole = np.frombuffer(b"the cat" + new, dtype=np.uint8)
    (batch,) = evaluation_batches([whole], [patcher.starts(whole)], len(whole) + 1)
    with torch.no_grad():
        best = blt(batch.ids[:, :-1], batch.patch_lengths)[0].argmax(-1)
    assert best[7 : 7 + len(new)].tolist() == list(new)

    def sample(prompt):
        return generate(blt, patcher, prompt, 5, temperature=1.0, seed=1)

    assert sample("") == sample(b"")
    assert len(generate(blt, patcher, b"x" * 50, 4, context_bytes=16)) <= 4


def test_bits_per_byte_of_a_model_without_patches():
    entropy_model = tiny_entropy_model()
    torch.nn.init.zeros_(entropy_model.head.weight)
    # 256 classes; document ends are left out.
    assert bits_per_byte(entropy_model, None, [b"hello", b"you"]) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(entropy_model, None, [b""])
