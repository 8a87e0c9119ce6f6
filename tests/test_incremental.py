"""Reading byte by byte gives the logits of a full pass, for every method, window edge and batch."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.incremental import MAX_STEP, IncrementalBLT
from blt.patch_rules import OnlineStarts, PatchConfig, patch_starts
from blt.rows import make_batch
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher

# Fields of a PatchConfig by a name, which is also the method unless a method is given.
PATCH_CONFIGS = {
    "global": dict(entropy_threshold=2.93),
    "monotonic": dict(entropy_threshold=0.12),
    "both": dict(entropy_threshold=2.2, monotonic_threshold=0.1),
    "cumulative": dict(entropy_threshold=9.1),
    "static": dict(entropy_threshold=4.5),
    "space": {},
    "limits": dict(method="global", entropy_threshold=3.03, min_patch_size=2, max_patch_size=7),
    "never": dict(method="global", entropy_threshold=99.0),
}
CONFIGS = {
    "plain": {},
    "two encoder layers": dict(encoder_layers=2),
    "all encoder cross-attentions": dict(encoder_layers=2, cross_attn_all_layers_encoder=True),
    "one decoder cross-attention, k 1, mean": dict(
        cross_attn_all_layers_decoder=False,
        cross_attn_k=1,
        pooling="mean",
    ),
    "qk norm, no hashes, widths": dict(qk_norm=True, ngram_sizes=[], decoder_dim=48),
    "same width": dict(global_dim=64),
    "patch n-grams": dict(patch_ngrams=[0, 2]),
    "patch n-grams alone": dict(patch_ngrams=[1, 0], ngram_sizes=[]),
    "gates": dict(gate_ngrams=[2, 5], patch_ngrams=[0], ngram_sizes=[3, 2]),
    "gates alone, other widths": dict(gate_ngrams=[4], ngram_sizes=[], decoder_dim=48),
    "squared ReLU, soft cap, dropout of n-grams": dict(relu2=True, logit_softcap=1.5, ngram_dropout=0.5),
}
TEXT = "".join(
    [
        "Ein Buch, two books; 3 bücher... " * 40,
        "x" * 90,
        "日本語 text\n\tand the rest of it. " * 20,
    ]
).encode()


def patcher_of(patching):
    """An `EntropyPatcher` by its name in PATCH_CONFIGS, with a random entropy model if it needs one."""
    torch.manual_seed(1)
    entropy_config = EntropyConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=9)
    entropy_model = MinimalLLM(entropy_config).eval()
    # Larger logits give entropies that differ from byte to byte.
    with torch.no_grad():
        entropy_model.head.weight.mul_(3)
    config = PatchConfig(**{"method": patching, **PATCH_CONFIGS[patching]})
    return EntropyPatcher(entropy_model if config.needs_entropies else None, config)


def model_of(name="plain", window=12):
    """A random `BLTModel` by its name in CONFIGS."""
    torch.manual_seed(0)
    sizes = dict(
        encoder_dim=32,
        global_dim=48,
        global_layers=2,
        decoder_dim=32,
        decoder_layers=2,
        hash_rows=64,
        ngram_sizes=[3, 5],
        cross_attn_k=2,
        window=window,
    )
    return BLTModel(BLTConfig(**{**sizes, **CONFIGS[name]})).eval()


def ids_of(document):
    """int64 ids of a document boundary and a document's bytes."""
    return np.concatenate(([256], np.frombuffer(document, np.uint8))).astype(np.int64)


@torch.no_grad()
def full_logits(model, patcher, document, begin=0, end=None):
    """Logits [n, 257] after ids begin to end of a document, by one pass over them."""
    document = np.frombuffer(document, np.uint8)
    end = len(document) + 1 if end is None else end
    ids = np.concatenate(([256], document, [256]))[begin : end + 1]
    is_start = np.concatenate(([True], patcher.starts(document)))[begin : end + 1]
    is_start[:2] = True
    batch = make_batch([(ids, is_start, np.ones(len(ids) - 1, bool))], len(ids) - 1)
    return model(batch.ids[:, :-1], batch.patch_lengths)[0]


