"""Lossless round trips, code sizes as the model reports them, no file that grows, files refused."""

import gzip
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import error_of, write_blt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_incremental import TEXT, model_of, patcher_of

import compress
from blt.metric import bits_per_byte, target_losses
from blt.patch_rules import PatchConfig
from blt.rows import evaluation_batches
from compress import HEADER, CompressConfig, Header, decode, decompress, encode, read_header, stream_ranges
from entropy_patcher import EntropyPatcher

NOISE = np.random.default_rng(0).integers(0, 256, 700).astype(np.uint8).tobytes()
FILES = {
    "empty": b"",
    "one byte": b"\xff",
    "text": TEXT[:500],
    "program": Path(__file__).read_bytes()[:600],
    "noise": NOISE,
    "all bytes": bytes(range(256)),
    "gzip": gzip.compress(TEXT),
}


def train(model, patcher, data, steps):
    """Let a model learn these bytes by heart."""
    (batch,) = evaluation_batches([np.frombuffer(data, np.uint8)], [patcher.starts(data)], 512)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = target_losses(model, batch)[0].sum() / batch.targets
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    """(model, patcher) that predict TEXT well, and no other text."""
    patcher = patcher_of("global")
    return train(model_of(), patcher, TEXT[:500], 40), patcher


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("streams", [1, 7])
def test_what_is_compressed_is_restored(trained, name, streams):
    data = FILES[name]
    made, bits = compress.compress(data, *trained, streams, context_bytes=256)
    assert decompress(made, *trained) == data
    assert len(made) <= len(data) + HEADER.size
    content = made[HEADER.size :]
    if name == "text":
        assert not read_header(made).is_stored
        assert bits < 4 * len(data)
        assert bits / 8 * 0.995 <= len(content) <= bits / 8 * 1.005 + 12
    else:
        assert read_header(made).is_stored
        assert content == data
        # The bits are still those of the model, which would have needed more than the file has.
        n_streams = max(1, min(streams, len(data)))
        assert bits == encode(*trained, data, n_streams, 256)[1]
        assert bits + 32 >= 8 * len(data)


@pytest.mark.parametrize("patching", ["global", "monotonic", "cumulative", "static", "space", "limits"])
def test_the_size_is_the_bits_per_byte_that_are_reported(patching):
    """Also for documents longer than a row. bits_per_byte uses full passes, so it is other code."""
    model = model_of()
    patcher = patcher_of(patching)
    data = TEXT[:1700]
    code, _ = encode(model, patcher, data, 1, context_bytes=512)
    reported = bits_per_byte(model, patcher, [data], row_bytes=512)
    assert abs(8 * len(code) / len(data) - reported) < 0.005 * reported


def test_a_model_that_knows_the_text_makes_small_files():
    """A model trained on the bytes codes them in far fewer bits than an untrained one."""
    model = model_of(window=12)
    patcher = EntropyPatcher(None, PatchConfig("static", 4.0))
    data = b"abcdefgh" * 60
    before, _ = encode(model, patcher, data, 1, 512)
    train(model, patcher, data, 60)
    after, _ = compress.compress(data, model, patcher, 1, 512)
    assert len(after) < len(before) / 8
    assert decompress(after, model, patcher) == data


@given(st.integers(0, 100), st.integers(1, 20))
def test_stream_ranges_cover_the_bytes(n_bytes, n_streams):
    begins, lengths = stream_ranges(n_bytes, n_streams)
    ends = begins + lengths
    assert begins[0] == 0
    assert lengths.sum() == n_bytes
    assert (begins[1:] == ends[:-1]).all()
    assert lengths.max() - lengths.min() <= 1
    assert (np.diff(lengths) <= 0).all()


@settings(max_examples=8, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 5))
def test_any_bytes(data, streams):
    """The code of any bytes restores them, and their file is at most a header larger."""
    model = model_of()
    patcher = patcher_of("both")
    made, _ = compress.compress(data, model, patcher, streams, 64)
    assert decompress(made, model, patcher) == data
    assert len(made) <= len(data) + HEADER.size
    n_streams = max(1, min(streams, len(data)))
    code, _ = encode(model, patcher, data, n_streams, 64)
    assert decode(model, patcher, code, len(data), n_streams, 64) == data


def flip_each_byte(made, end):
    """Copies of a file, each with one other byte of the first `end` flipped."""
    for position in range(end):
        flipped = bytearray(made)
        flipped[position] ^= 0xFF
        yield bytes(flipped)


def test_other_files_are_refused(trained):
    model, patcher = trained
    made, _ = compress.compress(TEXT[:60], model, patcher, 1, 64)
    assert not read_header(made).is_stored

    other_model = model_of()
    other_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        other_model.head.weight[0, 0] += 1e-3
    other_config = PatchConfig("global", patcher.config.entropy_threshold + 0.01)
    other_patcher = EntropyPatcher(patcher.entropy_model, other_config)
    for wrong in ((other_model, patcher), (model, other_patcher)):
        with pytest.raises(ValueError, match="another model, entropy model or patch rule"):
            decompress(made, *wrong)

    for damaged in (b"", made[:20], b"XXXX" + made[4:], made[:-1]):
        with pytest.raises(ValueError, match="no file that compress.py wrote"):
            decompress(damaged, model, patcher)
    # Whichever byte is wrong, in the header or in the code. The last word may hold unused bits.
    for flipped in flip_each_byte(made, len(made) - 4):
        with pytest.raises(ValueError, match="damaged|does not fit"):
            decompress(flipped, model, patcher)


