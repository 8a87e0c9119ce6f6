"""Speed guarded by counts that do not depend on the machine.

What is counted: operations, reads of device values, graphs, bytes, and lines of Python that run.

A bound with a number in it is the count of the day it was written plus 15%. If a change breaks one,
find out what the extra operations or bytes buy. Raise the number only with a timing from bench.py
that shows a gain.
"""

import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch._dynamo
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blt_model
from blt import attention
from blt.incremental import IncrementalBLT
from blt.loop import fit
from blt.metric import target_losses
from blt.optimizers import GroupedMuon, backward, clip_gradients, make_optimizers, step_optimizers
from blt.patch_rules import PatchConfig, patch_starts
from blt.rows import RowBatch
from blt.segments import check_patch_lengths
from blt.training import PatchedDataset, TrainingConfig
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher

TINY = dict(
    encoder_dim=32,
    encoder_heads=2,
    global_dim=48,
    global_heads=2,
    decoder_dim=32,
    decoder_heads=2,
    global_layers=1,
    decoder_layers=1,
    ngram_sizes=[3, 5],
    hash_rows=64,
    window=32,
)
RATES = TrainingConfig(lr=0.01, adam_lr=0.01)

# Counts of 2026-11-21 (torch 2.13) plus 15%.
# Operations of a training step of TINY with attention in one band.
STEP_OPS = 2370
# Operations that read one more byte of TINY, the latent transformer once in four.
GENERATION_OPS = 407
# Operations that each further band of 64 queries adds to a training step of TINY: two local layers.
BAND_OPS = 200
# Bytes that the forward pass of TINY keeps for the backward pass, per byte of text.
KEPT_PER_BYTE = 9870
# The most bytes that live at once in a training step of TINY, per byte of text.
PEAK_PER_BYTE = 15000


def blt(**changes):
    torch.manual_seed(0)
    return BLTModel(BLTConfig(**{**TINY, **changes}))


def entropy_model(**changes):
    torch.manual_seed(0)
    sizes = dict(d_model=32, n_heads=2, n_layers=2, max_seq_len=16)
    return MinimalLLM(EntropyConfig(**{**sizes, **changes}))


def batch_of(batch_rows=2, row_bytes=128, patches=16, seed=0, score_ends=True):
    """Rows with random documents and patches; the last `seed` patch slots stay empty."""
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(0, 256, (batch_rows, row_bytes + 1)))
    for row in ids:
        row[rng.choice(row_bytes, 3)] = 256
    lengths = torch.zeros(batch_rows, patches, dtype=torch.int64)
    for row in lengths:
        positions = np.arange(2, row_bytes + 1)
        starts = np.sort(rng.choice(positions, patches - seed - 2, replace=False))
        row[: patches - seed] = torch.from_numpy(np.diff([0, 1, *starts, row_bytes + 1]))
    check_patch_lengths(lengths, row_bytes + 1)
    is_byte = ids[:, 1:] != 256
    n_bytes = int(is_byte.sum())
    if score_ends:
        is_scored = torch.ones(batch_rows, row_bytes, dtype=torch.bool)
        return RowBatch(ids, is_scored, lengths, int(is_scored.sum()), n_bytes)
    return RowBatch(ids, is_byte, None, n_bytes, n_bytes)


class Trainee:
    """A model in training: `backward` and `update` are one step of `blt.loop.fit`."""

    def __init__(self, model):
        self.model = model
        self.optimizers = make_optimizers(model, RATES)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def backward(self, batch, forward=None):
        nats, _ = target_losses(self.model if forward is None else forward, batch)
        backward(self.model, nats.sum() / batch.targets, self.scaler)

    def update(self):
        clip_gradients(self.model, self.optimizers, self.scaler, RATES.clip)
        step_optimizers(self.optimizers, self.scaler)

    def step(self, batch):
        self.backward(batch)
        self.update()


# ---- Operations


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


