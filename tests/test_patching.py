"""Patching rules by hand, against plain loops and against their online forms; entropies; EntropyPatcher's contract."""

import copy
import math
import time

import numpy as np
import pytest
import torch
from helpers import random_bytes, tiny_entropy_model
from hypothesis import given, settings
from hypothesis import strategies as st

from blt import patch_rules
from blt.entropies import entropy_of, stream_entropies
from blt.patch_rules import (
    RULES,
    OnlineStarts,
    PatchConfig,
    causal_methods,
    patch_sizes,
    patch_starts,
    threshold_for_patch_size,
    warn_about_sizes,
)
from blt.pictures import PAGE, page_methods
from blt.rows import DocumentStream
from blt.tokens import train_tokenizer
from blt.training import TrainingConfig
from blt.training_patches import training_sample
from create_patches import CreatePatchesConfig
from entropy_patcher import EntropyPatcher, analyze_entropy_distribution
from show_patches import ShowPatchesConfig

# The worked example of the released code: "Daenerys T. is in", the last number is about what follows the text.
DAENERYS = np.array(
    [3.0, 2.5, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 2.4, 1.8, 0.2, 2.2, 1.9, 0.3, 2.1, 1.5, 2.9], dtype=np.float32
)
TEXT = b"Daenerys T. is in"
CAUSAL = causal_methods()


def pieces(text, starts):
    return [bytes(piece) for piece in np.split(np.frombuffer(text, np.uint8), np.flatnonzero(starts)[1:])]


def loop_starts(H, method, threshold, extra=0.0, low=1, high=None, text=None):
    """The rules one byte at a time: the oracle."""
    starts = []
    begin = 0
    for t in range(len(H)):
        if method == "global":
            want = H[t] > threshold
        elif method == "monotonic":
            want = t > 0 and H[t] - H[t - 1] > threshold
        elif method == "both":
            want = t > 0 and H[t] > threshold and H[t] - H[t - 1] > extra
        elif method == "cumulative":
            want = sum(H[begin : t + 1].astype(np.float64)) > threshold
        elif method == "static":
            want = t % threshold == 0
        elif method == "space":
            # space[i] is about byte i - 1, and the boundary is space-like.
            space = [True] + [not (chr(b).isalnum() and b < 128) and not 0x80 <= b < 0xC0 for b in text]
            want = t > 0 and space[t] and not space[t - 1]
        else:
            raise AssertionError(f"write the plain form of {method!r} here")
        length = t - begin
        is_start = t == 0 or (want and length >= low) or (high is not None and length >= high)
        begin = t if is_start else begin
        starts.append(bool(is_start))
    return np.array(starts, dtype=bool)


def test_published_example_global():
    starts = patch_starts(DAENERYS, "global", 1.335)
    assert pieces(TEXT, starts[:-1]) == [b"D", b"a", b"enerys ", b"T", b". ", b"i", b"s ", b"i", b"n"]
    # The end would start a patch too: the published lengths are 1 1 1 7 1 2 1 2 1 1 1.
    assert starts[-1]
    quiet = DAENERYS.copy()
    quiet[-1] = 0.1
    assert not patch_starts(quiet, "global", 1.335)[-1]


def test_published_example_monotonic_and_both():
    # The released code also forces a start at byte 1; ours follows the rule, so "Daenerys " is one patch.
    words = [b"Daenerys ", b"T. ", b"is ", b"in"]
    assert pieces(TEXT, patch_starts(DAENERYS, "monotonic", 0.5)[:-1]) == words
    assert pieces(TEXT, patch_starts(DAENERYS, "both", 1.335, monotonic_threshold=0.5)[:-1]) == words
    higher = patch_starts(DAENERYS, "both", 2.15, monotonic_threshold=0.5)
    assert pieces(TEXT, higher[:-1]) == [b"Daenerys ", b"T. ", b"is in"]


def test_published_example_space():
    starts = patch_starts(None, "space", byte_values=np.frombuffer(TEXT, np.uint8))
    assert pieces(TEXT, starts) == [b"Daenerys ", b"T.", b" is ", b"in"]


