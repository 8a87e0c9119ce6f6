"""zero_init: output projections and hash tables that start at zero, and gates that still see what layers do."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import BLT_FLAGS, ENTROPY_FLAGS, error_of, random_bytes, run_here, some_words, tiny_blt, tiny_entropy_model

import blt_model
import entropy_llm
import template_llm
from blt import ngrams, training
from blt.attention import AttentionPlan
from blt.device import autocast
from blt.layers import without_zeros, zero_outputs
from blt.loop import RunConfig, compile_losses
from blt.metric import leak_gate, target_losses
from blt.ngrams import HashEmbedding
from blt.optimizers import GroupedMuon, backward, clip_gradients, make_optimizers, step_optimizers
from blt.patch_rules import PatchConfig
from blt.rows import evaluation_batches
from blt.segments import PatchMap
from blt.training import PatchedDataset, TrainingConfig, train_blt
from entropy_patcher import EntropyPatcher
from template_llm import FlatByteTransformer, FlatConfig

# Of a BLT these are all matrices whose product is added to a residual stream, and the tables.
BLT_ZEROS = {
    "encoder.hash_embedding.tables.weight",
    *(f"{part}.blocks.0.{name}.weight" for part in ("encoder", "latent", "decoder")
      for name in ("attention.wo", "feed_forward.w2")),
    *(f"{part}.cross_attentions.0.wo.weight" for part in ("encoder", "decoder")),
}  # fmt: skip


def zeroed_blt(**changes):
    blt = tiny_blt(**changes)
    zero_outputs(blt)
    return blt


def zeroed_flat(**changes):
    torch.manual_seed(0)
    sizes = dict(dim=32, n_layers=2, n_heads=2, ngram_sizes=[2, 4], hash_rows=64, window=8)
    flat = FlatByteTransformer(FlatConfig(**sizes | changes))
    zero_outputs(flat)
    return flat


def zeros_of(model):
    """Names of the parameters that are zeros."""
    return {name for name, p in model.named_parameters() if not p.any()}


def patcher():
    return EntropyPatcher(None, PatchConfig("static", 4.0))


def words_batch(row_bytes=128):
    document = np.frombuffer(some_words(25), np.uint8)[: row_bytes - 1]
    (batch,) = evaluation_batches([document], [patcher().starts(document)], row_bytes)
    return batch


# What starts at zero


def test_outputs_and_tables_are_zeros_and_nothing_else_changes():
    blt = zeroed_blt()
    assert zeros_of(blt) == BLT_ZEROS
    usual = tiny_blt().state_dict()
    for name, value in blt.state_dict().items():
        assert name in BLT_ZEROS or torch.equal(value, usual[name]), name
    flat = zeros_of(zeroed_flat())
    layers = {f"blocks.{n}.{name}.weight" for n in (0, 1) for name in ("attention.wo", "feed_forward.w2")}
    assert flat == layers | {"hash_embedding.tables.weight"}
    entropy_model = tiny_entropy_model()
    zero_outputs(entropy_model)
    assert zeros_of(entropy_model) == {"blocks.0.attention.wo.weight", "blocks.0.feed_forward.w2.weight"}


@torch.no_grad()
def test_layers_begin_as_the_identity():
    """Then the logits of a byte depend on that byte alone: on none before it, and on no n-gram."""
    flat = zeroed_flat().eval()
    ids = torch.from_numpy(random_bytes(40)).long()[None]
    assert torch.equal(flat(ids)[0], flat(ids.flip(1))[0].flip(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [zeroed_blt, zeroed_flat])
def test_training_moves_everything(make, precision):
    """In the first update the zeros move and what is behind them has a gradient of exactly zero; soon all move."""
    model = make().train()
    batch = words_batch()
    if isinstance(model, FlatByteTransformer):
        batch.patch_lengths = None
    config = RunConfig(lr=0.01, adam_lr=0.01, weight_decay=0.0)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(4):
        with autocast(torch.device("cpu"), precision):
            nats_BT, _ = target_losses(model, batch)
        backward(model, nats_BT.sum() / batch.targets, scaler)
        norm = clip_gradients(model, optimizers, scaler, 1.0)
        step_optimizers(optimizers, scaler, norm)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        if step == 0:
            # Muon makes any gradient a full step, rounding noise too: behind zeros it must be zero itself.
            hidden = {name for name in before if name.endswith(("wq.weight", "wk.weight", "wv.weight", "w1.weight"))}
            assert hidden and not hidden & moved
            assert any(name.endswith("w2.weight") for name in moved)
            assert any("tables" in name for name in moved)
    assert moved == set(before)
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_makes_no_step_of_a_zero_gradient(shape):
    torch.manual_seed(0)
    moving, resting = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
    before = resting.detach().clone()
    optimizer = GroupedMuon([moving, resting], lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        moving.grad, resting.grad = torch.randn(shape), torch.zeros(shape)
        optimizer.step()
        # Weight decay is all that it feels.
        before *= 1 - 0.1 * 0.5
        torch.testing.assert_close(resting.detach(), before)
    assert moving.isfinite().all()


# The scripts


@pytest.mark.parametrize(
    "module, script, flags",
    [
        (entropy_llm, "entropy_llm", ENTROPY_FLAGS),
        (training, "llm", BLT_FLAGS),
        (template_llm, "template_llm", ["--dim", 32, "--n_layers", 1, "--ngram_sizes", 3, "--max_bytes", 60000]),
        (template_llm, "template_llm", ["--model", "bpe", "--dim", 32, "--n_layers", 1, "--max_bytes", 60000]),
    ],
    ids=["entropy_llm", "llm", "flat", "bpe"],
)
def test_training_starts_from_zeros(module, script, flags, pipeline_copy, monkeypatch):
    """After the leak gate, which has filled them."""
    seen = {}

    class Seen(Exception):
        pass

    def look(model, *arguments, **options):
        seen["zeros"] = zeros_of(model)
        raise Seen

    monkeypatch.setattr(module, "fit", look)
    for more, wanted in (([], True), (["--no_zero_init"], False)):
        with pytest.raises(Seen):
            run_here(pipeline_copy, script, *flags, "--device", "cpu", "--output", "new.x", *more)
        ends = {name.rsplit(".", 2)[1] for name in seen["zeros"]}
        has_tables = script == "llm" or "--ngram_sizes" in flags
        assert ends == ({"wo", "w2"} | ({"tables"} if has_tables else set()) if wanted else set())


def test_trained_weights_are_not_erased(pipeline_copy):
    flags = [*BLT_FLAGS, "--init_from", "checkpoints", "--output", "tuned"]
    for flag in ("--encoder_dim", "--global_dim", "--global_layers", "--decoder_dim", "--decoder_layers"):
        flags[flags.index(flag) : flags.index(flag) + 2] = []
    for flag in ("--hash_rows", "--window"):
        flags[flags.index(flag) : flags.index(flag) + 2] = []
    assert "would erase weights" in error_of(pipeline_copy, "llm", *flags, "--zero_init")


# The gates


def unmasked(self, q, k, v, past=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


original_map = PatchMap.__init__


def read_the_next_patch(self, patch_lengths_BP, documents_BT):
    original_map(self, patch_lengths_BP, documents_BT)
    self.read = (self.read + 1).clamp(max=len(documents_BT) * self.P - 1)


original_hash = HashEmbedding.forward


def hash_the_next_id(self, ids_BT, documents_BT, spans_BTS=None):
    return original_hash(self, ids_BT.roll(-1, 1), documents_BT, spans_BTS)


def hash_spans_to_the_next_id(ids_BT, starts_BTS):
    return ngrams.hash_spans(ids_BT.roll(-1, 1), starts_BTS)


LEAKS = {
    "attention": (AttentionPlan, "attend", unmasked),
    "patch": (PatchMap, "__init__", read_the_next_patch),
    "tables": (HashEmbedding, "forward", hash_the_next_id),
    "gates": (HashEmbedding, "forward", hash_the_next_id),
    "patch n-grams": (blt_model, "hash_spans", hash_spans_to_the_next_id),
    "words": (template_llm, "hash_spans", hash_spans_to_the_next_id),
}


@pytest.mark.parametrize("rows", [64, 200], ids=["dense", "sparse"])
@pytest.mark.parametrize("leak, kind", [("attention", "blt"), ("patch", "blt"), ("tables", "blt"), ("gates", "blt"),
                                        ("patch n-grams", "blt"), ("words", "flat"), ("gates", "flat"),
                                        ("attention", "flat"), ("tables", "flat")])  # fmt: skip
def test_the_leak_gate_sees_behind_zeros(leak, kind, rows, monkeypatch):
    monkeypatch.setattr(ngrams, "DENSE_HASH_ROWS", 100)
    tables = dict(hash_rows=rows, patch_ngrams=[0, 1] if leak in ("patch n-grams", "words") else [])
    if leak == "gates":
        tables |= dict(ngram_sizes=[], gate_ngrams=[2, 3])
    model = zeroed_blt(**tables) if kind == "blt" else zeroed_flat(**tables)
    arguments = (patcher() if kind == "blt" else None, random_bytes(70))
    zeros = zeros_of(model)
    random_state = torch.get_rng_state()
    assert leak_gate(model, *arguments) < 1e-4
    assert torch.equal(torch.get_rng_state(), random_state)
    monkeypatch.setattr(*LEAKS[leak])
    # With zeros in these matrices nobody could tell.
    with monkeypatch.context() as blind:
        blind.setattr("blt.metric.without_zeros", lambda model: torch.no_grad())
        assert leak_gate(model, *arguments) < 1e-4
    with pytest.raises(ValueError, match="leak"):
        leak_gate(model, *arguments)
    assert zeros_of(model) == zeros and len(zeros) >= 5


def test_a_leaking_model_is_not_trained(tmp_path, monkeypatch):
    data = PatchedDataset.from_documents(
        [some_words(80)], [some_words(40, 1)], EntropyPatcher(None, method="space"), 64
    )
    monkeypatch.setattr(*LEAKS["patch"])
    with pytest.raises(ValueError, match="leak"):
        train_blt(zeroed_blt(), data, TrainingConfig(row_bytes=64, output=str(tmp_path / "run"), zero_init=True))
    assert not (tmp_path / "run").exists()


def test_a_wrong_compiled_model_is_seen_behind_zeros(monkeypatch):
    """A compiled model that attends to the future has the losses of a right one as long as wo is zero."""
    blt = zeroed_blt()
    data = PatchedDataset.from_documents([some_words(80)], [some_words(9)], EntropyPatcher(None, method="space"), 64)

    def wrong_forward(model, *inputs):
        with monkeypatch.context() as mistake:
            mistake.setattr(*LEAKS["patch"])
            return model(*inputs)

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: partial(wrong_forward, model))
    settings = RunConfig(compile="yes", batch_rows=4)
    with pytest.raises(ValueError, match="--compile no"):
        compile_losses(blt, settings, data.train_rows, torch.device("cpu"), "fp32")
    assert zeros_of(blt) == BLT_ZEROS


def test_the_matrices_are_zeros_again_after_an_error():
    blt = zeroed_blt()
    with pytest.raises(KeyError), without_zeros(blt):
        assert not zeros_of(blt)
        raise KeyError
    assert zeros_of(blt) == BLT_ZEROS