@pytest.mark.parametrize(
    "settings",
    [{}, dict(dropout=0.1), dict(pooling="mean", qk_norm=True, cross_attn_k=4)],
    ids=str,
)
def test_ops_of_a_step_depend_on_no_size(settings, monkeypatch):
    """With dropout a CPU computes attention by blocks, else in bands: here one band a row.

    GPUs without FlexAttention compute it by blocks as well.
    """
    monkeypatch.setattr(attention, "BAND_SCORES", 1 << 40)
    trainee = Trainee(blt(**settings))
    ops = step_ops(trainee, row_bytes=512, patches=16)
    assert step_ops(trainee, row_bytes=512, patches=16, batch_rows=6) == ops
    assert step_ops(trainee, row_bytes=512, patches=100) == ops
    assert step_ops(trainee, row_bytes=2048, patches=16) == ops
    if not settings:
        assert 0.5 * STEP_OPS < ops <= STEP_OPS, f"{ops} operations"


def test_ops_of_a_step_grow_by_the_bands_only(monkeypatch):
    # Bands of 64 queries, whatever the batch.
    monkeypatch.setattr(attention, "BAND_SCORES", 0)
    trainee = Trainee(blt())
    short = step_ops(trainee, row_bytes=512, patches=16)
    middle = step_ops(trainee, row_bytes=1024, patches=16)
    long = step_ops(trainee, row_bytes=2048, patches=16)
    assert step_ops(trainee, row_bytes=2048, patches=100, batch_rows=6) == long
    assert long - middle == 2 * (middle - short)
    per_band = (long - middle) / 16
    assert per_band <= BAND_OPS, f"{per_band} operations a band"


def test_ops_of_a_larger_hash_table_are_the_same(monkeypatch):
    monkeypatch.setattr(blt_model, "DENSE_HASH_ROWS", 8)
    small = step_ops(Trainee(blt(hash_rows=64)), row_bytes=256)
    large = step_ops(Trainee(blt(hash_rows=5000)), row_bytes=256)
    assert small == large


# ---- The update


def test_muon_ops_do_not_grow_with_the_number_of_matrices():
    counts = []
    for matrices_of_a_shape in (2, 8):
        torch.manual_seed(0)
        matrices = []
        for shape in ((8, 24), (24, 8), (8, 8)):
            for _ in range(matrices_of_a_shape):
                matrices.append(torch.nn.Parameter(torch.randn(shape)))
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer = GroupedMuon(matrices, lr=0.02, weight_decay=0.1)
        optimizer.step()
        with CountOps() as count:
            optimizer.step()
        # 3 shapes, 5 Newton-Schulz steps, 2 products in each besides the Gram matrix.
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


# ---- Nothing is read back

# Operations whose result the CPU must wait for.
READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "nonzero_static",
    "equal",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}