@pytest.mark.parametrize("method", CAUSAL)
def test_no_byte_and_one_byte(method):
    for n in (0, 1):
        H = np.zeros(n, np.float32)
        assert patch_starts(H, method, 1.0, byte_values=np.zeros(n, np.uint8)).tolist() == [True] * n


def test_thresholds_and_sizes_by_hand():
    # Above the threshold, not at it.
    assert patch_starts(np.ones(5), "global", 1.0).tolist() == [True] + [False] * 4
    assert patch_starts(np.ones(5), "global", 0.99).all()
    every_other = [True, False, True, False, True]
    assert patch_starts(np.zeros(5), "global", 0.5, max_patch_size=2).tolist() == every_other
    assert patch_starts(np.ones(5), "global", 0.5, min_patch_size=2).tolist() == every_other
    assert patch_starts(np.ones(5), "cumulative", 2.0).tolist() == every_other
    # 4.5 bytes on average
    assert np.flatnonzero(patch_starts(np.zeros(18), "static", 4.5)).tolist() == [0, 5, 9, 14]
    with pytest.raises(ValueError, match="one of global"):
        patch_starts(np.ones(5), "greedy")
    with pytest.raises(ValueError, match="needs entropies"):
        patch_starts(None, "global", byte_values=np.zeros(3, np.uint8))


def threshold_of(method, number):
    """A whole number from 1 to 12 as a threshold: bytes, or half as many nats."""
    return number if RULES[method].unit == "bytes" else number / 2


@settings(max_examples=200)
@given(
    method=st.sampled_from(CAUSAL),
    halves=st.lists(st.integers(0, 8), min_size=1, max_size=60),
    threshold=st.integers(1, 12),
    low=st.integers(1, 5),
    more=st.one_of(st.none(), st.integers(0, 6)),
    text=st.binary(min_size=60, max_size=60),
)
def test_vectorised_rules_equal_the_loop(method, halves, threshold, low, more, text):
    H = np.array(halves, dtype=np.float32) / 2
    level = threshold_of(method, threshold)
    high = None if more is None else low + more
    text = np.frombuffer(text, np.uint8)[: len(H)]
    options = dict(monotonic_threshold=0.5, min_patch_size=low, max_patch_size=high)
    got = patch_starts(H, method, level, **options, byte_values=text)
    assert got.tolist() == loop_starts(H, method, level, 0.5, low, high, text).tolist()
    # A start depends on what is before it only.
    t = len(H) // 2
    changed_H = H.copy()
    changed_H[t + 1 :] += 3
    changed_text = text.copy()
    changed_text[t:] ^= 255
    again = patch_starts(changed_H, method, level, **options, byte_values=changed_text)
    assert again[: t + 1].tolist() == got[: t + 1].tolist()


@pytest.mark.parametrize("method", CAUSAL)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    threshold=st.integers(1, 12),
    low=st.integers(1, 4),
    more=st.one_of(st.none(), st.integers(0, 6)),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
)
def test_online_form_equals_vectorised_form(method, seed, threshold, low, more, lengths):
    """Each method of the registry, over texts of different lengths side by side, their ends included."""
    high = None if more is None else low + more
    config = PatchConfig(method, threshold_of(method, threshold), 0.3, low, high)
    rng = np.random.default_rng(seed)
    texts = [rng.choice(np.frombuffer(b"ab .\x80\xc3\n1", np.uint8), n) for n in lengths]
    entropies = [rng.gamma(2, 0.5, n + 1).astype(np.float32) for n in lengths]
    online = OnlineStarts(config, len(texts))
    got = [[] for _ in texts]
    for t in range(max(lengths) + 1):
        is_active = np.array([t <= n for n in lengths])
        # What a finished text is given must not matter.
        H = np.array([e[t] if t < len(e) else 9.0 for e in entropies], np.float32)
        last = np.array([text[t - 1] if 0 < t <= len(text) else 65 for text in texts])
        is_start = online.step(H if config.needs_entropies else None, last, is_active)
        for row in np.flatnonzero(is_active):
            got[row].append(bool(is_start[row]))
    for text, H, starts in zip(texts, entropies, got):
        with_end = np.append(text, np.uint8(0))
        assert starts == patch_starts(H, **config.arguments(), byte_values=with_end).tolist()


