"""Speed guarded by counts, which do not depend on the machine.

Counted are operations, reads of device values, graphs, bytes of memory and lines run. Most tests compare the
counts of two configurations, and hold on any version of torch. The bounds in COUNTS are numbers of operations
or bytes themselves; another version splits its operations otherwise, so there they are not compared. Each is
what was counted on the day in the comment plus 15%. If a change breaks one, find out what the extra operations
or bytes buy, and raise the number only with a timing from bench.py that shows a gain.
"""

import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch._dynamo
from helpers import ROOT
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blt import attention as layers
from blt import ngrams
from blt.incremental import IncrementalBLT
from blt.loop import fit
from blt.metric import target_losses
from blt.optimizers import GroupedMuon, backward, clip_gradients, make_optimizers, step_optimizers
from blt.patch_rules import RULES, PatchConfig, patch_starts
from blt.rows import RowBatch
from blt.segments import check_patch_lengths
from blt.training import PatchedDataset, TrainingConfig
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher

TINY = dict(
    encoder_dim=32, encoder_heads=2, global_dim=48, global_heads=2, decoder_dim=32, decoder_heads=2,
    global_layers=1, decoder_layers=1, ngram_sizes=[3, 5], hash_rows=64, window=32,
)  # fmt: skip
RATES = TrainingConfig(lr=0.01, adam_lr=0.01)

# Counts of 2026-11-21 plus 15%, of the model TINY.
COUNTED_ON = "2.13"  # version of torch
COUNTS = {
    "operations of a training step, attention in one band": 2370,
    # two local layers
    "operations that each further band of 64 queries adds to a training step": 200,
    # the latent transformer runs once in four
    "operations that read one more byte": 407,
    "bytes that the forward pass keeps for the backward pass, per byte of text": 9870,
    "bytes that live at once in a training step, per byte of text": 15000,
}
on_the_version_counted = pytest.mark.skipif(
    not torch.__version__.startswith(f"{COUNTED_ON}."),
    reason=f"the numbers in COUNTS were read on torch {COUNTED_ON}, here is {torch.__version__}",
)


def check_count(name, number):
    """At most what is in COUNTS, and more than half: a count that has halved shows that the bound needs an update."""
    assert 0.5 * COUNTS[name] < number <= COUNTS[name], f"{number} {name}"


def test_counts_are_compared_on_the_version_that_is_installed():
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"torch=={COUNTED_ON}." in constraints, "count again on the new version, and change COUNTED_ON"


def blt(**changes):
    torch.manual_seed(0)
    return BLTModel(BLTConfig(**{**TINY, **changes}))


def entropy_model(**changes):
    torch.manual_seed(0)
    return MinimalLLM(EntropyConfig(**{**dict(d_model=32, n_heads=2, n_layers=2, max_seq_len=16), **changes}))


def batch_of(batch_rows=2, row_bytes=128, patches=16, seed=0, score_ends=True):
    """Random rows with documents and patches at random places; the last `seed` patch slots stay empty."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 256, (batch_rows, row_bytes + 1)))
    for row in ids:
        row[rng.choice(row_bytes, 3)] = 256
    lengths = torch.zeros(batch_rows, patches, dtype=torch.int64)
    for row in lengths:
        starts = np.sort(rng.choice(np.arange(2, row_bytes + 1), patches - seed - 2, replace=False))
        row[: patches - seed] = torch.from_numpy(np.diff([0, 1, *starts, row_bytes + 1]))
    check_patch_lengths(lengths, row_bytes + 1)
    is_scored = torch.ones(batch_rows, row_bytes, dtype=torch.bool) if score_ends else ids[:, 1:] != 256
    return RowBatch(
        ids, is_scored, lengths if score_ends else None, int(is_scored.sum()), int((ids[:, 1:] != 256).sum())
    )


class Trainee:
    """A model in training: `backward` and `update` are one step of `training.fit`."""

    def __init__(self, model):
        self.model = model
        self.optimizers, self.scaler = make_optimizers(model, RATES), torch.amp.GradScaler("cpu", enabled=False)

    def backward(self, batch, forward=None):
        nats, _ = target_losses(self.model if forward is None else forward, batch)
        backward(self.model, nats.sum() / batch.targets, self.scaler)

    def update(self):
        norm = clip_gradients(self.model, self.optimizers, self.scaler, RATES.clip)
        step_optimizers(self.optimizers, self.scaler, norm)

    def step(self, batch):
        self.backward(batch)
        self.update()


# 1. Operations


class CountOps(TorchDispatchMode):
    """Counts the operations that reach a device: on a GPU about as many kernel launches."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self):
        return self.ops.total()