class CountProducts(CountOps):
    """Counts operations, and the multiplications of matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
            self.multiplications += args[-2].numel() * args[-1].shape[-1]
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("rows", [1, 5])
def test_the_cost_of_a_byte_does_not_grow_with_its_position(rows):
    """Static patches of 4: bytes 40 to 43 cost what bytes 800 to 803 cost."""
    reader = IncrementalBLT(blt(), EntropyPatcher(None, PatchConfig("static", 4.0)), rows)
    reader.extend(np.full((rows, 1), 256))
    early = CountProducts()
    late = CountProducts()
    for position in range(804):
        counter = nullcontext()
        if 40 <= position < 44:
            counter = early
        elif position >= 800:
            counter = late
        with counter:
            reader.extend(np.full((rows, 1), 97))
    assert early.ops == late.ops
    assert early.multiplications == late.multiplications
    assert early.total <= 4 * GENERATION_OPS, f"{early.total} operations"


class CountReads(TorchDispatchMode):
    """Counts the operations for whose result the CPU must wait.

    They make Python numbers of values, or their result has a size that depends on values.
    """

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = False
        if name in ("index", "index_put", "index_put_"):
            masks = (torch.bool, torch.uint8)
            is_masked = any(index is not None and index.dtype in masks for index in args[1])
        if name in READS or is_masked:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def test_count_reads_sees_reads():
    x = torch.arange(4.0)
    reads = [
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.equal(x, x),
        lambda: x.unique(),
        lambda: x.masked_select(x > 1),
        lambda: float(x[0]),
    ]
    for number, read in enumerate(reads):
        with CountReads() as count:
            read()
        assert count.reads.total() == 1, (number, count.reads)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(dropout=0.1),
        dict(hash_rows=5000),
        dict(pooling="mean", qk_norm=True, encoder_layers=2),
    ],
    ids=str,
)
def test_a_step_reads_nothing_back(settings, monkeypatch):
    """In fp32 and bf16; the loss scaler of fp16 has to know whether a gradient overflowed."""
    monkeypatch.setattr(blt_model, "DENSE_HASH_ROWS", 100)
    trainee = Trainee(blt(**settings))
    batches = [batch_of(seed=seed) for seed in range(2)]
    with CountReads() as count:
        for batch in batches:
            trainee.step(batch)
    assert not count.reads


def test_a_step_of_the_entropy_model_reads_nothing_back():
    trainee = Trainee(entropy_model())
    batch = batch_of(score_ends=False)
    with CountReads() as count:
        trainee.step(batch)
    assert not count.reads


def test_the_loop_reads_only_where_it_logs_and_evaluates(tmp_path):
    documents = [np.random.default_rng(i).integers(97, 110, 100, dtype=np.uint8) for i in range(8)]
    patcher = EntropyPatcher(None, threshold=4, method="static")
    data = PatchedDataset.from_documents(documents, documents[:1], patcher, 64, 2)
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
    assert counts[0] == counts[1]
    assert counts[0].total() > 0


# ---- One graph


def loss_and_gradients(trainee, forward, batch):
    """(nats of each target, {parameter name: gradient}) of one forward and backward pass."""
    trainee.model.zero_grad()
    nats, _ = target_losses(forward, batch)
    nats.mean().backward()
    gradients = {name: p.grad for name, p in trainee.model.named_parameters()}
    return nats.detach(), gradients


def check_compiled(model, batches, fullgraph):
    """Compiled equals eager for every batch, and only the first compiles. Returns dynamo's counters."""
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
                eager = eager_gradients[name]
                assert gradient.layout == eager.layout, name
                dense = gradient.to_dense()
                torch.testing.assert_close(dense, eager.to_dense(), atol=1e-5, rtol=0, msg=name)
    return torch._dynamo.utils.counters


def by_blocks(self, q, k, v):
    """What GPUs without FlexAttention run, on a CPU."""
    return self._by_blocks(q, k, v, dropout=0.0)