def test_the_page_has_a_form_of_every_method():
    """The forms themselves are compared in tests/test_patch_page.py."""
    built_in = [rule for rule in RULES.values() if type(rule).__module__ == patch_rules.__name__]
    assert page_methods(PAGE.read_text()) == [[rule.name, rule.unit] for rule in built_in]


@settings(max_examples=50)
@given(
    method=st.sampled_from(CAUSAL),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    low=st.integers(1, 3),
    high=st.sampled_from([None, 4]),
)
def test_documents_in_one_pass_equal_each_alone(method, lengths, low, high):
    rng = np.random.default_rng(len(lengths))
    H = rng.integers(0, 6, sum(lengths)).astype(np.float32)
    text = rng.integers(0, 256, sum(lengths)).astype(np.uint8)
    begins = np.cumsum(lengths) - lengths
    document_starts = np.zeros(len(H), dtype=bool)
    document_starts[begins] = True
    options = dict(min_patch_size=low, max_patch_size=high)
    whole = patch_starts(H, method, 3.0, byte_values=text, document_starts=document_starts, **options)
    alone = [
        patch_starts(H[b : b + n], method, 3.0, byte_values=text[b : b + n], **options) for b, n in zip(begins, lengths)
    ]
    assert whole.tolist() == np.concatenate(alone).tolist()


@pytest.mark.parametrize("method", ["global", "monotonic", "cumulative"])
@pytest.mark.parametrize("target", [2.0, 4.5, 8.0])
def test_threshold_for_patch_size(method, target):
    H = np.random.default_rng(0).gamma(2.0, 0.7, 20_000).astype(np.float32)
    threshold = threshold_for_patch_size(H, method, target)
    assert abs(len(H) / patch_starts(H, method, threshold).sum() - target) < 0.02 * target


@pytest.mark.parametrize("method", ["global", "monotonic"])
def test_repatching_the_sample_takes_under_2_seconds_of_one_core(method):
    """As many cached entropies as the bundled sample has bytes and documents, from float16 to starts."""
    rng = np.random.default_rng(0)
    H = rng.integers(0, 500, 23_519_366 + 13_770).astype(np.float16)
    document_starts = np.zeros(len(H), dtype=bool)
    document_starts[rng.integers(0, len(H), 13_770)] = True
    began = time.process_time()
    patch_starts(H, method, 380.0, document_starts=document_starts)
    assert time.process_time() - began < 2


def test_threshold_errors():
    with pytest.raises(ValueError, match="at least 1 byte"):
        threshold_for_patch_size(np.ones(10), "global", 0.5)
    with pytest.raises(ValueError, match="no threshold"):
        threshold_for_patch_size(np.ones(10), "space", 4)
    with pytest.raises(ValueError, match="it must be one of global, monotonic"):
        threshold_for_patch_size(np.ones(10), "nope", 4)
    with pytest.raises(ValueError, match="not finite"):
        threshold_for_patch_size(np.float32([1, np.nan, 2, 3]), "global", 2)


@pytest.mark.parametrize(
    "method, flags, words",
    [
        ("space", dict(target_patch_size=6.0), "space has no threshold.*leave out target_patch_size"),
        ("bpe", dict(entropy_threshold=2.0), "bpe has no threshold.*leave out entropy_threshold"),
        ("monotonic", dict(monotonic_threshold=1.0), "of method both; leave it out with method monotonic"),
        ("global", dict(target_patch_size=4.0, entropy_threshold=2.0), "not both"),
    ],
)
def test_flags_that_a_method_does_not_use_are_refused(method, flags, words):
    """None may be dropped without a word: by create_patches.py, show_patches.py or a training script."""
    configs = [lambda: CreatePatchesConfig(method=method, **flags)]
    if RULES[method].is_causal:
        configs.append(lambda: ShowPatchesConfig(method=method, **flags))
        if "monotonic_threshold" not in flags:
            configs.append(lambda: TrainingConfig(patch_method=method, **flags))
    for make in configs:
        with pytest.raises(ValueError, match=words):
            make()


