"""The BLT's invariants (docs/design.md), and its parts against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

import blt_model
from blt.attention import AttentionPlan, BlockAttention, apply_rotary, may_attend, rotary_cos_sin
from blt.flops import block_flops
from blt.ids import documents_of
from blt.kernels import GatedLinear, JoinedGatedLinear, RotatedPairs, SparseLookup
from blt.layers import FeedForward, RMSNorm, SquaredReLU
from blt.metric import bits_per_byte, leak_gate, target_losses
from blt.ngrams import NgramHashes, SpanHashes, hash_spans
from blt.patch_rules import PatchConfig
from blt.rows import evaluation_batches, make_batch
from blt.segments import PatchMap, check_patch_lengths
from blt.tokens import train_tokenizer
from blt_model import BLTConfig, BLTModel, HashEmbedding, hash_ngrams
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher

TINY = dict(
    encoder_dim=32,
    global_dim=48,
    decoder_dim=32,
    global_layers=2,
    decoder_layers=2,
    hash_rows=64,
    window=8,
)
VARIANTS = {
    "plain": {},
    "two encoder layers, mean pooling": dict(encoder_layers=2, pooling="mean"),
    "cross-attention in all encoder layers": dict(encoder_layers=2, cross_attn_all_layers_encoder=True),
    "one decoder cross-attention, k 4": dict(cross_attn_all_layers_decoder=False, cross_attn_k=4),
    "other widths, no n-grams": dict(decoder_dim=48, ngram_sizes=[], encoder_heads=2),
    "qk norm, window beyond the row": dict(qk_norm=True, window=512),
    "squared ReLU, soft cap": dict(relu2=True, logit_softcap=5.0),
    "patch n-grams": dict(patch_ngrams=[0, 1, 3]),
    "patch n-grams alone": dict(patch_ngrams=[2], ngram_sizes=[]),
    "gates": dict(gate_ngrams=[2, 4], patch_ngrams=[0], decoder_layers=2),
    "gates alone, other widths": dict(gate_ngrams=[3], ngram_sizes=[], decoder_dim=48),
}
# The threshold that each method is tested with.
METHODS = {"global": 5.05, "monotonic": 0.0, "static": 4, "space": 1.0, "cumulative": 20.0}


def random_bytes(n, seed=0):
    return np.random.default_rng(seed).integers(32, 127, n, dtype=np.uint8)


@pytest.fixture(scope="module")
def entropy_model():
    torch.manual_seed(0)
    return MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=16)).eval()


def make(variant="plain", seed=1):
    torch.manual_seed(seed)
    return BLTModel(BLTConfig(**{**TINY, **VARIANTS[variant]})).eval()


@torch.no_grad()
def document_logits(model, patcher, document):
    """Logits [n + 1, 257] after the boundary and after each byte of one document."""
    starts = [patcher.starts(document)]
    (batch,) = evaluation_batches([document], starts, row_bytes=len(document) + 1, batch_rows=1)
    return model(batch.ids[:, :-1], batch.patch_lengths)[0]


# ---- Invariants 1 and 2 of docs/design.md: no future, prefix equals whole


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_no_future_and_prefix_equals_whole(entropy_model, variant, method):
    patcher = EntropyPatcher(entropy_model, threshold=METHODS[method], method=method)
    model = make(variant)
    document = random_bytes(70)
    whole = document_logits(model, patcher, document)
    assert whole.shape == (71, 257)
    for t in (1, 13, 40, 69):
        changed = document.copy()
        changed[t:] = random_bytes(70 - t, seed=t)
        other_future = document_logits(model, patcher, changed)
        torch.testing.assert_close(other_future[: t + 1], whole[: t + 1], atol=1e-4, rtol=0)
        prefix = document_logits(model, patcher, document[:t])
        torch.testing.assert_close(prefix[-1], whole[t], atol=1e-4, rtol=0)
    assert leak_gate(model, patcher, document) < 1e-4


original_map = PatchMap.__init__


def read_the_containing_patch(self, patch_lengths_BP, documents_BT):
    """A leak: a byte reads the patch that contains it, although later bytes are in that patch too."""
    original_map(self, patch_lengths_BP, documents_BT)
    B, T = documents_BT.shape
    first_of_row = torch.arange(B)[:, None] * self.P
    positions_BT = torch.arange(T).expand(B, T).contiguous()
    patch_BT = torch.searchsorted(patch_lengths_BP.cumsum(1), positions_BT, right=True)
    self.read = (patch_BT + first_of_row).flatten()


def read_the_next_patch(self, patch_lengths_BP, documents_BT):
    """A leak, off by one: a byte reads the patch that its target opens."""
    original_map(self, patch_lengths_BP, documents_BT)
    self.read = (self.read + 1).clamp(max=len(documents_BT) * self.P - 1)


@pytest.mark.parametrize("mistake", [read_the_containing_patch, read_the_next_patch])
def test_leak_gate_sees_a_patch_that_is_read_too_early(entropy_model, monkeypatch, mistake):
    monkeypatch.setattr(PatchMap, "__init__", mistake)
    with pytest.raises(ValueError, match="leak"):
        leak_gate(make(), EntropyPatcher(entropy_model, threshold=5.05), random_bytes(70))


def test_leak_gate_sees_patches_that_look_ahead(entropy_model):
    class Ahead(EntropyPatcher):
        def starts(self, document, entropies=None):
            is_start = np.ones(len(document) + 1, dtype=bool)
            # Whether a patch starts at a byte depends on that byte itself.
            is_start[1:-1] = document[1:] > 80
            return is_start

    with pytest.raises(ValueError, match="leak"):
        leak_gate(make(), Ahead(entropy_model, threshold=5.05), random_bytes(70))


def test_leak_gate_sees_attention_to_the_future(entropy_model, monkeypatch):
    patcher = EntropyPatcher(entropy_model, threshold=4, method="static")
    model = make("qk norm, window beyond the row")

    def unmasked(self, heads, dtype):
        return [(0, self.length, 0, self.length, torch.zeros(1, dtype=dtype))]

    monkeypatch.setattr(AttentionPlan, "_make_bands", unmasked)
    with pytest.raises(ValueError, match="leak"):
        leak_gate(model, patcher, random_bytes(70))


def test_leak_gate_refuses_bpe(entropy_model, tmp_path):
    tokenizer_path = tmp_path / "t.json"
    train_tokenizer([random_bytes(500)], 260, tokenizer_path)
    patcher = EntropyPatcher(None, PatchConfig(method="bpe", tokenizer_path=str(tokenizer_path)))
    with pytest.raises(ValueError, match="looks ahead"):
        leak_gate(make(), patcher, random_bytes(70))


# ---- Invariant 3: other rows and other documents change nothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_row_alone_equals_row_in_a_batch(entropy_model, variant):
    patcher = EntropyPatcher(entropy_model, threshold=5.05)
    model = make(variant)
    rows = []
    for n in (60, 9, 33):
        document = random_bytes(n, seed=n)
        ids = np.concatenate(([256], document, [256])).astype(np.int64)
        is_start = np.concatenate(([True], patcher.starts(document)))
        rows.append((ids, is_start, np.ones(n + 1, dtype=bool)))
    together = make_batch(rows, row_bytes=64)
    with torch.no_grad():
        batched = model(together.ids[:, :-1], together.patch_lengths)
        for r, row in enumerate(rows):
            n = len(row[0]) - 1
            alone = make_batch([row], row_bytes=n)
            logits = model(alone.ids[:, :-1], alone.patch_lengths)[0]
            torch.testing.assert_close(logits, batched[r, :n], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["plain", "two encoder layers, mean pooling"])
def test_document_alone_equals_document_among_others(entropy_model, variant, method):
    """Documents packed into rows cost the sum of what each costs alone, document ends included."""
    patcher = EntropyPatcher(entropy_model, threshold=METHODS[method], method=method)
    model = make(variant)
    documents = [random_bytes(n, seed=n) for n in (50, 20, 31, 5, 1, 44)]
    n_bytes = sum(len(document) for document in documents)
    alone_bits = 0
    for document in documents:
        alone_bits += bits_per_byte(model, patcher, [document], row_bytes=128) * len(document)
    for row_bytes, batch_rows in ((128, 8), (128, 1), (52, 2), (1000, 1)):
        packed_bpb = bits_per_byte(model, patcher, documents, row_bytes, batch_rows)
        assert packed_bpb * n_bytes == pytest.approx(alone_bits, abs=1e-3)


def test_document_end_is_not_told_by_the_patches(entropy_model):
    """The last byte's logits are the same if the document goes on: no patch starts at a boundary."""
    patcher = EntropyPatcher(entropy_model, threshold=5.05)
    model = make()
    document = random_bytes(90)
    is_start = patcher.starts(document)
    next_document = random_bytes(9)
    # Documents that end inside patches and at their ends.
    for n in range(20, 80):
        ids = np.concatenate(([256], document[:n], [256], next_document, [256]))
        row_starts = np.concatenate(([True], is_start[: n + 1], patcher.starts(next_document)))
        batch = make_batch([(ids, row_starts, np.ones(len(ids) - 1, bool))], len(ids) - 1)
        with torch.no_grad():
            packed = model(batch.ids[:, :-1], batch.patch_lengths)[0]
        whole = document_logits(model, patcher, document)
        torch.testing.assert_close(packed[: n + 1], whole[: n + 1], atol=1e-4, rtol=0)
        if n == 20:
            following = document_logits(model, patcher, next_document)
            torch.testing.assert_close(packed[n + 1 : n + 11], following, atol=1e-4, rtol=0)


