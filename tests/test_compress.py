"""Lossless round trips; the file's size is the number of bits that the model reports; files of others are refused."""

import gzip
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_incremental import TEXT, model_of, patcher_of

import compress
from blt.files import save_weights, write_json
from blt.metric import bits_per_byte
from blt.patch_rules import PatchConfig
from compress import HEADER, decompress, encode, pieces
from entropy_patcher import EntropyPatcher

BINARY = np.random.default_rng(0).integers(0, 256, 700).astype(np.uint8).tobytes()
FILES = {
    "empty": b"",
    "one byte": b"\xff",
    "text": TEXT[:500],
    "code": Path(__file__).read_bytes()[:600],
    "binary": BINARY,
    "zeros": bytes(300),
    "gzip": gzip.compress(TEXT),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("streams", [1, 7])
def test_what_is_compressed_is_restored(name, streams):
    data, (model, patcher) = FILES[name], (model_of(), patcher_of("global"))
    streams = max(1, min(streams, len(data)))
    made, bits = compress.compress(data, model, patcher, streams, context_bytes=256)
    assert decompress(made, model, patcher) == data
    assert bits / 8 * 0.995 <= len(made) - HEADER.size <= bits / 8 * 1.005 + 12


@pytest.mark.parametrize("rule", ["global", "monotonic", "cumulative", "static", "space", "limits"])
def test_the_size_is_the_bits_per_byte_that_are_reported(rule):
    """Also for documents longer than a row of the model, in its own process of coding: not by the same lines of code."""
    model, patcher, data = model_of(), patcher_of(rule), TEXT[:1700]
    made, _ = compress.compress(data, model, patcher, 1, context_bytes=512)
    reported = bits_per_byte(model, patcher, [data], row_bytes=512)
    assert abs(8 * (len(made) - HEADER.size) / len(data) - reported) < 0.005 * reported


def test_a_model_that_knows_the_text_makes_small_files():
    """Not an identity: a model trained on the bytes codes them in far fewer bits than one that was not."""
    model, patcher, data = model_of(window=12), EntropyPatcher(None, PatchConfig("static", 4.0)), b"abcdefgh" * 60
    before = len(compress.compress(data, model, patcher, 1, 512)[0])
    from blt.metric import target_losses
    from blt.rows import evaluation_batches

    (batch,) = evaluation_batches([np.frombuffer(data, np.uint8)], [patcher.starts(data)], 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (target_losses(model.train(), batch)[0].sum() / batch.targets).backward()
        optimizer.step()
    after, _ = compress.compress(data, model.eval(), patcher, 1, 512)
    assert len(after) < before / 8 and decompress(after, model, patcher) == data


@given(st.integers(0, 100), st.integers(1, 20))
def test_pieces_cover_the_bytes(n_bytes, n_streams):
    begins, lengths = pieces(n_bytes, n_streams)
    assert begins[0] == 0 and lengths.sum() == n_bytes and (begins[1:] == (begins + lengths)[:-1]).all()
    assert lengths.max() - lengths.min() <= 1 and (np.diff(lengths) <= 0).all()


@settings(max_examples=8, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 5))
def test_any_bytes(data, streams):
    model, patcher = model_of(), patcher_of("both")
    made, _ = compress.compress(data, model, patcher, min(streams, max(1, len(data))), 64)
    assert decompress(made, model, patcher) == data


def test_other_files_are_refused():
    model, patcher = model_of(), patcher_of("global")
    made, _ = compress.compress(b"some text", model, patcher, 1, 64)
    other = model_of()
    with torch.no_grad():
        other.head.weight[0, 0] += 1e-3
    threshold = EntropyPatcher(patcher.entropy_model, PatchConfig("global", patcher.config.entropy_threshold + 0.01))
    for wrong in ((other, patcher), (model, threshold)):
        with pytest.raises(ValueError, match="another model, entropy model or patch rule"):
            decompress(made, *wrong)
    for damaged in (b"", made[:20], b"XXXX" + made[4:], made[:-1]):
        with pytest.raises(ValueError, match="no file that compress.py wrote"):
            decompress(damaged, model, patcher)
    for place in range(
        len(made) - 4
    ):  # whichever byte is wrong, in the header or in the code (its last word may hold bits that say nothing)
        flipped = bytearray(made)
        flipped[place] ^= 0xFF
        with pytest.raises(ValueError, match="damaged|does not fit"):
            decompress(bytes(flipped), model, patcher)


def test_another_machine_is_refused(monkeypatch):
    model, patcher = model_of(), patcher_of("global")
    made, _ = compress.compress(b"some text", model, patcher, 1, 64)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ValueError, match="another kind of machine"):
        decompress(made, model, patcher)


def test_improbable_bytes_cost_at_most_20_bits():
    model, patcher = model_of(), patcher_of("space")
    with torch.no_grad():
        model.head.weight.mul_(1000)  # sure of everything, and wrong
    code, bits = encode(model, patcher, b"hello there", 1, 64)
    assert bits <= 12 * 20.01 and abs(8 * len(code) - bits) <= 64


def test_the_script_compresses_and_restores(tmp_path):
    write_json(
        tmp_path / "checkpoints" / "model.json",
        {
            "model_config": asdict(model_of().config),
            "patch_config": asdict(PatchConfig("space")),
            "precision": "fp32",
            "settings": {"row_bytes": 128},
        },
    )
    save_weights(tmp_path / "checkpoints" / "best.pt", model_of())
    (tmp_path / "a.txt").write_bytes(TEXT[:400])
    script = Path(__file__).parent.parent / "compress.py"
    run = lambda *arguments: subprocess.run(
        [sys.executable, script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )  # noqa: E731
    made = run("a.txt", "--streams", "3")
    assert made.returncode == 0, made.stderr
    assert "3 streams side by side cost" in made.stdout and "restored and compared" in made.stdout
    refused = run("--decompress", "a.txt.blt")
    assert refused.returncode == 1 and "a.txt exists" in refused.stderr
    back = run("--decompress", "a.txt.blt", "--output", "b.txt")
    assert back.returncode == 0 and (tmp_path / "b.txt").read_bytes() == TEXT[:400], back.stderr
    assert "pass either" in run().stderr and "not found" in run("none.txt").stderr