def step_logits(reader, document, steps):
    """Logits after each id of a boundary and a document, read in steps whose sizes repeat."""
    ids = ids_of(document)
    out = []
    at = 0
    for size in itertools.cycle(steps):
        n = min(size, len(ids) - at, int(reader.step_limits()[0]))
        out.append(reader.extend(ids[None, at : at + n])[0])
        at += n
        if at == len(ids):
            return torch.cat(out)


@pytest.mark.parametrize("steps", [[1], [3, 1, 20, 64]], ids=["bytes", "pieces"])
@pytest.mark.parametrize("patching", PATCH_CONFIGS)
def test_steps_equal_the_full_pass_for_every_patch_config(patching, steps):
    model = model_of()
    patcher = patcher_of(patching)
    text = TEXT[1250:1500]
    if patching not in ("never", "static", "space"):
        # The threshold splits this text into several patches.
        assert 30 < patcher.starts(text).sum() < 200
    reader = IncrementalBLT(model, patcher)
    # One document after the other in the same row.
    for document in (text, b"", b"a", text[100:130]):
        got = step_logits(reader, document, steps)
        wanted = full_logits(model, patcher, document)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_the_full_pass_for_every_model(name):
    model = model_of(name)
    patcher = patcher_of("limits")
    text = TEXT[:200]
    got = step_logits(IncrementalBLT(model, patcher), text, [1, 7])
    torch.testing.assert_close(got, full_logits(model, patcher, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 2, MAX_STEP - 1, MAX_STEP, MAX_STEP + 1])