def step_ops(trainee, **shape):
    """Operations of a training step that is not the first (the optimizers' states are there)."""
    batch = batch_of(**shape)
    if not trainee.optimizers[0].state:
        trainee.step(batch)
    with CountOps() as count:
        trainee.step(batch)
    return count.total


@pytest.mark.parametrize("attention", ["bands", "blocks"])
@pytest.mark.parametrize(
    "settings", [{}, dict(dropout=0.1), dict(pooling="mean", qk_norm=True, cross_attn_k=4)], ids=str
)
def test_ops_of_a_step_depend_on_no_size(settings, attention, monkeypatch):
    """In bands, here one band a row, and as GPUs without FlexAttention compute attention."""
    if attention == "blocks":
        monkeypatch.setattr(layers.AttentionPlan, "implementation", by_blocks)
    monkeypatch.setattr(layers, "BAND_SCORES", 1 << 40)
    trainee = Trainee(blt(**settings))
    ops = step_ops(trainee, row_bytes=512, patches=16)
    assert step_ops(trainee, row_bytes=512, patches=16, batch_rows=6) == ops
    assert step_ops(trainee, row_bytes=512, patches=100) == ops
    assert step_ops(trainee, row_bytes=2048, patches=16) == ops


def test_ops_of_a_step_grow_by_the_bands_only(monkeypatch):
    # Bands of 64 queries, whatever the batch.
    monkeypatch.setattr(layers, "BAND_SCORES", 0)
    trainee = Trainee(blt())
    short, middle, long = (step_ops(trainee, row_bytes=n, patches=16) for n in (512, 1024, 2048))
    assert step_ops(trainee, row_bytes=2048, patches=100, batch_rows=6) == long
    assert long - middle == 2 * (middle - short)


@on_the_version_counted
def test_number_of_ops_of_a_step(monkeypatch):
    monkeypatch.setattr(layers, "BAND_SCORES", 1 << 40)
    one_band = step_ops(Trainee(blt()), row_bytes=512, patches=16)
    check_count("operations of a training step, attention in one band", one_band)
    monkeypatch.setattr(layers, "BAND_SCORES", 0)
    trainee = Trainee(blt())
    short = step_ops(trainee, row_bytes=512, patches=16)
    long = step_ops(trainee, row_bytes=1024, patches=16)
    check_count("operations that each further band of 64 queries adds to a training step", (long - short) / 8)


def test_ops_of_a_larger_hash_table_are_the_same(monkeypatch):
    monkeypatch.setattr(ngrams, "DENSE_HASH_ROWS", 8)
    small, large = (step_ops(Trainee(blt(hash_rows=rows)), row_bytes=256) for rows in (64, 5000))
    assert small == large


# 2. The update


def test_muon_ops_do_not_grow_with_the_number_of_matrices():
    counts = []
    for layers_of_a_shape in (2, 8):
        torch.manual_seed(0)
        matrices = [
            torch.nn.Parameter(torch.randn(shape))
            for shape in ((8, 24), (24, 8), (8, 8))
            for _ in range(layers_of_a_shape)
        ]
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer = GroupedMuon(matrices, lr=0.02, weight_decay=0.1)
        optimizer.step()
        with CountOps() as count:
            optimizer.step()
        # shapes, Newton-Schulz steps, and products of each step but the Gram matrix
        assert count.ops["baddbmm"] == 3 * 5 * 2
        counts.append(count.ops)
    assert counts[0] == counts[1]