def test_advice_about_sizes_fits_the_method(capsys):
    warn_about_sizes(100, 100, 10, PatchConfig("space"))
    warn_about_sizes(100, 100, 10, PatchConfig("global", 1.5))
    space, of_global = capsys.readouterr().out.splitlines()
    assert "choose another --method" in space and "threshold" not in space
    assert "raise the threshold (1.500) or use --target_patch_size 4.5" in of_global


def test_a_threshold_is_of_the_documents_in_use():
    """A cache may have more documents, from a run that asked for more."""

    class Cache:
        train = np.arange(3)
        lengths = np.array([4, 4, 4, 9])
        of_documents = staticmethod(lambda first, end: np.arange(4 * end, dtype=np.float32))

    entropies, is_start = training_sample(Cache(), 2)
    assert len(entropies) == 8 and is_start.tolist() == [True, False, False, False] * 2
    # The fourth document is validation.
    assert len(training_sample(Cache(), 5)[0]) == 12


def test_entropies_that_are_not_finite_are_refused(entropy_model):
    model = copy.deepcopy(entropy_model)
    with torch.no_grad():
        model.head.weight[3] = math.nan
    with pytest.raises(ValueError, match="not finite; compute them in fp32"):
        EntropyPatcher(model, threshold=1.0).create_patches(b"some text")


# Entropies and EntropyPatcher


@pytest.fixture(scope="module")
def entropy_model():
    return tiny_entropy_model(n_layers=2)


def test_entropies_are_about_byte_t_from_what_is_before(entropy_model):
    document = random_bytes(80)
    H = EntropyPatcher(entropy_model).entropies(document)
    assert H.dtype == np.float32 and H.shape == (80,)
    with torch.no_grad():
        logits = entropy_model(torch.tensor([[256, *document.tolist()]]))
    np.testing.assert_allclose(H, entropy_of(logits)[0, :-1].numpy(), atol=1e-5)
    changed = document.copy()
    changed[40] ^= 1
    other = EntropyPatcher(entropy_model).entropies(changed)
    # Entropy 40 is about byte 40, before it is read.
    np.testing.assert_allclose(other[:41], H[:41], atol=1e-6)
    assert abs(other[41] - H[41]) > 1e-6


@pytest.mark.parametrize("n_streams, chunk", [(1, 7), (1, 1000), (3, 16), (8, 33)])
def test_entropies_do_not_depend_on_streams_or_chunks(entropy_model, n_streams, chunk):
    documents = [random_bytes(n, seed=n) for n in (1, 200, 0, 33, 64, 5, 1500)]
    flat = stream_entropies(entropy_model, DocumentStream.of_documents(documents), n_streams, chunk)
    ends = np.cumsum([len(d) + 1 for d in documents])
    for document, H in zip(documents, np.split(flat, ends[:-1])):
        with torch.no_grad():
            logits = entropy_model(torch.tensor([[256, *document.tolist()]]))
        np.testing.assert_allclose(H, entropy_of(logits)[0].numpy(), atol=2e-5)


def test_window_is_respected(entropy_model):
    """Two layers of window 16 see 31 bytes back, the byte itself included, and not one more."""
    ids = torch.from_numpy(random_bytes(100).astype(np.int64))[None]
    changed = ids.clone()
    changed[0, 50] ^= 1
    with torch.no_grad():
        moved = (entropy_model(ids) - entropy_model(changed)).abs().amax(-1)[0] > 1e-7
    assert moved[50] and moved[80] and not moved[81:].any() and not moved[:50].any()


@pytest.mark.parametrize("method", CAUSAL)
def test_patches_concatenate(entropy_model, method):
    config = PatchConfig(method=method, entropy_threshold=5.0, min_patch_size=2, max_patch_size=9)
    patcher = EntropyPatcher(entropy_model, config)
    for document in (b"", b"a", b"\xff\xfe\x00", bytes(random_bytes(300)), "Grüße, 世界".encode()):
        patches = patcher.create_patches(document)
        assert b"".join(patches) == document and all(0 < len(p) <= 9 for p in patches)


