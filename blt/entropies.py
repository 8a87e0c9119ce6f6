"""Entropies of texts and corpora: the pass of the entropy model, and its results on disk."""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from blt.device import autocast
from blt.files import write_json
from blt.ids import to_bytes
from blt.patch_rules import NEEDS_ENTROPIES, patch_starts
from blt.rows import BitArray, DocumentStream


def entropy_of(logits_BTV):
    """Entropy in nats of each distribution: float32 [B, T]."""
    log_p = logits_BTV.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def stream_entropies(
    model, stream, n_streams=4, chunk_bytes=1024, precision="fp32", progress=None, out=None, visit=None
):
    """Entropies of every place of a `DocumentStream` but its last boundary: N + 1 numbers per document, in its order.

    The stream is cut into `n_streams` equal shares, read side by side in chunks; the model hands its window on from chunk to
    chunk. A lane begins as far before its share as the model can see, so every number is what one pass over its document
    gives, whatever the number of n_streams and the size of the chunks. Short streams get fewer n_streams, that little is read twice.
    out: array to write to (float32 by default). visit: called with (first, last + 1, logits [n, 256]) of each piece, for what else
    is to be read from the logits. Entropies as in the paper's equation 1.
    """
    device = next(model.parameters()).device
    total = len(stream) - 1
    out = np.empty(total, dtype=np.float32) if out is None else out
    receptive_field = model.config.n_layers * (
        model.config.max_seq_len - 1
    )  # places before a byte that its entropy depends on
    n_streams = max(1, min(n_streams, total // (4 * receptive_field + 1)))
    shares = np.linspace(0, total, n_streams + 1).astype(np.int64)
    begins, starts, finishes = np.maximum(shares[:-1] - receptive_field, 0), shares[:-1], shares[1:]
    state, longest = None, int((finishes - begins).max())
    was_training = model.training
    model.eval()
    with autocast(device, precision):  # around the loop: it rounds each weight once
        for offset in range(0, longest, chunk_bytes):
            width = min(chunk_bytes, longest - offset)
            ids = np.stack([stream.ids(begin + offset, begin + offset + width) for begin in begins])
            logits, state = model.stream(torch.from_numpy(ids).to(device), state)
            H = entropy_of(logits).cpu().numpy()
            done = 0
            for lane, (begin, start, finish) in enumerate(zip(begins + offset, starts, finishes)):
                low, high = max(begin, start), min(begin + width, finish)
                if low < high:
                    out[low:high] = H[lane, low - begin : high - begin]
                    done += high - low
                    if visit is not None:
                        visit(int(low), int(high), logits[lane, low - begin : high - begin])
            if progress is not None:
                progress.update(int(done))
    model.train(was_training)
    return out


@dataclass
class TopPredictions:
    """What a model expected at each of N places, from what stands before: its k likeliest ids, the likeliest first.

    ids_Nk: int64; 256 is the document's end. probabilities_Nk, of_byte_N: float32, of these ids and of the byte that came.
    """

    ids_Nk: np.ndarray
    probabilities_Nk: np.ndarray
    of_byte_N: np.ndarray

    @classmethod
    def of_logits(cls, logits_NV, byte_values, k):
        """From logits and the bytes that came; logits of places after the last byte are left out."""
        probabilities_NV = logits_NV[: len(byte_values)].float().softmax(-1)
        likeliest = probabilities_NV.topk(k)
        came = torch.from_numpy(byte_values.astype(np.int64)).to(logits_NV.device)[:, None]
        return cls(
            *(x.cpu().numpy() for x in (likeliest.indices, likeliest.values, probabilities_NV.gather(1, came)[:, 0]))
        )

    @classmethod
    def joined(cls, pieces):
        """Pieces of one text, in order, as one."""
        return cls(
            *(np.concatenate(parts) for parts in zip(*((p.ids_Nk, p.probabilities_Nk, p.of_byte_N) for p in pieces)))
        )

    @property
    def bits_per_byte(self):
        """Bits that the bytes cost the model; the document's end is not counted."""
        return float(-np.log2(np.maximum(self.of_byte_N, 1e-30), dtype=np.float64).mean())


def stream_predictions(model, document, k=5, precision="fp32", progress=None):
    """An entropy model's entropies [N + 1] of a document, as `EntropyPatcher` computes them, and its `TopPredictions`."""
    pieces, document = [], to_bytes(document)

    def visit(low, high, logits_NV):
        pieces.append(TopPredictions.of_logits(logits_NV, document[low:high], k))

    H = stream_entropies(
        model, DocumentStream.of_documents([document]), n_streams=1, precision=precision, progress=progress, visit=visit
    )
    return H, TopPredictions.joined(pieces)


def entropy_distribution(H):
    """{"mean", "std", "min", "max", "percentiles": {5: ..., 99: ...}} of float [N], nats."""
    if len(H) == 0:
        raise ValueError("no bytes to analyse")
    H = np.asarray(H, dtype=np.float32)
    levels = (5, 10, 25, 50, 75, 80, 85, 90, 95, 99)
    return {
        "mean": float(H.mean(dtype=np.float64)),
        "std": float(H.std(dtype=np.float64)),
        "min": float(H.min()),
        "max": float(H.max()),
        "percentiles": {level: float(value) for level, value in zip(levels, np.percentile(H, levels))},
    }


class EntropyCache:
    """Entropies of a corpus's documents on disk: N + 1 float16 numbers a document, in nats (its bytes and its end).

    manifest: what made them (corpus and entropy model by hash, precision, dtype) and which documents they cover.
    train, validation: document numbers covered.
    """

    def __init__(self, folder, corpus):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.train, self.validation = (np.load(self.folder / f"{name}.npy") for name in ("train", "validation"))
        self.numbers = np.concatenate((self.train, self.validation))
        self.lengths = np.diff(corpus.offsets)[self.numbers] + 1
        self.ends = np.cumsum(self.lengths)
        self.entropies = np.memmap(self.folder / "entropies.f16", dtype=np.float16, mode="r")
        if len(self.entropies) != self.ends[-1]:
            raise ValueError(
                f"{self.folder} is damaged: {len(self.entropies):,} entropies, not {self.ends[-1]:,}; delete it and run: python create_patches.py"
            )

    def covers(self, train, validation):
        """Whether the first documents in here are these."""
        return all(
            len(asked) <= len(held) and np.array_equal(held[: len(asked)], asked)
            for asked, held in ((train, self.train), (validation, self.validation))
        )

    def document(self, place):
        """Entropies [N + 1] of the document at this place of `numbers`, float32."""
        end = int(self.ends[place])
        return self.entropies[end - int(self.lengths[place]) : end].astype(np.float32)

    def of_training(self, count, block=1 << 22):
        """Entropies of the first `count` training documents in blocks of whole documents: yields (first, last + 1, float32)."""
        first = 0
        while first < count:
            begin = int(self.ends[first - 1]) if first else 0
            last = min(count, max(first + 1, int(np.searchsorted(self.ends, begin + block, side="right"))))
            yield first, last, self.entropies[begin : int(self.ends[last - 1])].astype(np.float32)
            first = last


def cache_folder(cache_dir, corpus, model_record):
    """Where the entropies of this corpus by this model lie."""
    return Path(cache_dir) / f"entropies-{corpus.hash[:8]}-{model_record['sha256'][:8]}"


def open_entropies(cache_dir, corpus, model_record, entropy_model_path):
    """Open the cached entropies of this corpus by this model. Raises FileNotFoundError saying what is there and what to run."""
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        cache = EntropyCache(folder, corpus)
        made_by = (cache.manifest["corpus_sha256"], cache.manifest["entropy_model_sha256"])
        if made_by == (corpus.hash, model_record["sha256"]):
            return cache
    others = sorted(Path(cache_dir).glob("entropies-*"))
    found = []
    for other in others:
        manifest = json.loads((other / "manifest.json").read_text())
        what = "another corpus" if manifest["corpus_sha256"] != corpus.hash else "another entropy model"
        found.append(f"{other.name} is of {what}")
    raise FileNotFoundError(
        f"{cache_dir} holds no entropies of dataset {corpus.manifest['dataset']!r} by {entropy_model_path}"
        f"{' (' + '; '.join(found) + ')' if found else ''}; run: python create_patches.py --dataset {corpus.manifest['dataset']} "
        f"--entropy_model_path {entropy_model_path} --cache_dir {cache_dir}"
    )


def make_entropies(cache_dir, corpus, model, model_record, train, validation, precision, n_streams=4, chunk_bytes=1024):
    """Compute and store the entropies of these documents, or open them if they are there already."""
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        cache = EntropyCache(folder, corpus)
        if cache.covers(train, validation) and cache.manifest["precision"] == precision:
            print(f"entropies: {folder} is there already ({len(cache.entropies):,} numbers)")
            return cache
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name, suffix=".tmp"))
    try:
        aside.chmod(0o755)
        numbers = np.concatenate((train, validation))
        stream = DocumentStream.of_corpus(corpus, numbers)
        out = np.memmap(aside / "entropies.f16", dtype=np.float16, mode="w+", shape=(len(stream) - 1,))
        began = time.perf_counter()
        with tqdm(total=len(out), unit="B", unit_scale=True, desc="entropies", disable=None) as progress:
            stream_entropies(model, stream, n_streams, chunk_bytes, precision, progress, out)
        seconds = time.perf_counter() - began
        out.flush()
        np.save(aside / "train.npy", train)
        np.save(aside / "validation.npy", validation)
        write_json(aside / "manifest.json", {
            "corpus_sha256": corpus.hash, "dataset": corpus.manifest["dataset"],
            "entropy_model_sha256": model_record["sha256"], "precision": precision, "dtype": "float16",
            "documents": len(numbers), "train_documents": len(train), "numbers": len(out), "unit": "nats",
            "layout": "for each document: one number for each byte, about that byte, then one for the document's end",
        })  # fmt: skip
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print(f"entropies: {len(out):,} numbers in {seconds:.1f} s ({len(out) / seconds / 1e3:.0f} kB/s) -> {folder}")
    return EntropyCache(folder, corpus)


