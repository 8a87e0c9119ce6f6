"""A model read byte by byte gives what a full pass gives: for every method, prompt, window edge and batch."""

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

RULES = {
    "global": dict(entropy_threshold=2.93), "monotonic": dict(entropy_threshold=0.12), "both": dict(entropy_threshold=2.2, monotonic_threshold=0.1),
    "cumulative": dict(entropy_threshold=9.1), "static": dict(entropy_threshold=4.5), "space": {},
    "limits": dict(method="global", entropy_threshold=3.03, min_patch_size=2, max_patch_size=7), "never": dict(method="global", entropy_threshold=99.0),
}  # fmt: skip
CONFIGS = {
    "plain": {}, "two encoder layers": dict(encoder_layers=2), "all encoder cross-attentions": dict(encoder_layers=2, cross_attn_all_layers_encoder=True),
    "one decoder cross-attention, k 1, mean": dict(cross_attn_all_layers_decoder=False, cross_attn_k=1, pooling="mean"),
    "qk norm, no hashes, widths": dict(qk_norm=True, ngram_sizes=[], decoder_dim=48), "same width": dict(global_dim=64),
}  # fmt: skip
TEXT = ("Ein Buch, two books; 3 bücher... " * 40 + "x" * 90 + "日本語 text\n\tand the rest of it. " * 20).encode()


def patcher_of(rule):
    options = {"method": rule, **RULES[rule]}
    torch.manual_seed(1)
    entropy_model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=9)).eval()
    with torch.no_grad():
        entropy_model.head.weight.mul_(3)  # entropies that differ
    config = PatchConfig(**options)
    return EntropyPatcher(entropy_model if config.needs_entropies else None, config)


def model_of(name="plain", window=12):
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


@torch.no_grad()
def full_logits(model, patcher, document, begin=0, end=None):
    """Logits [n, 257] after ids begin to end of a document, by one pass over them."""
    document = np.frombuffer(document, np.uint8)
    end = len(document) + 1 if end is None else end
    ids, starts = (
        np.concatenate(([256], document, [256]))[begin : end + 1],
        np.concatenate(([True], patcher.starts(document)))[begin : end + 1],
    )
    starts[:2] = True
    batch = make_batch([(ids, starts, np.ones(len(ids) - 1, bool))], len(ids) - 1)
    return model(batch.ids[:, :-1], batch.patch_lengths)[0]


def step_logits(reader, document, steps):
    """Logits after each id of a boundary and a document, read in steps of these sizes (over and over)."""
    ids, at, out, number = np.concatenate(([256], np.frombuffer(document, np.uint8))).astype(np.int64), 0, [], 0
    while at < len(ids):
        n = min(steps[number % len(steps)], len(ids) - at, int(reader.step_limits()[0]))
        out.append(reader.extend(ids[None, at : at + n])[0])
        at, number = at + n, number + 1
    return torch.cat(out)


