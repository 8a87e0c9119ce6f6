"""Training: it learns, it repeats, it resumes; rows; metrics; errors."""

import json
import math
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from blt.config import field_comments
from blt.files import model_hash, save_weights, write_atomically
from blt.loop import RunConfig, check_compiled, read_metrics
from blt.metric import bits_per_byte, target_losses
from blt.optimizers import learning_rate_scale, make_optimizers
from blt.patch_rules import PatchConfig
from blt.rows import BitArray, DocumentStream, TrainingRows, evaluation_batches
from blt.segments import check_patch_lengths
from blt.training import PatchedDataset, TrainingConfig, train_blt
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import load_blt, load_entropy_model, save_entropy_model

TINY = dict(encoder_dim=32, global_dim=48, decoder_dim=32, global_layers=1, decoder_layers=1, hash_rows=64, window=16)
WORDS = b"the cat sat on the mat and the dog ate the food that the cat had left on the mat. ".split()


def text(n, seed):
    return b" ".join(np.random.default_rng(seed).choice(WORDS, n).tolist())


def dataset(row_bytes=64):
    patcher = EntropyPatcher(None, method="space")
    return PatchedDataset.from_documents([text(80, i) for i in range(12)], [text(40, 100)], patcher, row_bytes, 4)


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
    return TrainingConfig(**{**settings, **changes})


def model(seed=0):
    torch.manual_seed(seed)
    return BLTModel(BLTConfig(**TINY))


def test_train_blt_learns_and_reports(tmp_path):
    blt, data = model(), dataset()
    before = bits_per_byte(blt, data.patcher, data.validation, row_bytes=64)
    result = train_blt(blt, data, config(tmp_path, steps=60))
    assert {"val_bpb", "val_loss", "val_accuracy", "bytes_per_second", "avg_patch_size"} <= set(result)
    assert result["val_bpb"] < 0.6 * before
    assert 0 < result["val_accuracy"] < 1 and result["bytes_per_second"] > 0
    after = bits_per_byte(blt, data.patcher, data.validation, row_bytes=64)
    assert after == pytest.approx(result["val_bpb"], rel=1e-4)  # the weights in the model are the best ones
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_bpb" in line] == [10, 20, 30, 40, 50, 60]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_one_batch_overfits(tmp_path):
    patcher = EntropyPatcher(None, threshold=4, method="static")
    data = PatchedDataset.from_documents([text(12, 0)], [text(12, 0)], patcher, 64, 1)
    assert train_blt(model(), data, config(tmp_path, steps=150, batch_rows=1, eval_every=150))["val_bpb"] < 0.25


def test_same_seed_same_losses_and_resume_equals_straight_through(tmp_path):
    def run(name, **changes):
        blt = model()
        train_blt(blt, dataset(), config(tmp_path, output=str(tmp_path / name), **changes))
        state = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        metrics = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return state, [(line["step"], line.get("loss"), line.get("val_bpb")) for line in metrics]

    straight, losses = run("straight")
    again, losses_again = run("again")
    assert losses == losses_again and all(torch.equal(straight[k], again[k]) for k in straight)

    class Stop(Exception):
        pass

    data = dataset()
    original, calls = data.train_rows.shuffled_batch, []

    def stopping(position, *args):
        calls.append(position)
        if position > 23:
            raise Stop
        return original(position, *args)

    data.train_rows.shuffled_batch = stopping
    with pytest.raises(Stop):
        train_blt(model(), data, config(tmp_path, output=str(tmp_path / "stopped")))
    resumed, losses_resumed = run("stopped", resume=True)
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert losses_resumed == losses


def test_resume_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="without --resume"):
        train_blt(model(), dataset(), config(tmp_path, resume=True))
    train_blt(model(), dataset(), config(tmp_path, steps=2))
    with pytest.raises(ValueError, match="steps: 2 then, 4 now"):
        train_blt(model(), dataset(), config(tmp_path, steps=4, resume=True))


def test_accumulation_equals_one_large_batch(tmp_path):
    def weights(name, **changes):
        blt = model()
        train_blt(
            blt, dataset(), config(tmp_path, output=str(tmp_path / name), steps=3, eval_every=3, log_every=1, **changes)
        )
        losses.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line])
        return torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]

    losses = []
    large, accumulated = weights("large", batch_rows=8), weights("accumulated", batch_rows=4, accumulate=2)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for name in large:
        torch.testing.assert_close(
            large[name], accumulated[name], atol=2e-3, rtol=0
        )  # Muon's bf16 iterations differ by rounding