# ---- Parts


def test_patch_map_example():
    ids = torch.zeros(1, 5, dtype=torch.int64)
    patch_map = PatchMap(torch.tensor([[1, 2, 3, 0]]), documents_of(ids, 256))
    assert patch_map.pool.tolist() == [0, 1, 1, 2, 2]
    assert patch_map.read.tolist() == [0, 0, 1, 1, 1]


def test_boundary_in_a_patch_leaves_the_old_document_out():
    ids = torch.tensor([[256, 5, 6, 7, 256, 8]])
    # The patches are 256 | 5 6 | 7 256 | 8 target.
    patch_map = PatchMap(torch.tensor([[1, 2, 2, 2]]), documents_of(ids, 256))
    # The model drops slot 4: byte 7 belongs to the document before.
    assert patch_map.pool.tolist() == [0, 1, 1, 4, 2, 3]
    assert patch_map.documents_BP.tolist() == [[1, 1, 2, 2]]


def test_cross_attention_equals_a_loop_over_patches():
    torch.manual_seed(0)
    D = 8
    k = 2
    heads = 2
    lengths = [1, 3, 4, 2]
    cross = blt_model.EncoderCrossAttention(D, heads, 1e-5)
    patches = torch.randn(1, 4, k, D)
    states = torch.randn(1, 9, D)
    patch_map = PatchMap(torch.tensor([lengths]), torch.ones(1, 9, dtype=torch.int64))
    got = cross(patches, states, patch_map)
    q, key, value = cross.project(patches, states)
    begin = 0
    for p, length in enumerate(lengths):
        # The last patch holds the last target, which is no input.
        mine = slice(begin, min(begin + length, 9))
        for j in range(k):
            heads_out = []
            for h in range(heads):
                weights = (key[0, mine, h] @ q[0, p, j, h] / math.sqrt(D // heads)).softmax(0)
                heads_out.append(weights @ value[0, mine, h])
            want = 2 * patches[0, p, j] + cross.wo(torch.cat(heads_out))
            torch.testing.assert_close(got[0, p, j], want, atol=1e-5, rtol=1e-5)
        begin += length


# (row length T, window)
SHAPES = [
    (5, 8),
    (8, 8),
    (9, 8),
    (40, 8),
    (41, 7),
    (30, 1),
    (23, 2),
    (300, 70),
    (150, 400),
    (300, None),
]


@pytest.mark.parametrize("way", ["bands", "blocks", "flex"])
@pytest.mark.parametrize("T, window", SHAPES)
def test_every_way_of_attention_equals_a_dense_mask(way, T, window):
    torch.manual_seed(0)
    B = 2
    H = 2
    K = 16
    q, k, v = (torch.randn(B, T, H, K, requires_grad=True) for _ in range(3))
    documents = torch.cat((torch.zeros(B, T // 3), torch.ones(B, T - T // 3)), 1).long()
    plan = AttentionPlan(documents, K, 100.0, window)
    q_rotated = apply_rotary(q, plan.cos_sin)
    k_rotated = apply_rotary(k, plan.cos_sin)
    if way == "bands":
        got = plan.attend(q, k, v)
        assert T < 300 or len(plan.bands) > 1
    elif way == "blocks":
        got = BlockAttention(documents, window).attend(q_rotated, k_rotated, v)
    else:
        plan.flex_mask = plan._make_flex_mask()
        # FlexAttention has no backward pass on a CPU.
        with torch.no_grad():
            got = plan._by_flex_attention(q_rotated.detach(), k_rotated.detach(), v.detach())

    positions = torch.arange(T)
    distance = positions[:, None] - positions[None, :]
    in_window = (distance >= 0) & (distance < (window or T))
    same_document = documents[:, :, None] == documents[:, None, :]
    mask = in_window & same_document[:, None]
    scores = torch.einsum("bihk,bjhk->bhij", q_rotated, k_rotated) / K**0.5
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    want = torch.einsum("bhij,bjhk->bihk", weights, v)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if way != "flex":
        weight = torch.randn_like(v)
        gradients = torch.autograd.grad((got * weight).sum(), (q, k, v), retain_graph=True)
        wanted = torch.autograd.grad((want * weight).sum(), (q, k, v), retain_graph=True)
        torch.testing.assert_close(gradients, wanted, atol=1e-4, rtol=1e-4)


def test_what_a_gpu_computes_in_another_way():
    """Rotary embedding and feed-forward of compiled code on a GPU have the CPU's values and gradients."""
    torch.manual_seed(0)
    x = torch.randn(2, 30, 3, 8, requires_grad=True)
    cos_sin = rotary_cos_sin(torch.arange(-10, 20), 8, 100.0)
    gate_and_up = torch.randn(2, 30, 24, requires_grad=True)
    weight = torch.randn(8, 12, requires_grad=True)
    pairs = [
        (RotatedPairs.apply(x, cos_sin), apply_rotary(x, cos_sin), [x]),
        (
            JoinedGatedLinear.apply(gate_and_up, weight),
            GatedLinear.apply(*gate_and_up.chunk(2, -1), weight),
            [gate_and_up, weight],
        ),
    ]
    for got, want, inputs in pairs:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        d_out = torch.randn_like(got)
        gradients = [torch.autograd.grad(y, inputs, d_out) for y in (got, want)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [8, 7, 100])
def test_a_stream_in_chunks_sees_what_the_row_sees(window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 60, 2, 8) for _ in range(3))
    documents = (torch.arange(60) > 25).long()[None]
    whole = AttentionPlan(documents, 8, 100.0, window).attend(q, k, v)

    carry = AttentionPlan.carry_length(window)
    past_k = torch.zeros(1, carry, 2, 8)
    past_v = torch.zeros(1, carry, 2, 8)
    past_documents = torch.full((1, carry), -1)
    by_bands = []
    by_blocks = []
    by_flex = []
    for first, last in ((0, 20), (20, 29), (29, 30), (30, 60)):
        chunk_q = q[:, first:last]
        chunk_k = k[:, first:last]
        chunk_v = v[:, first:last]
        chunk_documents = documents[:, first:last]
        all_k = torch.cat((past_k, chunk_k), 1)
        all_v = torch.cat((past_v, chunk_v), 1)

        plan = AttentionPlan(chunk_documents, 8, 100.0, window, past_documents)
        by_bands.append(plan.attend(chunk_q, chunk_k, chunk_v, (past_k, past_v)))

        plan = AttentionPlan(chunk_documents, 8, 100.0, window, past_documents)
        q_rotated = apply_rotary(chunk_q, plan.cos_sin[carry:])
        k_rotated = apply_rotary(all_k, plan.cos_sin)
        blocks = BlockAttention(plan.documents, window, past_documents)
        by_blocks.append(blocks.attend(q_rotated, k_rotated, all_v))

        plan.flex_mask = plan._make_flex_mask()
        by_flex.append(plan._by_flex_attention(q_rotated, k_rotated, all_v))

        past_k = all_k[:, last - first :]
        past_v = all_v[:, last - first :]
        past_documents = torch.cat((past_documents, chunk_documents), 1)[:, last - first :]
    torch.testing.assert_close(torch.cat(by_bands, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(by_blocks, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(by_flex, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", range(12))
def test_the_flex_mask_has_the_tiles_that_torch_finds(case):
    """torch asks about every pair of positions; ours about the documents of tiles."""
    random = np.random.default_rng(case)
    T = int(random.choice([100, 128, 200, 640, 700]))
    past = int(random.choice([0, 128, 200]))
    window = [None, 1, 64, 128, 129, 300][case % 6]
    documents = torch.from_numpy((random.random((2, past + T)) < random.choice([0.001, 0.01, 0.1])).cumsum(1))
    documents[0, : past // 2] = -1
    plan = AttentionPlan(documents[:, past:], 16, 100.0, window, documents[:, :past] if past else None)
    got = plan._make_flex_mask()

    def is_visible(row, head, query, key):
        is_same_document = documents[row, past + query] == documents[row, key]
        return may_attend(past + query - key, is_same_document, window)

    want = create_block_mask(is_visible, 2, None, T, past + T, device="cpu")
    assert got.shape[-2:] == want.shape[-2:]
    numbers = ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks")
    for name in numbers if past == 0 else ():
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    # A past may hold positions of no document, which torch sees and which nobody attends to.
    n_seen = got.kv_num_blocks + got.full_kv_num_blocks
    assert (n_seen >= want.kv_num_blocks + want.full_kv_num_blocks).all()
    assert (got.full_kv_num_blocks <= want.full_kv_num_blocks).all()


def test_squared_relu_equals_its_definition():
    """Forward and backward, and it has the weights of the SwiGLU that it replaces."""
    torch.manual_seed(0)
    layer = SquaredReLU(32)
    usual = FeedForward(32)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in usual.parameters())
    assert block_flops(32) == 2 * (4 * 32 * 32 + sum(p.numel() for p in layer.parameters()))
    x = torch.randn(3, 5, 32, requires_grad=True)
    weight = torch.randn(3, 5, 32)
    w1, w2 = layer.w1.weight, layer.w2.weight
    want = (x @ w1.T).clamp(min=0).square() @ w2.T
    torch.testing.assert_close(layer(x), want)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    gradients = [torch.autograd.grad((y * weight).sum(), (x, w1, w2)) for y in (layer(x), want)]
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_soft_cap():
    model = make()
    ids, lengths = torch.randint(0, 256, (1, 20)), torch.tensor([[1] + [4] * 5])
    logits = 50 * model(ids, lengths)
    model.head.weight.mul_(50)
    torch.testing.assert_close(model(ids, lengths), logits, atol=1e-3, rtol=1e-4)
    model.config.logit_softcap = 3.0
    capped = model(ids, lengths)
    assert logits.abs().max() > 20 and capped.abs().max() <= 3
    torch.testing.assert_close(capped, 3 * (logits / 3).tanh(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_equals_its_definition(dtype):
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-5)
    norm.weight.data.normal_()
    x = torch.randn(5, 7, 24).to(dtype).requires_grad_()
    got = norm(x)
    want = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want.to(dtype), atol=tolerance, rtol=tolerance)
    weight = torch.randn(5, 7, 24)
    gradients = torch.autograd.grad((got.float() * weight).sum(), (x, norm.weight))
    wanted = torch.autograd.grad((want.float() * weight).sum(), (x, norm.weight))
    torch.testing.assert_close(gradients, wanted, atol=10 * tolerance, rtol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.float()).dtype == torch.bfloat16


def test_hash_does_not_look_across_a_boundary():
    row = torch.tensor([[256, 72, 101, 108, 256, 72, 101, 108]])
    hashes = hash_ngrams(row, documents_of(row, 256), (3, 5), 5000)
    assert torch.equal(hashes[0, :4], hashes[0, 4:])


def test_hashes_from_the_starts_of_patches():
    """All at once, byte by byte, and by hand; none reaches across a boundary."""
    ids = torch.tensor([[256, 72, 101, 108, 256, 72, 101, 108]])
    patch_map = PatchMap(torch.tensor([[1, 1, 2, 1, 1, 2, 1]]), documents_of(ids, 256))
    starts = patch_map.starts_before([0, 1])
    assert starts[0].T.tolist() == [[0, 1, 2, 2, 4, 5, 6, 6], [0, 0, 1, 1, 4, 4, 5, 5]]
    hashes = hash_spans(ids, starts)
    assert torch.equal(hashes[0, :4], hashes[0, 4:])
    p = 1_000_000_007
    assert hashes[0, 3].tolist() == [105 * p + 112, as_signed((76 * p + 105) * p + 112)]
    spans = SpanHashes([0, 1], 1)
    is_end = np.array([[True, True, False, True]])
    one_by_one, states = spans.read(ids[:, :4].numpy(), is_end)
    assert one_by_one.tolist() == hashes[:, :4].tolist()
    spans.state = states[2]
    assert spans.read(ids[:, 2:4].numpy(), is_end[:, 2:])[0].tolist() == hashes[:, 2:4].tolist()
    # As many as 2,048 ids: the powers of the prime wrap many times.
    ids = torch.randint(0, 256, (1, 2048))
    starts = torch.stack((torch.zeros(2048, dtype=torch.int64), torch.arange(2048).clamp(max=2040)), dim=1)
    for hashed, begin in zip(hash_spans(ids, starts[None])[0, -1].tolist(), (0, 2040)):
        value = 0
        for byte in ids[0, begin:].tolist():
            value = value * p + byte + 4
        assert hashed == as_signed(value)


def test_hashes_of_text_that_is_being_written():
    """Some ids at a time, of which not all are kept, in rows that begin at other times."""
    ids = torch.cat((torch.full((2, 1), 256), torch.randint(0, 256, (2, 40))), dim=1)
    want = hash_ngrams(ids, documents_of(ids, 256), (2, 5, 8), 5000).numpy()
    ngrams = NgramHashes((2, 5, 8), 2)
    for begin, n, kept in ((0, 3, 3), (3, 4, 2), (5, 1, 0), (5, 1, 1), (6, 35, 35)):
        hashes, read = ngrams.read(ids[:, begin : begin + n].numpy())
        assert np.array_equal(hashes % 5000, want[:, begin : begin + n])
        ngrams.keep(read, np.array([kept, kept]))
    # The second row begins again.
    ngrams.recent[1] = 0
    hashes, _ = ngrams.read(ids[:, :2].numpy())
    assert np.array_equal(hashes[1] % 5000, want[1, :2])
    assert not np.array_equal(hashes[0] % 5000, want[0, :2])


def as_signed(value):
    """A number as a 64-bit integer holds it."""
    return (value + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("sparse", [False, True])
def test_dropped_ngrams(sparse):
    """Training leaves each n-gram out with the given probability, scales none up, and changes no row left out."""
    torch.manual_seed(0)
    tables = HashEmbedding([2, 3, 4, 5], 5000, 1, dropout=0.25)
    tables.tables.sparse = sparse
    torch.nn.init.ones_(tables.tables.weight)
    ids = torch.randint(0, 256, (4, 500))
    documents = torch.zeros_like(ids)
    assert (tables.eval()(ids, documents) == 4).all()
    n_kept = tables.train()(ids, documents)
    shares = torch.stack([(n_kept == n).float().mean() for n in range(5)])
    wanted = torch.tensor([math.comb(4, n) * 0.75**n * 0.25 ** (4 - n) for n in range(5)])
    torch.testing.assert_close(shares, wanted, atol=0.03, rtol=0)
    n_kept.sum().backward()
    gradient = tables.tables.weight.grad.to_dense()
    assert gradient.sum() == n_kept.sum()
    # No gradient, no update: see RowWiseAdam.
    looked_up = (hash_ngrams(ids, documents, tables.sizes, 5000) + tables.first_row).unique()
    assert (gradient[looked_up] == 0).any()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_the_gradient_of_a_large_table_lists_each_row_once(is_weighted):
    """As torch's EmbeddingBag has it after it is coalesced, with weights of zero too."""
    torch.manual_seed(0)
    tables = torch.nn.EmbeddingBag(50, 6, mode="sum", sparse=True)
    rows = torch.randint(0, 50, (40, 3))
    weights = (torch.rand(40, 3) > 0.3).float() if is_weighted else None
    d_out = torch.randn(40, 6)
    wanted = tables(rows, per_sample_weights=weights)
    wanted.backward(d_out)
    coalesced = tables.weight.grad.coalesce()
    table = tables.weight.detach().clone().requires_grad_()
    found = SparseLookup.apply(table, rows, weights)
    assert torch.equal(found, wanted)
    found.backward(d_out)
    assert table.grad.is_sparse
    assert torch.equal(table.grad._indices(), coalesced.indices())
    torch.testing.assert_close(table.grad._values(), coalesced.values())


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        for x in outputs:
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_memory_is_linear_in_the_row():
    """No tensor of a forward pass has more than a constant number of elements per byte.

    So no tensor has a size of bytes times bytes, or of bytes times patches. The test makes patches
    long to leave out the latent transformer, whose attention is dense over patches.
    """
    model = make()
    sizes = []
    for T in (512, 2048):
        is_start = np.zeros(T + 1, dtype=bool)
        is_start[:: T // 16] = True
        is_start[1] = True
        batch = make_batch([(np.append(256, random_bytes(T)), is_start, np.ones(T, bool))], T)
        with LargestTensor() as largest, torch.no_grad():
            model(batch.ids[:, :-1], batch.patch_lengths)
        sizes.append(largest.size)
    assert sizes[1] <= 4.1 * sizes[0]


def test_check_patch_lengths():
    check_patch_lengths(torch.tensor([[1, 2, 2, 0], [1, 1, 1, 2]]), 5)
    for bad, words in (
        ([[2, 3]], "first patch"),
        ([[1, 0, 4]], "zero"),
        ([[1, 2]], "sum to 5"),
        ([[1, -1, 5]], "negative"),
        ([1, 4], "integers"),
    ):
        with pytest.raises(ValueError, match=words):
            check_patch_lengths(torch.tensor(bad), 5)
    with pytest.raises(ValueError, match="integers"):
        check_patch_lengths(torch.tensor([[1.0, 4.0]]), 5)


def test_forward_checks_shapes():
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        make()(torch.zeros(5, dtype=torch.int64), torch.ones(1, 6, dtype=torch.int64))


def test_config_errors():
    for bad, words in (
        (dict(pooling="sum"), "max or mean"),
        (dict(global_layers=0), "global_layers is 0"),
        (dict(ngram_sizes=[3, 3]), "ngram_sizes"),
        (dict(patch_ngrams=[0, 0]), r"patch_ngrams is \[0, 0\]"),
        (dict(patch_ngrams=[-1]), "0 or more"),
        (dict(gate_ngrams=[1]), "2 or more"),
        (dict(ngram_dropout=1.0), "ngram_dropout is 1.0"),
        (dict(logit_softcap=-1.0), "logit_softcap is -1.0"),
        (dict(encoder_dim=33), "width 33"),
        (dict(decoder_heads=5), "decoder_dim"),
    ):
        with pytest.raises(ValueError, match=words):
            BLTConfig(**bad)


def test_parts_add_up():
    model = make()
    n_parameters = sum(p.numel() for p in model.parameters())
    assert sum(model.parameters_by_part().values()) == n_parameters


def test_uniform_model_scores_log2_257():
    """Padding costs nothing: a uniform model needs log2(257) bits for each byte and document end."""
    model = make()
    torch.nn.init.zeros_(model.head.weight)
    documents = [random_bytes(30), random_bytes(7)]
    patcher = EntropyPatcher(None, threshold=3, method="static")
    want = math.log2(257) * (30 + 7 + 2) / 37
    for row_bytes in (31, 64, 500):
        bpb = bits_per_byte(model, patcher, documents, row_bytes=row_bytes)
        assert bpb == pytest.approx(want, rel=1e-6)


def test_long_documents_are_scored_once_each():
    model = make()
    torch.nn.init.zeros_(model.head.weight)
    document = random_bytes(1000)
    for row_bytes in (64, 100, 999, 1000, 1001):
        batches = list(evaluation_batches([document], None, row_bytes))
        assert sum(batch.bytes for batch in batches) == 1000
        assert sum(batch.targets for batch in batches) == 1001
        # Row by row, in the document's order.
        scored = torch.cat([batch.ids[:, 1:][batch.is_scored] for batch in batches])
        assert scored.tolist() == [*document.tolist(), 256]

        is_start = np.random.default_rng(1).random(1001) < 0.2
        is_start[0] = True
        patched = list(evaluation_batches([document], [is_start], row_bytes))
        for batch, with_patches in zip(batches, patched):
            assert torch.equal(batch.ids, with_patches.ids)

        # From its third id on, the last window has the document's patch starts.
        half = row_bytes // 2
        windows_before = math.ceil(max(0, 1001 - row_bytes) / half)
        begin = half * windows_before
        lengths = patched[-1].patch_lengths[-1]
        made = np.zeros(row_bytes + 2, dtype=bool)
        made[np.concatenate(([0], lengths.cumsum(0).numpy()))] = True
        assert made[2 : 1002 - begin].tolist() == is_start[begin + 1 :].tolist()


def test_gradients_reach_every_parameter(entropy_model):
    patcher = EntropyPatcher(entropy_model, threshold=5.05)
    for variant in VARIANTS:
        model = make(variant).train()
        document = random_bytes(200)
        (batch,) = evaluation_batches([document], [patcher.starts(document)], 256)
        target_losses(model, batch)[0].sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (variant, name)
            assert parameter.grad.abs().sum() > 0, (variant, name)


def test_recomputing_layers_changes_nothing():
    kept_elements = []
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = BLTModel(BLTConfig(**TINY, recompute=recompute))
        ids = torch.randint(0, 256, (2, 20))
        lengths = torch.tensor([[1] + [4] * 5] * 2)
        kept = 0

        def keep(x):
            nonlocal kept
            kept += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(ids, lengths).logsumexp(-1).square().mean()
        loss.backward()
        kept_elements.append(kept)
        gradients.append([p.grad for p in model.parameters()])
    assert kept_elements[1] < 0.7 * kept_elements[0]
    torch.testing.assert_close(gradients[1], gradients[0])
