"""A corpus of many files that is larger than the memory it may take: build, rows, the three scripts.

BLT_BIG_MB says how large (default 300). By hand, for the figures of docs/entropy_llm.md:

    BLT_BIG_MB=5000 python -m pytest tests/test_big_data.py -s

Each step runs in a process of its own, whose peak is printed. It counts all resident pages, those of
memory maps too.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import BLT_FLAGS, ENTROPY_FLAGS, ROOT

import blt.rows
from blt.rows import BitArray, DocumentStream, evaluation_batches

SIZE = int(os.environ.get("BLT_BIG_MB", 300)) * 10**6
FILES = 10
# A process that imports torch has 250 MB; each step may take this much beside it, and a little with the size.
LIMIT_MB = 600 + SIZE // 10**6 // 5
REPORT = """
import atexit
def report():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    print("PEAK", int(lines["VmHWM"].split()[0]) // 1000, "MB", flush=True)
atexit.register(report)
"""


@pytest.mark.parametrize("n_pieces", [0, 1, 7])
def test_bit_array_is_what_was_appended(n_pieces):
    """Pieces of any length, read in slices of any place, also after the end."""
    rng = np.random.default_rng(n_pieces)
    flags = BitArray()
    pieces = [rng.random(length) < 0.5 for length in rng.integers(0, 40, n_pieces)]
    for piece in pieces:
        flags.append(piece)
    flags.close()
    whole = np.concatenate([*pieces, np.zeros(0, bool)])
    assert len(flags) == len(whole)
    padded = np.concatenate((whole, np.zeros(50, bool)))
    for begin in range(0, len(whole), 3):
        for end in range(begin, len(whole) + 20, 5):
            assert np.array_equal(flags.read(begin, end), padded[begin:end])


def test_pages_that_are_given_back_are_read_again(tmp_path, monkeypatch):
    """A stream over a memory map gives the same ids, however often it lets go of the map's pages."""
    content = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8)
    content.tofile(tmp_path / "bytes.bin")
    lengths = np.array([100_000, 1, 199_999])
    offsets = np.cumsum(lengths) - lengths
    mapped = DocumentStream(np.memmap(tmp_path / "bytes.bin", dtype=np.uint8, mode="r"), offsets, lengths)
    plain = DocumentStream(content, offsets, lengths)
    monkeypatch.setattr(blt.rows, "MAPPED_BYTES", 1)
    for begin in range(0, 300_000, 7_001):
        assert np.array_equal(mapped.ids(begin, begin + 9_000), plain.ids(begin, begin + 9_000))


def test_memory_of_evaluation_follows_the_text_and_not_the_setting():
    documents = [np.arange(100, dtype=np.uint8), np.arange(70_000, dtype=np.uint8)]
    (batch,) = evaluation_batches(documents, None, row_bytes=10**12)
    # Both documents are in one row, each scored with its end.
    assert batch.ids.shape == (1, 70_102 + 1)
    assert batch.targets == 70_102 and batch.bytes == 70_100
    # A row that models are compiled for keeps its shape.
    (batch,) = evaluation_batches(documents[:1], None, row_bytes=4096)
    assert batch.ids.shape == (1, 4097)


# ---- The large corpus


def some_lines(rng, size):
    """Random words, about `size` bytes."""
    # Words of a block are shuffled, which takes far less time than new ones.
    words = [f"{rng.randrange(10**6)}" for _ in range(2000)]
    text = []
    total = 0
    while total < size:
        rng.shuffle(words)
        block = " ".join(words)
        text.append(block)
        total += len(block) + 1
    return text


def write_file(path, rng, size):
    """One file of documents of 500 bytes to 14 kB, in the format of its extension."""
    texts = []
    for block in some_lines(rng, size):
        cut = rng.randrange(500, 3000)
        texts += [block[:cut], block[cut:]]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if path.suffix == ".zst":
            lines = pyarrow.compress(lines, codec="zstd", asbytes=True)
        path.write_bytes(lines)


def peak_of(folder, code, *arguments):
    """Run code in a process of its own: (what it printed, its peak in MB)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REPORT + code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    printed, _, peak = done.stdout.rpartition("PEAK ")
    return printed, int(peak.split()[0])


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A folder with FILES files of SIZE bytes in all, and the peak of building the store."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("only Linux says how much memory a process took at most")
    folder = tmp_path_factory.mktemp("big")
    (folder / "in").mkdir()
    for number in range(FILES):
        extension = ("jsonl", "parquet", "txt", "jsonl.zst")[number % 4]
        write_file(folder / "in" / f"{number}.{extension}", random.Random(number), SIZE // FILES)
    printed, peak = peak_of(folder, "from blt.corpus import open_corpus; open_corpus('in', val_fraction=0.01)")
    print(f"\n{SIZE / 1e6:,.0f} MB: build {peak} MB |", re.search(r"built .*?: (.*)", printed)[1])
    yield folder, peak
    # pytest keeps the folders of three runs.
    shutil.rmtree(folder)


ROWS = """
import sys, numpy as np
from blt.corpus import open_corpus
from blt.training_patches import training_starts
from blt.patch_rules import PatchConfig
from blt.rows import DocumentStream, TrainingRows, evaluation_batches
corpus = open_corpus("in", val_fraction=0.01)
train = corpus.documents("train")
stream = DocumentStream.of_corpus(corpus, train)
config = PatchConfig(method="space")
rows = TrainingRows(stream, 1024, training_starts(corpus, train, config))
scored = 0
for position in range(200):
    scored += rows.shuffled_batch(position, 16, seed=1).bytes
# The end of an epoch and the beginning of the next: two orders are in memory.
scored += rows.shuffled_batch(len(rows) // 16, 16, seed=1).bytes
documents = [corpus.document(number) for number in corpus.documents("validation", 1_000_000)]
held_out = sum(batch.bytes for batch in evaluation_batches(documents, None, 4096, 8))
assert held_out == sum(len(document) for document in documents)
# One pass over all of the text, in the order of the stream.
total = sum(int((stream.ids(at, min(at + 2**22, len(stream))) < 256).sum()) for at in range(0, len(stream), 2**22))
assert total == stream.total_bytes
print(f"{len(rows):,} rows, {len(corpus):,} documents")
"""
CHECK = """
import glob
from blt.corpus import check_store
(folder,) = glob.glob("data_cache/in-*")
print(check_store(folder)["bytes"])
"""
SCRIPT = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.mark.slow
def test_build(big):
    assert big[1] < LIMIT_MB


@pytest.mark.slow
def test_rows(big):
    printed, peak = peak_of(big[0], ROWS)
    print(f"\nrows and one pass over the text {peak} MB | {printed.strip()}")
    assert peak < LIMIT_MB


@pytest.mark.slow
def test_check(big):
    printed, peak = peak_of(big[0], CHECK)
    print(f"\ncheck_store {peak} MB")
    assert int(printed) > 0.9 * SIZE and peak < LIMIT_MB


@pytest.mark.slow
def test_three_scripts(big):
    corpus = ["--dataset", "in", "--val_fraction", "0.01"]
    steps = ["--steps", "2", "--eval_every", "2"]
    for script, flags in (
        ("entropy_llm", [*ENTROPY_FLAGS, *steps]),
        ("create_patches", ["--device", "cpu", "--max_bytes", "300000", "--val_bytes", "20000"]),
        ("llm", [*BLT_FLAGS, *steps]),
    ):
        _, peak = peak_of(big[0], SCRIPT, ROOT / f"{script}.py", *flags, *corpus)
        print(f"\n{script}.py {peak} MB")
        assert peak < max(LIMIT_MB, 1000)