def test_input_types(entropy_model):
    patcher = EntropyPatcher(entropy_model, threshold=5.2)
    want = patcher.create_patches(b"abc def \xc3\xa9")
    for same in (
        bytearray(b"abc def \xc3\xa9"),
        "abc def é",
        list(b"abc def \xc3\xa9"),
        np.frombuffer(b"abc def \xc3\xa9", np.uint8),
        torch.tensor(list(b"abc def \xc3\xa9")),
    ):
        assert patcher.create_patches(same) == want
    for bad in ([300], [-1], [[1, 2]], [0.5]):
        with pytest.raises(ValueError, match="byte sequence"):
            patcher.create_patches(bad)


def test_process_data_and_its_cache(entropy_model, tmp_path):
    sequences = [bytes(random_bytes(200, 1)), b"", bytes(random_bytes(50, 2))]
    config = PatchConfig(entropy_threshold=5.05, cache_dir=str(tmp_path))
    patcher = EntropyPatcher(entropy_model, config)
    patches, stats = patcher.process_data(sequences, cache_key="corpus")
    assert [b"".join(p) for p in patches] == sequences
    assert patches == [patcher.create_patches(s) for s in sequences]
    sizes = [len(p) for document in patches for p in document]
    assert stats["total_patches"] == len(sizes) and stats["avg_patch_size"] == pytest.approx(np.mean(sizes))
    assert stats["min_patch_size"] == min(sizes) and stats["max_patch_size"] == max(sizes)
    assert sum(stats["patch_size_histogram"].values()) == len(sizes) and 0 < stats["avg_entropy"] < np.log(256)
    again = EntropyPatcher(entropy_model, config)
    # A second call reads what the first one kept: the model is not asked.
    again.entropy_model.stream = None
    assert again.process_data(sequences, cache_key="corpus") == (patches, stats)
    del again.entropy_model.stream
    with pytest.raises(ValueError, match="another sequences|delete it"):
        patcher.process_data(sequences[:1], cache_key="corpus")
    other = tiny_entropy_model(seed=1, n_layers=2)
    with pytest.raises(ValueError, match="another entropy model"):
        EntropyPatcher(other, config).process_data(sequences, cache_key="corpus")


def test_analysis(entropy_model):
    stats = analyze_entropy_distribution(entropy_model, [b"hello world", bytes(random_bytes(100))])
    percentiles = stats["percentiles"]
    assert stats["min"] <= percentiles[5] <= percentiles[50] <= percentiles[99] <= stats["max"]
    assert stats["min"] < stats["mean"] < stats["max"] and stats["std"] > 0


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(method="greedy"), "method is 'greedy'"),
        (dict(min_patch_size=0), "min_patch_size is 0"),
        (dict(min_patch_size=5, max_patch_size=4), "max_patch_size is 4"),
        (dict(method="static", entropy_threshold=0.5), "1 or more bytes"),
        (dict(entropy_threshold=float("nan")), "finite"),
    ],
    ids=str,
)
def test_config_errors(bad, words):
    with pytest.raises(ValueError, match=words):
        PatchConfig(**bad)


def test_a_method_of_entropies_needs_a_model():
    with pytest.raises(ValueError, match="entropy_llm.py"):
        EntropyPatcher(None, threshold=0.6)


def test_bpe_tokens_as_patches(tmp_path):
    documents = [np.frombuffer(b"the cat sat on the mat. the dog sat too. \xff\xc3\xa9" * 20, np.uint8)]
    train_tokenizer(documents, 300, tmp_path / "tokenizer.json")
    patcher = EntropyPatcher(None, PatchConfig(method="bpe", tokenizer_path=str(tmp_path / "tokenizer.json")))
    patches = patcher.create_patches(b"the cat \xff\x00 sat")
    assert b"".join(patches) == b"the cat \xff\x00 sat" and b" cat" in patches and not patcher.is_causal
    with pytest.raises(FileNotFoundError, match="--method bpe"):
        EntropyPatcher(None, PatchConfig(method="bpe", tokenizer_path=str(tmp_path / "none.json")))


def test_patch_sizes():
    assert patch_sizes(np.array([True, False, True, True])).tolist() == [2, 1, 1]
    assert patch_sizes(np.zeros(0, bool)).tolist() == []