def test_train_blt_stops_on_a_leak(tmp_path):
    class Leaking(BLTModel):
        def forward(self, ids, lengths):
            return super().forward(ids, lengths) + torch.nn.functional.one_hot(ids.roll(-1, 1), 257)

    torch.manual_seed(0)
    with pytest.raises(ValueError, match="leak"):
        train_blt(Leaking(BLTConfig(**TINY)), dataset(), config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_with_advice(tmp_path):
    blt = model()
    blt.head.weight.data[5] = float("inf")
    data = dataset()
    from blt import training as module

    original, module.leak_gate = module.leak_gate, lambda *args: 0.0
    try:
        with pytest.raises(ValueError, match="lower --lr"):
            train_blt(blt, data, config(tmp_path, eval_every=1, log_every=100))
        assert not (tmp_path / "run" / "last.pt").exists()  # no checkpoint of a broken model
    finally:
        module.leak_gate = original


def test_train_blt_wants_a_patched_dataset(tmp_path):
    with pytest.raises(ValueError, match="PatchedDataset"):
        train_blt(model(), [[b"ab", b"c"]], config(tmp_path))


# --------------------------------------------------------------------------------------------------------------- rows


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
    assert (
        stream.ids(0, len(stream)).tolist() == whole.tolist() and starts.read(0, len(flags)).tolist() == flags.tolist()
    )
    rows, targets = TrainingRows(stream, row_bytes, starts, slots), []
    for number in range(len(rows)):
        batch = rows.batch([number])
        check_patch_lengths(batch.patch_lengths, row_bytes + 1)
        begin, size = int(rows.row_positions[number]), int(rows.row_lengths[number])
        targets.extend(range(begin + 1, begin + size))
        assert batch.ids[0, :size].tolist() == whole[begin : begin + size].tolist()
        made = np.zeros(row_bytes + 2, dtype=bool)
        made[np.concatenate(([0], batch.patch_lengths[0].cumsum(0).numpy()))] = True
        assert made[2:size].tolist() == flags[begin + 2 : begin + size].tolist()
        assert batch.is_scored[0].sum() == size - 1 == batch.targets
    assert targets == list(range(1, len(whole)))
    waste = rows.padding()
    assert 0 <= waste[0] < 1 and 0 <= waste[1] < 1


def test_rows_waste_little():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, n, dtype=np.uint8) for n in rng.integers(100, 4000, 200)]
    flags = np.concatenate([[True], *(rng.random(len(d) + 1) < 1 / 4.5 for d in documents)])
    starts = BitArray()
    starts.append(flags)
    starts.close()
    byte_waste, patch_waste = TrainingRows(DocumentStream.of_documents(documents), 4096, starts).padding()
    assert byte_waste < 0.05 and patch_waste < 0.05


def test_shuffle_is_a_permutation_each_epoch():
    stream = DocumentStream.of_documents([np.arange(100, dtype=np.uint8)])
    rows = TrainingRows(stream, 10)
    seen = [rows.shuffled_batch(i, 1, seed=3).ids[0, 1].item() for i in range(2 * len(rows))]
    assert sorted(seen[: len(rows)]) == sorted(seen[len(rows) :]) and seen[: len(rows)] != seen[len(rows) :]
    assert seen != [rows.shuffled_batch(i, 1, seed=4).ids[0, 1].item() for i in range(2 * len(rows))]


# ------------------------------------------------------------------------------------------------- optimizers, config


def test_every_parameter_has_one_optimizer(tmp_path):
    blt = model()
    muon, adam, row_wise = (
        [id(p) for group in o.param_groups for p in group["params"]] for o in make_optimizers(blt, config(tmp_path))
    )
    assert sorted(muon + adam + row_wise) == sorted(id(p) for p in blt.parameters())
    assert {id(blt.head.weight), id(blt.encoder.byte_embedding.weight)} <= set(adam)
    assert (
        row_wise == [id(blt.encoder.hash_embedding.tables.weight)]
        and id(blt.latent.blocks[0].attention.wq.weight) in muon
    )


def test_schedules():
    trapezoid = [learning_rate_scale(step, RunConfig(steps=100, warmup=0.1, cooldown=0.4)) for step in range(100)]
    assert (
        trapezoid[0] == 0.1
        and trapezoid[9] == trapezoid[59] == 1.0
        and trapezoid[80] == 0.5
        and 0 < trapezoid[99] <= 0.026
    )
    cosine = [learning_rate_scale(step, RunConfig(steps=100, warmup=0.0, schedule="cosine")) for step in range(100)]
    assert cosine == sorted(cosine, reverse=True) and cosine[0] == 1.0 and cosine[99] < 0.01


def test_config_errors_name_field_and_value():
    for bad, words in (
        (dict(steps=0), "steps is 0"),
        (dict(clip=-1), "clip is -1"),
        (dict(schedule="step"), "schedule is 'step'"),
        (dict(val_fraction=0.9), "val_fraction is 0.9"),
        (dict(warmup=2), "warmup is 2"),
    ):
        with pytest.raises(ValueError, match=words):
            RunConfig(**bad)
    with pytest.raises(ValueError, match="patch_method"):
        TrainingConfig(entropy_threshold=0.5)
    with pytest.raises(ValueError, match="d_model is 30"):
        EntropyConfig(d_model=30, n_heads=4)
    with pytest.raises(ValueError, match="vocab_size is 300"):
        EntropyConfig(vocab_size=300)


