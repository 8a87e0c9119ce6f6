"""Hostile compressed files: random, cut, flipped, too long, with lying headers: one error, soon, in little memory."""

import dataclasses
import resource
import time
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import tiny_blt, tiny_entropy_model

from compress import HEADER, MAGIC, Header, compress, decompress, read_header
from entropy_patcher import EntropyPatcher, PatchConfig

TEXT = b"the cat sat on the mat and the dog ate the food. " * 3


@pytest.fixture(scope="module")
def models():
    """A BLT that knows one byte well, so that its codes are small, and its patcher."""
    model = tiny_blt()
    with torch.no_grad():
        # All logits are those of the newest byte's class or near it.
        model.head.weight.mul_(8)
    return model, EntropyPatcher(tiny_entropy_model(), PatchConfig("global", 5.0))


@pytest.fixture(scope="module")
def coded(models):
    """A coded file that `decompress` would restore: its header, and its code."""
    made, _ = compress(TEXT, *models, 2, 64)
    if read_header(made).is_stored:
        # The model cannot predict English, so the text is what the model itself writes.
        from generate import generate

        text = generate(*models, b"t", 80, temperature=0.5, context_bytes=64)
        made, _ = compress(text, *models, 2, 64)
    header = read_header(made)
    assert not header.is_stored
    return header, made[HEADER.size :]


NUMBERS = [0, 1, 2, 3, 255, 4096, 4097, 65535, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
LIMITS = {"n_bytes": 2**64, "n_streams": 2**16, "context_bytes": 2**32, "threads": 2**16, "checksum": 2**32}


def hostile_file(random, header, code):
    """A file made from a good one by one of eight kinds of damage."""
    good = header.pack(code) + code
    kind = random.integers(8)
    if kind == 0:
        return random.bytes(int(random.integers(0, 200)))
    if kind == 1:
        return MAGIC + random.bytes(int(random.integers(0, 200)))
    if kind == 2:
        return good[: random.integers(0, len(good))]
    if kind == 3:
        return good + random.bytes(int(random.integers(1, 40)))
    if kind == 4:
        damaged = bytearray(good)
        for _ in range(random.integers(1, 4)):
            damaged[random.integers(len(good))] ^= 1 << random.integers(8)
        return bytes(damaged)
    # The other kinds have the right checksum over their header: somebody wants them to be read.
    if kind == 5:
        name = random.choice(list(LIMITS))
        value = int(random.choice(np.array(NUMBERS, dtype=object))) % LIMITS[name]
        # A few threads more are possible, and on a busy machine they take seconds: that is no hang.
        if name == "threads" and value in (2, 3):
            value = 255
        header = dataclasses.replace(header, **{name: value})
    elif kind == 6:
        code = random.bytes(4 * int(random.integers(0, 30)))
    else:
        code = code[: 4 * random.integers(0, len(code) // 4)] + random.bytes(4 * int(random.integers(0, 3)))
    return header.pack(code) + code


@pytest.mark.parametrize("cases", [range(60), pytest.param(range(60, 260), marks=pytest.mark.slow)], ids=len)
def test_hostile_files(models, coded, cases):
    header, code = coded
    good = decompress(header.pack(code) + code, *models)
    # In kilobytes, the most that this process has ever used.
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        data = hostile_file(np.random.default_rng(case), header, code)
        started = time.perf_counter()
        try:
            restored = decompress(data, *models)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
        else:
            # Some changes change nothing: another number of threads, a number that was the right one.
            assert restored == good, case
        assert time.perf_counter() - started < 5, case
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak - peak_before < 200e3


@pytest.mark.parametrize("n_more", [1, 3, 4, 8, 100])
def test_a_tail_is_noticed_before_anything_is_decoded(coded, n_more):
    header, code = coded
    with pytest.raises(ValueError, match="damaged or too long"):
        read_header(header.pack(code) + code + bytes(n_more))
    stored = Header(True, 5, 0)
    with pytest.raises(ValueError, match="damaged or too long"):
        read_header(stored.pack(b"hello") + b"hello" + bytes(n_more))


def test_a_header_that_claims_more_than_the_code_holds(models, coded):
    header, code = coded
    for n_bytes in (2**64 - 1, 10**12, 10**7):
        liar = dataclasses.replace(header, n_bytes=n_bytes)
        with pytest.raises(ValueError, match="more bytes than its code can"):
            decompress(liar.pack(code) + code, *models)


def test_a_machine_that_computes_otherwise_is_noticed_before_decoding(models, coded, monkeypatch):
    """Another code path of a library: the same torch on the same processor, other last digits."""
    header, code = coded
    model, patcher = models
    logits_of = type(model.head).forward

    def other_forward(self, x):
        return logits_of(self, x) * (1 + 1e-6)

    monkeypatch.setattr(type(model.head), "forward", other_forward)
    decoded = []
    monkeypatch.setattr("compress.decode", lambda *arguments: decoded.append(1))
    with pytest.raises(ValueError, match="another kind of machine"):
        decompress(header.pack(code) + code, model, patcher)
    assert not decoded


def test_a_context_of_4_billion_takes_no_memory(models):
    model, patcher = models
    tracemalloc.start()
    made, _ = compress(TEXT, model, patcher, 1, 2**32 - 1)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert decompress(made, model, patcher) == TEXT