def training_starts(corpus, train, patch_config, cache=None):
    """Patch starts of the training stream (`DocumentStream` of these documents), as a `BitArray`: one vectorised pass.

    Place 0 is the first boundary; then each document has its bytes' places and its end's. cache: for methods that need it.
    """
    needs = patch_config.method in NEEDS_ENTROPIES
    lengths = np.diff(corpus.offsets)[train] + 1
    stream = DocumentStream.of_corpus(corpus, train)
    starts = BitArray()
    starts.append(np.ones(1, dtype=bool))
    for first, last, H in cache.of_training(len(train)) if needs else _document_blocks(lengths):
        ends = np.cumsum(lengths[first:last])
        document_starts = np.zeros(ends[-1], dtype=bool)
        document_starts[ends - lengths[first:last]] = True
        byte_values = None
        if not needs:
            before = 1 + (int(stream.ends[first - 1]) if first else 0)
            byte_values = stream.ids(before, before + len(document_starts)).astype(np.uint8)  # an end's place: any byte
        starts.append(patch_starts(H, **patch_config.rule, byte_values=byte_values, document_starts=document_starts))
    starts.close()
    return starts


def _document_blocks(lengths, block=1 << 22):
    """Blocks of whole documents of about `block` places: yields (first, last + 1, None)."""
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + block, side="right")))
        yield first, last, None
        first = last


