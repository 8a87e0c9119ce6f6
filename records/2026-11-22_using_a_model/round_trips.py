"""Compress and restore 100 files with a trained model:  python round_trips.py CHECKPOINTS [LARGE DATA_CACHE]

The files are text, source code, pieces of a picture, noise, an empty one, one byte. LARGE, if not 0: one text of that
many bytes in 256 streams instead. Prints the sizes against the bits of the model's probabilities and, for files of one
stream, against `blt.metric.bits_per_byte`, which computes by full passes. Files that compress.py stores are left out of
that comparison. (round_trips.txt was made at commit a5a62cf, when nothing was stored.)
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from blt.corpus import open_corpus  # noqa: E402
from blt.metric import bits_per_byte  # noqa: E402
from compress import HEADER, compress, decompress, read_header  # noqa: E402
from save_entropy_model import load_blt  # noqa: E402

model, patcher, record = load_blt(sys.argv[1])
patcher.precision = "fp32"
row_bytes = record.settings["row_bytes"]
large = int(sys.argv[2]) if len(sys.argv) > 2 else 0
corpus = open_corpus("sample", cache_dir=sys.argv[3] if len(sys.argv) > 3 else "data_cache")
random = np.random.default_rng(0)
held_out = np.concatenate([corpus.document(n) for n in corpus.documents("validation")]).tobytes()
code = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))
png = (ROOT / "docs" / "entropy.png").read_bytes()


def piece(source):
    n = int(random.integers(50, 1200))
    begin = int(random.integers(0, len(source) - n))
    return source[begin : begin + n]


files = [("empty", b""), ("one byte", b"\n"), ("one byte", b"\xff"), ("zeros", bytes(700))]
files.append(("all bytes", bytes(range(256)) * 2))
files += [("text", piece(held_out)) for _ in range(45)]
files += [("code", piece(code)) for _ in range(30)]
files += [("picture", piece(png)) for _ in range(10)]
files += [("noise", random.bytes(300)) for _ in range(10)]
if large:
    files = [("text", (held_out * 2)[:large])]

restored, stored, worst, worst_reported = 0, 0, 0.0, 0.0
kinds = {}
for number, (kind, data) in enumerate(files):
    if large:
        streams = 256
    elif number % 5 == 0:
        streams = 1
    else:
        streams = min(8, max(1, len(data)))
    made, bits = compress(data, model, patcher, streams, row_bytes)
    restored += decompress(made, model, patcher) == data
    size = 8 * (len(made) - HEADER.size)
    if not data:
        continue
    kinds.setdefault(kind, []).append((size, len(data)))
    if read_header(made).is_stored:
        stored += 1
        continue
    # A coder ends with up to 64 bits of its state.
    worst = max(worst, (size - bits - 64) / bits)
    if streams == 1 and kind == "text":
        reported = bits_per_byte(model, patcher, [data], row_bytes) * len(data)
        worst_reported = max(worst_reported, (abs(size - reported) - 64) / reported)

print(f"{restored} of {len(files)} files restored, {stored} of them stored; header {HEADER.size} bytes")
print(f"size beyond the bits of the probabilities and 64 bits: {worst:+.3%} at most")
print(f"text in one stream against bits_per_byte: {worst_reported:+.3%} at most")
for kind, sizes in kinds.items():
    total_bits = sum(size for size, _ in sizes)
    total_bytes = sum(n for _, n in sizes)
    print(f"{kind}: {len(sizes)} files, {total_bytes:,} bytes, {total_bits / total_bytes:.3f} bits per byte")
