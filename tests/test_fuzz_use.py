"""Random bytes through generation and compression: prompts are read as they are, files are restored exactly.

BLT_FUZZ_CASES=10000 pytest tests/test_fuzz_use.py runs that many cases of each in place of 100.
"""

import os

import numpy as np
import pytest
import torch
from helpers import tiny_blt, tiny_entropy_model

from blt.ids import BOUNDARY
from blt.patch_rules import RULES, PatchConfig, causal_methods
from blt.sampling import SamplingConfig
from compress import compress, decode, decompress, encode, read_header
from entropy_patcher import EntropyPatcher
from generate import Generator, generate

CASES = int(os.environ.get("BLT_FUZZ_CASES", 100))
# Prompts that are continued side by side.
BATCH = 20
# What a decoder of UTF-8 stumbles over: parts of characters, surrogates, numbers that are too large, too long forms.
INVALID = b"\x80 \xbf\xc3 \xe2\x82 \xed\xa0\x80\xf4\x90\x80\x80\xc0\x80\xff\xfe\x00\xf0\x9f\x98 \xef\xbb\xbf"


def random_text(rng):
    """0 to 300 bytes: all values, runs of one byte, text, or invalid UTF-8."""
    length = int(rng.integers(301)) if rng.random() < 0.5 else int(rng.choice([0, 1, 2, 15, 16, 17, 300]))
    kind = rng.integers(4)
    if kind == 0:
        return rng.bytes(length)
    if kind == 1:
        # Runs of up to 80 bytes.
        runs = [bytes([rng.integers(256)]) * int(rng.integers(1, 81)) for _ in range(length)]
        return b"".join(runs)[:length]
    source = INVALID if kind == 2 else "Grüße, 世界. \r\n\t0 the cat".encode()
    begin = int(rng.integers(len(source)))
    return (source * 20)[begin : begin + length]


def random_rule(rng):
    """Any rule by which a BLT can be trained."""
    method = str(rng.choice(causal_methods()))
    # Entropies of an untrained model are about ln 256; thresholds are below, above and among them.
    threshold = float(rng.integers(1, 9)) if RULES[method].unit == "bytes" else float(rng.uniform(5.3, 5.7))
    return PatchConfig(method, threshold, max_patch_size=None if rng.random() < 0.5 else int(rng.integers(1, 20)))


@pytest.fixture(scope="module")
def models():
    model = tiny_blt().eval()
    with torch.no_grad():
        # Logits far apart, so that what the model itself writes has a short code.
        model.head.weight.mul_(8)
    return model, tiny_entropy_model()


def test_the_cases_hold_every_byte():
    """The texts of the cases below hold all byte values, and lengths from 0 to 300."""
    texts = [random_text(np.random.default_rng(case)) for case in range(100)]
    assert set(b"".join(texts)) == set(range(256))
    assert {0, 1, 16} <= {len(text) for text in texts} and max(map(len, texts)) > 250


def test_random_prompts_are_continued(models):
    model, entropy_model = models
    for first in range(0, CASES, BATCH):
        rng = np.random.default_rng(first)
        prompts = [random_text(np.random.default_rng(first + row)) for row in range(BATCH)]
        rule = random_rule(rng)
        patcher = EntropyPatcher(entropy_model, rule)
        needs_entropies = RULES[rule.method].needs_entropies
        options = dict(
            temperature=float(rng.choice([0.0, 0.7, 5.0])),
            top_k=None if rng.random() < 0.7 else int(rng.integers(1, 300)),
            no_repeat_bytes=None if rng.random() < 0.8 else 3,
            context_bytes=None if rng.random() < 0.5 else int(rng.integers(2, 64)),
            seed=first,
        )
        drafts = dict(draft_bytes=3, draft_confidence=0.0) if needs_entropies and rng.random() < 0.5 else {}
        new_bytes = int(rng.integers(1, 5))
        generator = Generator(model, patcher, prompts, new_bytes, SamplingConfig(**options), **drafts)
        read = []
        prefill = generator.reader.prefill
        # What the models read is the boundary and the prompt, nothing else.
        generator.reader.prefill = lambda texts: read.extend(texts) or prefill(texts)
        for _ in generator.steps():
            pass
        for prompt, ids, sampler in zip(prompts, read, generator.samplers, strict=True):
            assert ids.tolist() == [BOUNDARY, *prompt]
            # The text begins with the prompt as it was; what follows are bytes.
            assert bytes(sampler.text[: len(prompt)]) == prompt
            new = sampler.final_bytes()
            assert bytes(sampler.text) == prompt + new and len(new) <= new_bytes
            assert sampler.is_over
        # A prompt alone is continued as in the batch.
        row = int(rng.integers(BATCH))
        alone = generate(model, patcher, prompts[row], new_bytes, **options | {"seed": first + row}, **drafts)
        assert alone == generator.samplers[row].final_bytes(), first


def test_random_bytes_are_restored(models):
    for case in range(CASES):
        check_restored(case, *models)


def check_restored(case, model, entropy_model):
    rng = np.random.default_rng(case)
    data = random_text(rng)
    patcher = EntropyPatcher(entropy_model, random_rule(rng))
    # Enough streams that most cases take few steps; some short files have one.
    is_in_one = len(data) < 20 and case % 10 == 0
    n_streams = 1 if is_in_one else max(1, len(data) // int(rng.integers(1, 4)))
    context_bytes = int(rng.integers(2, 64))
    # The code itself, also where a file would be stored.
    code, bits = encode(model, patcher, data, n_streams, context_bytes)
    assert decode(model, patcher, code, len(data), n_streams, context_bytes) == data, case
    assert np.isfinite(bits)
    # As files, with header and checks.
    if case % 20 == 0:
        made, _ = compress(data, model, patcher, n_streams, context_bytes)
        assert len(made) <= len(data) + 41 and decompress(made, model, patcher) == data, case


def test_a_file_that_the_model_knows_is_coded_and_restored(models):
    """What the model writes has a short code: these files are not stored."""
    model, entropy_model = models
    patcher = EntropyPatcher(entropy_model, PatchConfig("global", 5.5))
    coded = 0
    for case in range(max(2, CASES // 500)):
        data = generate(model, patcher, random_text(np.random.default_rng(case)), 50, context_bytes=64)
        made, _ = compress(data, model, patcher, 1, 64)
        coded += not read_header(made).is_stored
        assert decompress(made, model, patcher) == data
    assert coded