def training_sample(cache, places=2_000_000):
    """Entropies of the first training documents, about so many, with the flags of where documents begin."""
    lengths = cache.lengths[: len(cache.train)]
    count = int(np.searchsorted(np.cumsum(lengths), places)) + 1
    _, last, H = next(cache.of_training(min(count, len(lengths)), block=max(places, int(lengths[0]))))
    document_starts = np.zeros(len(H), dtype=bool)
    document_starts[np.cumsum(lengths[:last]) - lengths[:last]] = True
    return H, document_starts


def training_patch_sizes(starts, corpus, train):
    """Sizes in bytes of the training documents' patches, int64 [P]; boundaries do not count as bytes."""
    lengths = np.diff(corpus.offsets)[train]
    ends = np.cumsum(lengths + 1)  # place of each document's end in the stream
    sizes, rest, block = [], np.empty(0, np.int64), 1 << 24
    for begin in range(1, len(starts), block):
        flags = starts.read(begin, min(begin + block, len(starts)))
        inside = ends[np.searchsorted(ends, begin) : np.searchsorted(ends, begin + len(flags))] - begin
        flags[inside] = True  # cut where documents end, and leave the end's own place out below
        places = np.flatnonzero(flags) + begin
        places = np.concatenate((rest, places))
        is_end = np.zeros(len(places), dtype=bool)
        is_end[np.searchsorted(places, inside + begin)] = True
        sizes.append(np.diff(places)[~is_end[:-1]])
        rest = places[-1:]
    return np.concatenate(sizes)
