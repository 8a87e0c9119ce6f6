"""Compress and restore 100 files, in a folder with a trained model:  python round_trips.py CHECKPOINTS [LARGE DATA_CACHE]

Text, source code, binary, empty, one byte (LARGE, if not 0: instead one text of so many bytes, in 256 streams); what is printed is the file's size against the bits of the model's probabilities and, for
files of one stream, against `training.bits_per_byte`, which computes by full passes.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from compress import HEADER, compress, decompress  # noqa: E402
from data import open_corpus  # noqa: E402
from train_blt import load_blt  # noqa: E402
from training import bits_per_byte  # noqa: E402

model, patcher, record = load_blt(sys.argv[1])
patcher.precision = "fp32"
large = int(sys.argv[2]) if len(sys.argv) > 2 else 0  # bytes of one large file, alone
corpus, random = open_corpus("sample", cache_dir=sys.argv[3] if len(sys.argv) > 3 else "data_cache"), np.random.default_rng(0)
held_out = np.concatenate([corpus.document(n) for n in corpus.documents("validation")]).tobytes()
code = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))
png = (ROOT / "docs" / "entropy.png").read_bytes()


def piece(source):
    n = int(random.integers(50, 1200))
    begin = int(random.integers(0, len(source) - n))
    return source[begin : begin + n]


files = [("empty", b""), ("one byte", b"\n"), ("one byte", b"\xff"), ("zeros", bytes(700)), ("all bytes", bytes(range(256)) * 2)]
files += [("text", piece(held_out)) for _ in range(45)] + [("code", piece(code)) for _ in range(30)] + [("picture", piece(png)) for _ in range(10)]
files += [("noise", random.bytes(300)) for _ in range(10)]
if large:
    files = [("text", (held_out * 2)[:large])]
restored, worst, worst_reported, kinds = 0, 0.0, 0.0, {}
for number, (kind, data) in enumerate(files):
    streams = 256 if large else 1 if number % 5 == 0 else min(8, max(1, len(data)))
    made, bits = compress(data, model, patcher, streams, record["settings"]["row_bytes"])
    restored += decompress(made, model, patcher) == data
    size = 8 * (len(made) - HEADER.size)
    if data:
        worst = max(worst, (size - bits - 64) / bits)  # a coder ends with up to 64 bits of its state
        kinds.setdefault(kind, []).append((size, len(data)))
        if streams == 1:
            reported = bits_per_byte(model, patcher, [data], record["settings"]["row_bytes"]) * len(data)
            worst_reported = max(worst_reported, (abs(size - reported) - 64) / reported if kind == "text" else 0.0)
print(f"{restored} of {len(files)} files restored; header {HEADER.size} bytes")
print(f"size beyond the bits of the probabilities and 64 bits: {worst:+.3%} at most; text in one stream against bits_per_byte: {worst_reported:+.3%} at most")
for kind, sizes in kinds.items():
    print(f"{kind}: {len(sizes)} files, {sum(n for _, n in sizes):,} bytes, {sum(s for s, _ in sizes) / sum(n for _, n in sizes):.3f} bits per byte")