def test_a_stored_file_needs_no_model_and_is_checked(monkeypatch):
    made, _ = compress.compress(NOISE[:50], model_of(), patcher_of("global"), 1, 64)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert decompress(made, None, None) == NOISE[:50]
    for damaged in (made[: HEADER.size], made[:-1], made + b"x", made[:-1] + b"xy"):
        with pytest.raises(ValueError, match="no file that compress.py wrote"):
            decompress(damaged, None, None)
    for flipped in flip_each_byte(made, len(made)):
        with pytest.raises(ValueError, match="damaged"):
            decompress(flipped, None, None)


@pytest.mark.parametrize("name", ["BLT1", "BLT2"])
def test_the_formats_before_get_an_error_that_names_them(name):
    with pytest.raises(ValueError, match=f"format {name}.*restore it with the version that wrote it"):
        decompress(name.encode() + bytes(36), None, None)


def test_a_header_is_read_as_it_was_written():
    header = Header(False, 10**12, 2**32 - 1, 65535, 4096, 3, b"modelmod", b"mach")
    assert read_header(header.pack()) == header
    assert len(header.pack()) == HEADER.size


def test_another_machine_is_refused(trained, monkeypatch):
    made, _ = compress.compress(TEXT[:60], *trained, 1, 64)
    monkeypatch.setattr(torch, "__version__", "9.9")
    with pytest.raises(ValueError, match="another kind of machine"):
        decompress(made, *trained)


def test_improbable_bytes_cost_at_most_20_bits():
    model = model_of()
    patcher = patcher_of("space")
    # A model that is sure of every byte, and wrong.
    with torch.no_grad():
        model.head.weight.mul_(1000)
    code, bits = encode(model, patcher, b"hello there", 1, 64)
    assert bits <= 12 * 20.01
    assert abs(8 * len(code) - bits) <= 64


@pytest.fixture
def folder(tmp_path, trained, monkeypatch):
    """A folder with a trained model in checkpoints/, a text, and noise."""
    model, patcher = trained
    write_blt(tmp_path / "checkpoints", model, patcher.config, patcher.entropy_model, row_bytes=128)
    (tmp_path / "a.txt").write_bytes(TEXT[:400])
    (tmp_path / "noise").write_bytes(NOISE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_script_compresses_and_restores(folder, capsys):
    compress.main(CompressConfig(file="a.txt", streams=3))
    out = capsys.readouterr().out
    assert "3 streams side by side cost" in out
    assert "restored and compared" in out
    assert "stored as it is" not in out
    assert "next: python compress.py --decompress a.txt.blt --model checkpoints" in out
    with pytest.raises(ValueError, match="a.txt exists"):
        compress.main(CompressConfig(decompress="a.txt.blt"))
    compress.main(CompressConfig(decompress="a.txt.blt", output="b.txt"))
    assert (folder / "b.txt").read_bytes() == TEXT[:400]
    assert "checksum right" in capsys.readouterr().out
    with pytest.raises(ValueError, match="pass either"):
        CompressConfig()
    with pytest.raises(FileNotFoundError, match="none.txt not found"):
        compress.main(CompressConfig(file="none.txt"))


def test_the_script_stores_what_it_cannot_compress(folder, trained, capsys):
    compress.main(CompressConfig(file="noise"))
    size = (folder / "noise.blt").stat().st_size
    assert size == len(NOISE) + HEADER.size
    out = capsys.readouterr().out
    on_disk = 8 * size / len(NOISE)
    assert f"{on_disk:.4f} bits per byte on disk" in out
    assert "stored as it is" in out
    assert "restored and compared" in out
    by_the_model = encode(*trained, NOISE, 1, 128)[1] / len(NOISE)
    assert f", {by_the_model:.4f} by the model's probabilities" in out
    assert by_the_model > 8

    # A stored file is restored without a model; a compressed one is not.
    compress.main(CompressConfig(file="a.txt"))
    shutil.rmtree(folder / "checkpoints")
    compress.main(CompressConfig(decompress="noise.blt", output="same"))
    assert (folder / "same").read_bytes() == NOISE
    assert "no model used" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="python llm.py"):
        compress.main(CompressConfig(decompress="a.txt.blt", output="other"))


def test_a_mistake_is_one_line(folder):
    (folder / "broken.blt").write_bytes(b"BLT3" + bytes(50))
    line = error_of(folder, "compress", "--decompress", "broken.blt", "--output", "x")
    assert "it is damaged" in line


def test_a_gpu_without_the_kernels_is_refused(monkeypatch):
    """Its sums over a patch's bytes would have no fixed order: what it writes might not be restored."""
    weight = SimpleNamespace(device=torch.device("cuda"))
    on_gpu = SimpleNamespace(parameters=lambda: iter([weight]))
    monkeypatch.setattr("compress.what_triton_lacks", lambda: "the package triton")
    with pytest.raises(ValueError, match="needs the package triton; install it, or use --device cpu"):
        compress.compress(b"some text", on_gpu, None, 1, 64)