def test_ops_of_an_update_do_not_grow_with_depth():
    counts = []
    for depth in (2, 8):
        trainee = Trainee(blt(global_layers=depth))
        trainee.step(batch_of())
        trainee.backward(batch_of())
        with CountOps() as count:
            trainee.update()
        counts.append(count.ops)
    assert counts[0] == counts[1]


# 3. Nothing is read back

READS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_static", "equal", "masked_select", "_unique",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class CountProducts(CountOps):
    """Counts the numbers that matrix products multiply, too."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            self.numbers += args[-2].numel() * args[-1].shape[-1]
        return super().__torch_dispatch__(func, types, args, kwargs)


def counts_of_bytes(rows, positions):
    """`CountProducts` of each four bytes from these positions on, read byte by byte in static patches of 4."""
    reader = IncrementalBLT(blt(), EntropyPatcher(None, PatchConfig("static", 4.0)), rows)
    reader.extend(np.full((rows, 1), 256))
    counts = []
    for position in range(positions[-1] + 4):
        if position in positions:
            counts.append(CountProducts())
        is_counted = any(first <= position < first + 4 for first in positions)
        with counts[-1] if is_counted else nullcontext():
            reader.extend(np.full((rows, 1), 97))
    return counts


@pytest.mark.parametrize("rows", [1, 5])
def test_a_byte_costs_the_same_at_every_position(rows):
    early, late = counts_of_bytes(rows, [40, 800])
    assert early.ops == late.ops
    # But that the latent transformer, once a patch, attends to all patches: two products with each.
    config = blt().config
    more_patches = (800 - 40) // 4
    attended = 2 * rows * more_patches * config.global_dim * config.global_layers
    assert late.numbers - early.numbers == attended < early.numbers / 10


@on_the_version_counted
def test_number_of_ops_of_a_byte():
    (count,) = counts_of_bytes(1, [40])
    check_count("operations that read one more byte", count.total / 4)


class CountReads(TorchDispatchMode):
    """Counts the operations for whose result the CPU must wait.

    They make values Python numbers, or their results have sizes that depend on values.
    """

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in READS or is_masked:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def test_count_reads_sees_reads():
    x = torch.arange(4.0)
    with CountReads() as count:
        (
            x.sum().item(),
            bool(x.any()),
            x[x > 1],
            x.nonzero(),
            torch.equal(x, x),
            x.unique(),
            x.masked_select(x > 1),
            float(x[0]),
        )
    assert count.reads.total() == 8, count.reads


@pytest.mark.parametrize(
    "settings",
    [{}, dict(dropout=0.1), dict(hash_rows=5000), dict(pooling="mean", qk_norm=True, encoder_layers=2)],
    ids=str,
)
def test_a_step_reads_nothing_back(settings, monkeypatch):
    """In fp32 and bf16; the loss scaler of fp16 has to know whether a gradient overflowed.

    With a large table the number of its rows that were read is read back, once a pass.
    """
    monkeypatch.setattr(ngrams, "DENSE_HASH_ROWS", 100)
    trainee, batches = Trainee(blt(**settings)), [batch_of(seed=seed) for seed in range(2)]
    with CountReads() as count:
        for batch in batches:
            trainee.step(batch)
    assert count.reads == ({"unique_consecutive": 2} if "hash_rows" in settings else {})


def test_a_step_of_the_entropy_model_reads_nothing_back():
    trainee, batch = Trainee(entropy_model()), batch_of(score_ends=False)
    with CountReads() as count:
        trainee.step(batch)
    assert not count.reads


def test_the_loop_reads_only_where_it_logs_and_evaluates(tmp_path):
    documents = [np.random.default_rng(i).integers(97, 110, 100, dtype=np.uint8) for i in range(8)]
    data = PatchedDataset.from_documents(
        documents, documents[:1], EntropyPatcher(None, threshold=4, method="static"), 64, 2
    )
    counts = []
    for steps in (2, 5):
        config = TrainingConfig(
            row_bytes=64,
            batch_rows=2,
            steps=steps,
            accumulate=2,
            eval_every=100,
            log_every=100,
            precision="fp32",
            compile="no",
            device="cpu",
        )
        with CountReads() as count:
            fit(blt(), config, data.train_rows, data.validation_batches, tmp_path / str(steps))
        counts.append(count.reads)
    assert counts[0] == counts[1] and counts[0].total() > 0


# 4. One graph


def loss_and_gradients(trainee, forward, batch):
    trainee.model.zero_grad()
    nats, _ = target_losses(forward, batch)
    nats.mean().backward()
    return nats.detach(), {name: p.grad for name, p in trainee.model.named_parameters()}


def check_compiled(model, batches, fullgraph):
    """Compiled equals eager for every batch, and only the first one compiles. Returns dynamo's counters."""
    trainee = Trainee(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    loss_and_gradients(trainee, compiled, batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in batches:
            nats, gradients = loss_and_gradients(trainee, compiled, batch)
            eager_nats, eager_gradients = loss_and_gradients(trainee, model, batch)
            torch.testing.assert_close(nats, eager_nats, atol=1e-5, rtol=0)
            for name, gradient in gradients.items():
                assert gradient.layout == eager_gradients[name].layout, name
                torch.testing.assert_close(
                    gradient.to_dense(), eager_gradients[name].to_dense(), atol=1e-5, rtol=0, msg=name
                )
    return torch._dynamo.utils.counters


def by_blocks(plan):
    """In place of `AttentionPlan.implementation`: what GPUs without FlexAttention run, on a CPU."""
    return "blocks"


@pytest.mark.parametrize("attention", ["bands", "blocks"])
def test_blt_is_one_graph_and_compiles_once(attention, monkeypatch):
    if attention == "blocks":
        monkeypatch.setattr(layers.AttentionPlan, "implementation", by_blocks)
    counters = check_compiled(blt(ngram_sizes=[3]), [batch_of(seed=seed) for seed in range(3)], fullgraph=True)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize(
    "options",
    [dict(relu2=True, logit_softcap=5.0), dict(ngram_dropout=0.2), dict(patch_ngrams=[0, 1], gate_ngrams=[2])],
    ids=str,
)
def test_options_are_one_graph(options):
    model = blt(ngram_sizes=[3], **options).train()
    batch = batch_of()
    # fullgraph: a graph break is an error.
    logits_BTV = torch.compile(model, backend="aot_eager", fullgraph=True)(batch.ids[:, :-1], batch.patch_lengths)
    logits_BTV.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_entropy_model_is_one_graph_and_compiles_once():
    counters = check_compiled(
        entropy_model(), [batch_of(seed=seed, score_ends=False) for seed in range(3)], fullgraph=True
    )
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_sparse_tables_break_the_graph_at_the_lookup_only(monkeypatch):
    monkeypatch.setattr(ngrams, "DENSE_HASH_ROWS", 8)
    model = blt(ngram_sizes=[3])
    counters = check_compiled(model, [batch_of(seed=seed) for seed in range(3)], fullgraph=False)
    (reason,) = counters["graph_break"]
    assert "embed_ngrams" in reason
    # One before the lookup, and one after it.
    assert counters["stats"]["unique_graphs"] == 2
    trainee = Trainee(model)
    forward = torch.compile(model, backend="aot_eager")
    before = model.encoder.hash_embedding.tables.weight.detach().clone()
    trainee.backward(batch_of(), forward)
    assert model.encoder.hash_embedding.tables.weight.grad.is_sparse
    trainee.update()
    assert not torch.equal(model.encoder.hash_embedding.tables.weight, before)


# 5. Memory


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors, made since its start, that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if has_storage(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            is_sparse = isinstance(x, torch.Tensor) and x.is_sparse
            for part in (x._indices(), x._values()) if is_sparse else (x,):
                if has_storage(part) and part.untyped_storage()._cdata not in known:
                    storage = part.untyped_storage()
                    self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def has_storage(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def peak_bytes(trainee, **shape):
    batch = batch_of(**shape)
    # The first step makes the optimizers' states.
    trainee.step(batch)
    with PeakBytes() as peak:
        trainee.step(batch)
    return peak.peak


def kept_bytes(model, **shape):
    """Bytes that a forward pass keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        # It is held, so that no other takes its address.
        kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nats, _ = target_losses(model, batch_of(**shape))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


@pytest.mark.parametrize("attention", ["bands", "blocks"])
def test_memory_is_linear_in_the_row(attention, monkeypatch):
    """The same 16 patches in rows of any length: between patches attention is dense."""
    monkeypatch.setattr(layers, "BAND_SCORES", 0)
    if attention == "blocks":
        monkeypatch.setattr(layers.AttentionPlan, "implementation", by_blocks)
    trainee = Trainee(blt())
    kept = [kept_bytes(trainee.model, row_bytes=n) for n in (1024, 2048, 4096)]
    peak = [peak_bytes(trainee, row_bytes=n) for n in (1024, 2048, 4096)]
    for small, middle, large in (kept, peak):
        assert large <= 1.1 * 4 * small
        # Parameters and gradients cancel, a square would not.
        assert large - middle <= 1.1 * 2 * (middle - small)


@on_the_version_counted
def test_bytes_of_memory_per_byte_of_text(monkeypatch):
    monkeypatch.setattr(layers, "BAND_SCORES", 0)
    trainee = Trainee(blt())
    # batch_of makes two rows.
    more_text = 2 * (2048 - 1024)
    kept = kept_bytes(trainee.model, row_bytes=2048) - kept_bytes(trainee.model, row_bytes=1024)
    check_count("bytes that the forward pass keeps for the backward pass, per byte of text", kept / more_text)
    peak = peak_bytes(trainee, row_bytes=2048) - peak_bytes(trainee, row_bytes=1024)
    check_count("bytes that live at once in a training step, per byte of text", peak / more_text)


def test_memory_of_a_step_does_not_depend_on_large_tables(monkeypatch):
    monkeypatch.setattr(ngrams, "DENSE_HASH_ROWS", 100)
    models = [blt(hash_rows=rows, ngram_sizes=[3]) for rows in (20_000, 200_000)]
    kept = [kept_bytes(model, row_bytes=256) for model in models]
    assert kept[0] == kept[1]
    small, large = (peak_bytes(Trainee(model), row_bytes=256) for model in models)
    # In the larger tables fewer n-grams share a row.
    assert large <= 1.02 * small


# 6. Patching


def lines_run(function, *args, **options):
    """Lines of Python executed by a call, those of numpy's own Python code included."""
    count = 0
    before = sys.gettrace()

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    sys.settrace(trace)
    try:
        function(*args, **options)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("options", [{}, dict(max_patch_size=8)], ids=str)
@pytest.mark.parametrize("method", [rule.name for rule in RULES.values() if not rule.depends_on_patch])
def test_patching_has_no_loop_over_positions(method, options):
    counts = []
    # The first call may import.
    for positions in (1000, 1000, 100_000):
        rng = np.random.default_rng(0)
        entropies = rng.random(positions, dtype=np.float32).astype(np.float16)
        inputs = dict(
            byte_values=rng.integers(0, 256, positions, dtype=np.uint8), token_starts=rng.random(positions) < 0.2
        )
        threshold = 4 if RULES[method].unit == "bytes" else 0.6
        counts.append(lines_run(patch_starts, entropies, method, threshold, **inputs, **options))
    assert 5 < counts[1] == counts[2] < 200