def test_every_field_has_help():
    import dataclasses

    from complete_entropy_workflow import WorkflowConfig
    from create_patches import CreatePatchesConfig
    from generate import GenerateConfig
    from llm import LLMConfig
    from llm_large import LLMLargeConfig

    for config_class in (EntropyConfig, CreatePatchesConfig, LLMConfig, LLMLargeConfig, WorkflowConfig, GenerateConfig):
        assert {f.name for f in dataclasses.fields(config_class)} <= set(field_comments(config_class)), config_class


def test_presets_are_valid():
    import complete_entropy_workflow
    import create_patches
    import entropy_llm
    import llm
    import llm_large
    import train_blt as train

    for module, config_class in (
        (entropy_llm, EntropyConfig), (create_patches, create_patches.CreatePatchesConfig), (llm, llm.LLMConfig),
        (llm_large, llm_large.LLMLargeConfig), (train, train.BLTRunConfig), (complete_entropy_workflow, complete_entropy_workflow.WorkflowConfig),
    ):  # fmt: skip
        assert {"cpu", "colab_t4", "rtx4090"} <= set(module.PRESETS)
        for changes in module.PRESETS.values():
            config_class(**changes)


# ------------------------------------------------------------------------------------------------------ saved models


def test_entropy_model_round_trip(tmp_path):
    torch.manual_seed(0)
    entropy_model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=8))
    path = tmp_path / "entropy_model.pth"
    save_entropy_model(entropy_model, path, {"val_bpb": 3.0})
    loaded, record = load_entropy_model(path)
    assert record["val_bpb"] == 3.0 and model_hash(loaded) == model_hash(entropy_model)
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(state[k], v) for k, v in entropy_model.state_dict().items())
    torch.save({**state, "norm.weight": state["norm.weight"] + 1}, path)
    with pytest.raises(ValueError, match="different models"):
        load_entropy_model(path)
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="does not hold"):
        load_entropy_model(path)
    with pytest.raises(FileNotFoundError, match="python entropy_llm.py"):
        load_entropy_model(tmp_path / "none.pth")


def test_a_damaged_blt_gets_an_error_that_says_what_to_do(tmp_path):
    config = BLTConfig(
        encoder_dim=16, global_dim=16, global_layers=1, decoder_dim=16, decoder_layers=1, hash_rows=16, window=8
    )
    record = {"model_config": asdict(config), "patch_config": asdict(PatchConfig("static", 4.0)), "precision": "fp32"}
    (tmp_path / "model.json").write_text(json.dumps(record))
    torch.manual_seed(0)
    model = BLTModel(config)
    save_weights(tmp_path / "best.pt", model)
    loaded, patcher, _ = load_blt(tmp_path)
    assert (
        all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
        and patcher.config.method == "static"
    )
    for damage in (b"junk", (tmp_path / "best.pt").read_bytes()[:-100]):
        (tmp_path / "best.pt").write_bytes(damage)
        with pytest.raises(ValueError, match="best.pt does not hold .* train it again"):
            load_blt(tmp_path)


def test_write_aside_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_generate_is_greedy_by_the_full_pass_and_seeded(tmp_path):
    torch.manual_seed(0)
    entropy_model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=8)).eval()
    blt, patcher = model().eval(), EntropyPatcher(entropy_model, threshold=5.0)
    new = generate(blt, patcher, b"the cat", 12)
    whole = np.frombuffer(b"the cat" + new, dtype=np.uint8)
    (batch,) = evaluation_batches([whole], [patcher.starts(whole)], len(whole) + 1)
    with torch.no_grad():
        best = blt(batch.ids[:, :-1], batch.patch_lengths)[0].argmax(-1)
    assert best[7 : 7 + len(new)].tolist() == list(new)
    assert generate(blt, patcher, "", 5, temperature=1.0, seed=1) == generate(
        blt, patcher, b"", 5, temperature=1.0, seed=1
    )
    assert len(generate(blt, patcher, b"x" * 50, 4, context_bytes=16)) <= 4


def test_bits_per_byte_of_a_model_without_patches():
    torch.manual_seed(0)
    entropy_model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=8))
    torch.nn.init.zeros_(entropy_model.head.weight)
    assert bits_per_byte(entropy_model, None, [b"hello", b"you"]) == pytest.approx(8.0)  # 256 classes, ends left out
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(entropy_model, None, [b""])


def test_a_wrong_compiled_model_stops_the_run():
    model = BLTModel(
        BLTConfig(
            encoder_dim=16, global_dim=16, decoder_dim=16, global_layers=1, decoder_layers=1, hash_rows=16, window=8
        )
    )
    document = np.arange(40, dtype=np.uint8)
    (batch,) = evaluation_batches([document], [np.arange(41) % 4 == 0], 64)
    nats, _ = target_losses(model, batch)
    check_compiled(model, batch, nats)
    with pytest.raises(ValueError, match="--compile no"):
        check_compiled(model, batch, nats + 0.1)