def test_window_edges(window):
    model = model_of(window=window)
    patcher = patcher_of("space")
    got = step_logits(IncrementalBLT(model, patcher), TEXT[:400], [MAX_STEP, 1, MAX_STEP])
    torch.testing.assert_close(got, full_logits(model, patcher, TEXT[:400]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("context", [2, 7, 64, 300])
def test_a_full_row_restarts_with_its_last_half(context):
    model = model_of()
    patcher = patcher_of("both")
    text = TEXT[: min(40 * context, 700)]
    reader = IncrementalBLT(model, patcher, context_bytes=context)
    got = step_logits(reader, text, [1, 5, 50])
    wanted = []
    scored = 0
    for begin in range(0, len(text) + 1, context // 2):
        end = min(begin + context, len(text) + 1)
        if scored < end:
            logits = full_logits(model, patcher, text, begin, end)
            wanted.append(logits[scored - begin :])
            scored = end
    torch.testing.assert_close(got, torch.cat(wanted), atol=1e-4, rtol=0)


def test_a_full_row_restarts_in_the_asked_precision():
    """Ids that are read again go into the same caches, so they too are computed in bf16."""
    model = model_of()
    patcher = patcher_of("static")
    in_bf16 = IncrementalBLT(model, patcher, context_bytes=40, precision="bf16")
    got = step_logits(in_bf16, TEXT[:150], [7])
    wanted = step_logits(IncrementalBLT(model, patcher, context_bytes=40), TEXT[:150], [7])
    torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0)


def test_rows_do_not_meet():
    model = model_of()
    patcher = patcher_of("global")
    texts = [TEXT[:333], b"", TEXT[50:57], TEXT[1300:1700]]
    ids = [ids_of(text) for text in texts]
    together = IncrementalBLT(model, patcher, n_rows=4, context_bytes=200)
    logits = together.prefill(ids)
    more = np.array([[97, 98, 99]] * 4)
    counts = [3, 1, 0, 2]
    further = together.extend(more, np.array(counts))
    for row, n in enumerate(counts):
        alone = IncrementalBLT(model, patcher, context_bytes=200)
        prefilled = alone.prefill([ids[row]])[0]
        torch.testing.assert_close(prefilled, logits[row], atol=1e-4, rtol=0)
        if n:
            extended = alone.extend(more[:1, :n])[0]
            torch.testing.assert_close(extended, further[row, :n], atol=1e-4, rtol=0)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_rolled_back_ids_leave_no_trace(data):
    patcher = patcher_of(data.draw(st.sampled_from(sorted(PATCH_CONFIGS))))
    model = model_of(window=data.draw(st.sampled_from([3, 12])))
    text = TEXT[1000:1120]
    reader = IncrementalBLT(model, patcher)
    ids = ids_of(text)
    at = 0
    got = []
    while at < len(ids):
        n = data.draw(st.integers(1, 20))
        keep = min(data.draw(st.integers(1, n)), len(ids) - at)
        drafted = np.concatenate((ids[at : at + keep], np.full(n - keep, 120)))[None, :n]
        # The entropy model reads the ids one by one, as when it drafts.
        closes = []
        for i in range(n):
            close, _ = reader.find_patch_ends(drafted[:, i : i + 1], np.array([1]))
            closes.append(close)
        logits = reader.advance(drafted, np.concatenate(closes, axis=1), np.array([n]))
        reader.commit(np.array([keep]))
        got.append(logits[0, :keep])
        at += keep
    torch.testing.assert_close(torch.cat(got), full_logits(model, patcher, text), atol=1e-4, rtol=0)


def draw_patch_config(data):
    """A `PatchConfig` of any method without a tokenizer."""
    methods = ["global", "monotonic", "both", "cumulative", "static", "space"]
    method = data.draw(st.sampled_from(methods))
    if method == "static":
        threshold = data.draw(st.sampled_from([1.0, 1.5, 2.0, 4.5, 7.3]))
    else:
        threshold = data.draw(st.floats(-1, 3, width=32))
    smallest = data.draw(st.integers(1, 4))
    monotonic_threshold = data.draw(st.floats(-1, 1, width=32))
    largest = data.draw(st.none() | st.integers(smallest, 9))
    return PatchConfig(method, threshold, monotonic_threshold, smallest, largest)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_online_starts_equal_patch_starts(data):
    config = draw_patch_config(data)
    lengths = [data.draw(st.integers(0, 40)) for _ in range(3)]
    generator = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    letters = np.frombuffer(b"ab .\x80\xc3\n1", np.uint8)
    texts = [generator.choice(letters, n) for n in lengths]
    entropies = [generator.gamma(2, 0.5, n + 1).astype(np.float32) for n in lengths]

    online = OnlineStarts(config, 3)
    got = [[], [], []]
    for position in range(max(lengths) + 1):
        is_active = np.array([position <= n for n in lengths])
        # Rows that are over get an entropy and an id that must not matter.
        row_entropies = np.full(3, 9.0, np.float32)
        last_ids = np.full(3, 256)
        for row in np.flatnonzero(is_active):
            row_entropies[row] = entropies[row][position]
            if position > 0:
                last_ids[row] = texts[row][position - 1]
        needs_entropies = config.method not in ("static", "space")
        is_start = online.step(row_entropies if needs_entropies else None, last_ids, is_active)
        for row in np.flatnonzero(is_active):
            got[row].append(is_start[row])

    for text, H, is_start in zip(texts, entropies, got):
        wanted = patch_starts(H, **config.arguments(), byte_values=np.append(text, 0))
        np.testing.assert_array_equal(is_start, wanted)


def test_wrong_use_gets_an_error():
    model = model_of()
    patcher = patcher_of("space")
    reader = IncrementalBLT(model, patcher)
    with pytest.raises(ValueError, match="begins with a boundary"):
        reader.extend(np.array([[97]]))
    with pytest.raises(ValueError, match="first id of its row"):
        reader.extend(np.array([[256, 97, 256]]))
    reader.find_patch_ends(np.array([[256]]), np.array([1]))
    # The checks and the limit are those of the whole step, of which one id has been drafted.
    with pytest.raises(ValueError, match="first id of its row"):
        reader.find_patch_ends(np.array([[256]]), np.array([1]))
    with pytest.raises(ValueError, match="do not fit"):
        reader.find_patch_ends(np.full((1, MAX_STEP), 97), np.array([MAX_STEP]))
    reader = IncrementalBLT(model, patcher)
    with pytest.raises(ValueError, match="do not fit"):
        reader.extend(np.full((1, MAX_STEP + 1), 97))
    with pytest.raises(ValueError, match="context_bytes"):
        IncrementalBLT(model, patcher, context_bytes=1)