@pytest.mark.parametrize("way", ["bands", "blocks"])
def test_blt_is_one_graph_and_compiles_once(way, monkeypatch):
    if way == "blocks":
        monkeypatch.setattr(attention.AttentionPlan, "_by_bands", by_blocks)
    batches = [batch_of(seed=seed) for seed in range(3)]
    counters = check_compiled(blt(ngram_sizes=[3]), batches, fullgraph=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_entropy_model_is_one_graph_and_compiles_once():
    batches = [batch_of(seed=seed, score_ends=False) for seed in range(3)]
    counters = check_compiled(entropy_model(), batches, fullgraph=True)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_sparse_tables_break_the_graph_at_the_lookup_only(monkeypatch):
    monkeypatch.setattr(blt_model, "DENSE_HASH_ROWS", 8)
    model = blt(ngram_sizes=[3])
    batches = [batch_of(seed=seed) for seed in range(3)]
    counters = check_compiled(model, batches, fullgraph=False)
    (reason,) = counters["graph_break"]
    assert "embed_ngrams" in reason
    # One graph before the lookup and one after it.
    assert counters["stats"]["unique_graphs"] == 2

    trainee = Trainee(model)
    compiled = torch.compile(model, backend="aot_eager")
    tables = model.encoder.hash_embedding.tables
    before = tables.weight.detach().clone()
    trainee.backward(batch_of(), compiled)
    assert tables.weight.grad.is_sparse
    trainee.update()
    assert not torch.equal(tables.weight, before)


# ---- Memory


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors, made since its start, that are alive at once."""

    def __init__(self):
        super().__init__()
        # {storage: (weak reference to it, its bytes)}
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # Storages of the arguments are not new: they are counted already, or older than the start.
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if has_storage(x)}
        out = func(*args, **(kwargs or {}))
        for tensor in dense_tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                entry = (StorageWeakRef(storage), storage.nbytes())
                self.alive.setdefault(storage._cdata, entry)
        for key, (reference, _) in list(self.alive.items()):
            if reference.expired():
                del self.alive[key]
        self.peak = max(self.peak, sum(n_bytes for _, n_bytes in self.alive.values()))
        return out


def dense_tensors(out):
    """The dense tensors that an operation returns; of a sparse tensor, its indices and values."""
    found = []
    for x in tree_leaves(out):
        if isinstance(x, torch.Tensor) and x.is_sparse:
            found += [x._indices(), x._values()]
        else:
            found.append(x)
    return [x for x in found if has_storage(x)]


def has_storage(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def peak_bytes(trainee, **shape):
    """The most bytes that live at once in a training step that is not the first."""
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
        # Kept alive, so that no other storage gets the same address.
        kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nats, _ = target_losses(model, batch_of(**shape))
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


@pytest.mark.parametrize("way", ["bands", "blocks"])
def test_memory_is_linear_in_the_row(way, monkeypatch):
    """The same 16 patches in rows of any length: between patches attention is dense."""
    monkeypatch.setattr(attention, "BAND_SCORES", 0)
    if way == "blocks":
        monkeypatch.setattr(attention.AttentionPlan, "_by_bands", by_blocks)
    trainee = Trainee(blt())
    sizes = (1024, 2048, 4096)
    kept = [kept_bytes(trainee.model, row_bytes=n) for n in sizes]
    peak = [peak_bytes(trainee, row_bytes=n) for n in sizes]
    for small, middle, large in (kept, peak):
        assert large <= 1.1 * 4 * small
        # In differences, parameters and gradients cancel; a quadratic part would not.
        assert large - middle <= 1.1 * 2 * (middle - small)
    if way == "bands":
        # A batch has two rows.
        n_bytes = 2 * (sizes[2] - sizes[0])
        kept_per_byte = (kept[2] - kept[0]) / n_bytes
        peak_per_byte = (peak[2] - peak[0]) / n_bytes
        assert 0.5 * KEPT_PER_BYTE < kept_per_byte <= KEPT_PER_BYTE, f"{kept_per_byte} kept"
        assert 0.5 * PEAK_PER_BYTE < peak_per_byte <= PEAK_PER_BYTE, f"{peak_per_byte} at the peak"


def test_memory_of_a_step_does_not_depend_on_large_tables(monkeypatch):
    monkeypatch.setattr(blt_model, "DENSE_HASH_ROWS", 100)
    models = [blt(hash_rows=rows, ngram_sizes=[3]) for rows in (20_000, 200_000)]
    kept = [kept_bytes(model, row_bytes=256) for model in models]
    assert kept[0] == kept[1]
    small, large = [peak_bytes(Trainee(model), row_bytes=256) for model in models]
    # A little more, because fewer n-grams share a row.
    assert large <= 1.02 * small


# ---- Patching


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
@pytest.mark.parametrize("method", ["global", "monotonic", "both", "static", "space"])
def test_patching_has_no_loop_over_positions(method, options):
    threshold = 4 if method == "static" else 0.6
    counts = []
    # The first call may import, so it does not count.
    for n in (1000, 1000, 100_000):
        rng = np.random.default_rng(0)
        entropies = rng.random(n, dtype=np.float32).astype(np.float16)
        text = rng.integers(0, 256, n, dtype=np.uint8)
        n_lines = lines_run(patch_starts, entropies, method, threshold, byte_values=text, **options)
        counts.append(n_lines)
    assert 5 < counts[1] == counts[2] < 200