@pytest.mark.parametrize("steps", [[1], [3, 1, 20, 64]], ids=["bytes", "pieces"])
@pytest.mark.parametrize("rule", RULES)
def test_steps_equal_the_full_pass_for_every_rule(rule, steps):
    model, patcher, text = model_of(), patcher_of(rule), TEXT[1250:1500]
    if rule not in ("never", "static", "space"):
        assert 30 < patcher.starts(text).sum() < 200  # the rule does something here
    reader = IncrementalBLT(model, patcher)
    for document in (text, b"", b"a", text[100:130]):  # one after the other in the same row
        torch.testing.assert_close(
            step_logits(reader, document, steps), full_logits(model, patcher, document), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_the_full_pass_for_every_model(name):
    model, patcher, text = model_of(name), patcher_of("limits"), TEXT[:200]
    got = step_logits(IncrementalBLT(model, patcher), text, [1, 7])
    torch.testing.assert_close(got, full_logits(model, patcher, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 2, MAX_STEP - 1, MAX_STEP, MAX_STEP + 1])
def test_window_edges(window):
    model, patcher = model_of(window=window), patcher_of("space")
    got = step_logits(IncrementalBLT(model, patcher), TEXT[:400], [MAX_STEP, 1, MAX_STEP])
    torch.testing.assert_close(got, full_logits(model, patcher, TEXT[:400]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("context", [2, 7, 64, 300])
def test_a_full_row_restarts_with_its_last_half(context):
    model, patcher, text = model_of(), patcher_of("both"), TEXT[: min(40 * context, 700)]
    got = step_logits(IncrementalBLT(model, patcher, context_bytes=context), text, [1, 5, 50])
    scored, wanted = 0, []
    for begin in range(0, len(text) + 1, context // 2):
        end = min(begin + context, len(text) + 1)
        if scored < end:
            wanted.append(full_logits(model, patcher, text, begin, end)[scored - begin :])
            scored = end
    torch.testing.assert_close(got, torch.cat(wanted), atol=1e-4, rtol=0)


def test_a_full_row_restarts_in_the_asked_precision():
    """The ids that are read again go into the same caches, so they are computed in bf16 like all others."""
    model, patcher = model_of(), patcher_of("static")
    got = step_logits(IncrementalBLT(model, patcher, context_bytes=40, precision="bf16"), TEXT[:150], [7])
    wanted = step_logits(IncrementalBLT(model, patcher, context_bytes=40), TEXT[:150], [7])
    torch.testing.assert_close(got.float(), wanted, atol=0.1, rtol=0)


def test_rows_do_not_meet():
    model, patcher = model_of(), patcher_of("global")
    texts = [TEXT[:333], b"", TEXT[50:57], TEXT[1300:1700]]
    ids = [np.concatenate(([256], np.frombuffer(text, np.uint8))).astype(np.int64) for text in texts]
    together = IncrementalBLT(model, patcher, n_rows=4, context_bytes=200)
    logits = together.prefill(ids)
    more = np.array([[97, 98, 99]] * 4)
    further = together.extend(more, np.array([3, 1, 0, 2]))
    for row, text in enumerate(ids):
        alone = IncrementalBLT(model, patcher, context_bytes=200)
        torch.testing.assert_close(alone.prefill([text])[0], logits[row], atol=1e-4, rtol=0)
        n = [3, 1, 0, 2][row]
        if n:
            torch.testing.assert_close(alone.extend(more[:1, :n])[0], further[row, :n], atol=1e-4, rtol=0)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_rolled_back_ids_leave_no_trace(data):
    rule, text = data.draw(st.sampled_from(sorted(RULES))), TEXT[1000:1120]
    model, patcher = model_of(window=data.draw(st.sampled_from([3, 12]))), patcher_of(rule)
    reader = IncrementalBLT(model, patcher)
    ids = np.concatenate(([256], np.frombuffer(text, np.uint8))).astype(np.int64)
    at, got = 0, []
    while at < len(ids):
        n = data.draw(st.integers(1, 20))
        keep = min(data.draw(st.integers(1, n)), len(ids) - at)
        drafted = np.concatenate((ids[at : at + keep], np.full(n - keep, 120)))[None, :n]
        closes = []
        for i in range(n):  # the entropy model reads one by one, as when it drafts
            close, _ = reader.find_patch_ends(drafted[:, i : i + 1], np.array([1]))
            closes.append(close)
        counts = np.array([n])
        logits = reader.advance(drafted, np.concatenate(closes, axis=1), counts)
        reader.commit(np.array([keep]))
        got.append(logits[0, :keep])
        at += keep
    torch.testing.assert_close(torch.cat(got), full_logits(model, patcher, text), atol=1e-4, rtol=0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_online_starts_equal_patch_starts(data):
    method = data.draw(st.sampled_from(["global", "monotonic", "both", "cumulative", "static", "space"]))
    threshold = (
        data.draw(st.sampled_from([1.0, 1.5, 2.0, 4.5, 7.3]))
        if method == "static"
        else data.draw(st.floats(-1, 3, width=32))
    )
    low = data.draw(st.integers(1, 4))
    config = PatchConfig(
        method, threshold, data.draw(st.floats(-1, 1, width=32)), low, data.draw(st.none() | st.integers(low, 9))
    )
    lengths = [data.draw(st.integers(0, 40)) for _ in range(3)]
    generator = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    texts = [generator.choice(np.frombuffer(b"ab .\x80\xc3\n1", np.uint8), n) for n in lengths]
    entropies = [generator.gamma(2, 0.5, n + 1).astype(np.float32) for n in lengths]
    rule, got = OnlineStarts(config, 3), [[], [], []]
    for place in range(max(lengths) + 1):
        active = np.array([place <= n for n in lengths])
        H = np.array([e[place] if a else 9.0 for e, a in zip(entropies, active)], np.float32)
        last = np.array([t[place - 1] if a and place else 256 for t, a in zip(texts, active)])
        for row, start in enumerate(rule.step(None if method in ("static", "space") else H, last, active)):
            got[row] += [start] if active[row] else []
    for text, e, starts in zip(texts, entropies, got):
        np.testing.assert_array_equal(starts, patch_starts(e, **config.arguments(), byte_values=np.append(text, 0)))


def test_wrong_use_gets_an_error():
    model, patcher = model_of(), patcher_of("space")
    reader = IncrementalBLT(model, patcher)
    with pytest.raises(ValueError, match="begins with a boundary"):
        reader.extend(np.array([[97]]))
    with pytest.raises(ValueError, match="first id of its row"):
        reader.extend(np.array([[256, 97, 256]]))
    reader.find_patch_ends(np.array([[256]]), np.array([1]))
    with pytest.raises(ValueError, match="first id of its row"):  # of the step, of which one id has been drafted
        reader.find_patch_ends(np.array([[256]]), np.array([1]))
    with pytest.raises(ValueError, match="do not fit"):  # the limit is that of the step as well
        reader.find_patch_ends(np.full((1, MAX_STEP), 97), np.array([MAX_STEP]))
    reader = IncrementalBLT(model, patcher)
    with pytest.raises(ValueError, match="do not fit"):
        reader.extend(np.full((1, MAX_STEP + 1), 97))
    with pytest.raises(ValueError, match="context_bytes"):
        IncrementalBLT(model, patcher, context_bytes=1)
