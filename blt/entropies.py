"""Entropies of texts and corpora: the pass of the entropy model, and its results on disk (BLT section 2.3).

A corpus's entropies are computed once and stored as float16, one number a position. Another
patching method, threshold or patch size is then a vectorised pass over that file; the entropy
model does not run again.
"""

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
from blt.patch_rules import patch_starts
from blt.rows import BitArray, DocumentStream

# Positions that are patched at once: tens of megabytes in memory.
BLOCK = 1 << 22
# Positions of training text from which a threshold is calibrated.
SAMPLE_POSITIONS = 2_000_000


def entropy_of(logits_BTV):
    """Entropy of each distribution in nats, float32 [B, T]: the paper's equation 1."""
    # In fp32: bf16 would round entropies to steps of 0.01 nats.
    log_p = logits_BTV.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def stream_entropies(
    model, stream, n_streams=4, chunk_bytes=1024, precision="fp32", progress=None, out=None, visit=None
):
    """Entropies of every position of a `DocumentStream` but its last boundary: N + 1 numbers a document, in its order.

    The stream is divided into n_streams equal shares, which are read side by side in chunks; the
    model hands the keys and values of its window on from chunk to chunk. Each share is read from
    one receptive field before its beginning, so results equal a single pass, whatever n_streams
    and chunk_bytes are. Short streams get fewer shares, so that little is read twice.

    out: array to write to; None: a new float32 array.
    visit: called with (first, end, logits [n, V]) of every piece, for whatever else is to be read
    from the logits.
    progress: a tqdm bar to update.
    Returns out.
    """
    device = next(model.parameters()).device
    total = len(stream) - 1
    out = np.empty(total, dtype=np.float32) if out is None else out
    # How many bytes before a byte its entropy depends on: one window less the byte itself, for
    # each layer.
    receptive_field = model.config.n_layers * (model.config.max_seq_len - 1)
    n_streams = max(1, min(n_streams, total // (4 * receptive_field + 1)))

    # Stream i answers for positions share_first[i] to share_end[i], and reads from read_from[i] on.
    shares = np.linspace(0, total, n_streams + 1).astype(np.int64)
    share_first = shares[:-1]
    share_end = shares[1:]
    read_from = np.maximum(share_first - receptive_field, 0)
    longest = int((share_end - read_from).max())
    state = None
    was_training = model.training
    model.eval()
    # One autocast context around the loop: it rounds each weight only once.
    with autocast(device, precision):
        for offset in range(0, longest, chunk_bytes):
            width = min(chunk_bytes, longest - offset)
            chunk_first = read_from + offset
            ids = np.stack([stream.ids(first, first + width) for first in chunk_first])
            logits, state = model.stream(torch.from_numpy(ids).to(device), state)
            entropies = entropy_of(logits).cpu().numpy()
            done = 0
            for row, first in enumerate(chunk_first):
                # The part of this chunk that lies in the stream's own share.
                low = max(first, share_first[row])
                high = min(first + width, share_end[row])
                if low >= high:
                    continue
                out[low:high] = entropies[row, low - first : high - first]
                done += high - low
                if visit is not None:
                    visit(int(low), int(high), logits[row, low - first : high - first])
            if progress is not None:
                progress.update(int(done))
    model.train(was_training)
    return out


@dataclass
class TopPredictions:
    """What a model predicted for each of N bytes from what is before it: its k most likely ids, in that order."""

    ids_Nk: np.ndarray  # int64; 256 is the document's end
    probabilities_Nk: np.ndarray  # float32, of these ids
    of_byte_N: np.ndarray  # float32, the probability of the byte that came

    @classmethod
    def of_logits(cls, logits_NV, byte_values, k):
        """From logits and the bytes that came; logits after the last byte are left out."""
        probabilities_NV = logits_NV[: len(byte_values)].float().softmax(-1)
        top = probabilities_NV.topk(k)
        came_N1 = torch.from_numpy(byte_values.astype(np.int64)).to(logits_NV.device)[:, None]
        of_byte_N = probabilities_NV.gather(1, came_N1)[:, 0]
        return cls(top.indices.cpu().numpy(), top.values.cpu().numpy(), of_byte_N.cpu().numpy())

    @classmethod
    def joined(cls, pieces):
        """Pieces of one text, in order, as one."""
        return cls(
            np.concatenate([piece.ids_Nk for piece in pieces]),
            np.concatenate([piece.probabilities_Nk for piece in pieces]),
            np.concatenate([piece.of_byte_N for piece in pieces]),
        )

    @property
    def bits_per_byte(self):
        """Bits that the bytes cost the model; the document's end is not counted."""
        return float(-np.log2(np.maximum(self.of_byte_N, 1e-30), dtype=np.float64).mean())


def stream_predictions(model, document, k=5, precision="fp32", progress=None):
    """A document's entropies [N + 1], as `EntropyPatcher` computes them, and the model's `TopPredictions`."""
    document = to_bytes(document)
    pieces = []

    def visit(low, high, logits_NV):
        pieces.append(TopPredictions.of_logits(logits_NV, document[low:high], k))

    stream = DocumentStream.of_documents([document])
    entropies = stream_entropies(model, stream, n_streams=1, precision=precision, progress=progress, visit=visit)
    return entropies, TopPredictions.joined(pieces)


def entropy_distribution(entropies):
    """{"mean", "std", "min", "max", "percentiles": {5: ..., 99: ...}} of float [N], nats."""
    if len(entropies) == 0:
        raise ValueError("no bytes to analyse")
    entropies = np.asarray(entropies, dtype=np.float32)
    levels = (5, 10, 25, 50, 75, 80, 85, 90, 95, 99)
    return {
        "mean": float(entropies.mean(dtype=np.float64)),
        "std": float(entropies.std(dtype=np.float64)),
        "min": float(entropies.min()),
        "max": float(entropies.max()),
        "percentiles": {level: float(value) for level, value in zip(levels, np.percentile(entropies, levels))},
    }


# The cache


class EntropyCache:
    """Entropies of a corpus's documents on disk: N + 1 float16 numbers a document, in nats (its bytes and its end).

    manifest: what made them (corpus and entropy model by hash, precision, dtype) and which
    documents they cover.
    train, validation: the document numbers covered.
    numbers: both, in the order of the file.
    Raises ValueError if the file's length is not what the manifest implies.
    """

    def __init__(self, folder, corpus):
        self.folder = Path(folder)
        self.manifest = json.loads((self.folder / "manifest.json").read_text())
        self.train = np.load(self.folder / "train.npy")
        self.validation = np.load(self.folder / "validation.npy")
        self.numbers = np.concatenate((self.train, self.validation))
        self.lengths = np.diff(corpus.offsets)[self.numbers] + 1
        self.ends = np.cumsum(self.lengths)
        self.entropies = np.memmap(self.folder / "entropies.f16", dtype=np.float16, mode="r")
        # A cut file would shift every document after the cut.
        if len(self.entropies) != self.ends[-1]:
            raise ValueError(
                f"{self.folder} is damaged: {len(self.entropies):,} entropies, not {self.ends[-1]:,}; "
                "delete it and run: python create_patches.py"
            )

    def covers(self, train, validation):
        """Whether the cache begins with these documents, in this order."""
        has_train = np.array_equal(self.train[: len(train)], train)
        has_validation = np.array_equal(self.validation[: len(validation)], validation)
        return has_train and has_validation

    def document(self, place):
        """Entropies of the document numbers[place]: float32 [N + 1]."""
        end = int(self.ends[place])
        return self.entropies[end - int(self.lengths[place]) : end].astype(np.float32)

    def of_documents(self, first, end):
        """Entropies of the documents numbers[first:end], one after the other: float32."""
        begin = int(self.ends[first - 1]) if first else 0
        return self.entropies[begin : int(self.ends[end - 1])].astype(np.float32)


def document_blocks(ends, block=BLOCK):
    """Group documents into blocks of about `block` positions: yields (first, end). ends: their cumulative lengths."""
    first = 0
    while first < len(ends):
        begin = ends[first - 1] if first else 0
        # At least one document, however long it is.
        end = int(np.searchsorted(ends, begin + block, side="right"))
        end = min(len(ends), max(first + 1, end))
        yield first, end
        first = end


def document_starts(lengths):
    """Where documents of these lengths begin when concatenated: bool [sum of lengths]."""
    is_document_start = np.zeros(int(np.sum(lengths)), dtype=bool)
    is_document_start[np.cumsum(lengths) - lengths] = True
    return is_document_start


def cache_folder(cache_dir, corpus, model_record):
    """Where the entropies of this corpus by this model are."""
    return Path(cache_dir) / f"entropies-{corpus.hash[:8]}-{model_record.weights_sha256[:8]}"


def open_entropies(cache_dir, corpus, model_record, entropy_model_path):
    """Open the cached entropies of this corpus by this model.

    Raises FileNotFoundError that says what the folder holds instead and what to run.
    """
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        cache = EntropyCache(folder, corpus)
        made_by = (cache.manifest["corpus_sha256"], cache.manifest["entropy_model_sha256"])
        if made_by == (corpus.hash, model_record.weights_sha256):
            return cache
    # Say what is there: most often another model was trained, or another dataset named.
    found = []
    for other in sorted(Path(cache_dir).glob("entropies-*")):
        manifest = json.loads((other / "manifest.json").read_text())
        is_other_corpus = manifest["corpus_sha256"] != corpus.hash
        found.append(f"{other.name} is of another {'corpus' if is_other_corpus else 'entropy model'}")
    dataset = corpus.manifest["dataset"]
    raise FileNotFoundError(
        f"{cache_dir} holds no entropies of dataset {dataset!r} by {entropy_model_path}"
        f"{' (' + '; '.join(found) + ')' if found else ''}; run: python create_patches.py --dataset {dataset} "
        f"--entropy_model_path {entropy_model_path} --cache_dir {cache_dir}"
    )


def make_entropies(cache_dir, corpus, model, model_record, train, validation, precision, n_streams=4, chunk_bytes=1024):
    """Compute and store the entropies of these documents; open them if they are there already.

    train, validation: document numbers.
    Returns an `EntropyCache`. It is built aside and renamed: an interrupted pass is never taken
    for a cache.
    """
    folder = cache_folder(cache_dir, corpus, model_record)
    if folder.exists():
        cache = EntropyCache(folder, corpus)
        if cache.covers(train, validation) and cache.manifest["precision"] == precision:
            print(f"entropies: {folder} is there already ({len(cache.entropies):,} numbers)")
            return cache
    # In the same folder, because a rename is atomic only within one file system.
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name, suffix=".tmp"))
    try:
        # mkdtemp lets only the owner in.
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
        manifest = {
            "corpus_sha256": corpus.hash,
            "dataset": corpus.manifest["dataset"],
            "entropy_model_sha256": model_record.weights_sha256,
            "precision": precision,
            "dtype": "float16",
            "documents": len(numbers),
            "train_documents": len(train),
            "numbers": len(out),
            "unit": "nats",
            "layout": "for each document: one number for each byte, about that byte, then one for the document's end",
        }
        write_json(aside / "manifest.json", manifest)
        # A cache of fewer documents, or of another precision, gives way.
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    # On Ctrl-C too, which is no Exception.
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print(f"entropies: {len(out):,} numbers in {seconds:.1f} s ({len(out) / seconds / 1e3:.0f} kB/s) -> {folder}")
    return EntropyCache(folder, corpus)


# Patch starts of a training corpus


def training_starts(corpus, train, patch_config, cache=None):
    """Patch starts of the training stream (`DocumentStream` of these documents) as a `BitArray`: one vectorised pass.

    Position 0 is the first boundary; then each document has a position for each byte and one for
    its end.
    cache: `EntropyCache`, for methods that need entropies.
    """
    lengths = np.diff(corpus.offsets)[train] + 1
    stream = DocumentStream.of_corpus(corpus, train)
    is_start = BitArray()
    # The boundary before the first document is a patch of its own.
    is_start.append(np.ones(1, dtype=bool))
    for first, end in document_blocks(np.cumsum(lengths)):
        # Position 0 of the stream is the boundary before the first document. At a document's end is a
        # boundary too, which becomes 0 as a uint8: the byte value there is arbitrary.
        begin = 1 + (int(stream.ends[first - 1]) if first else 0)
        positions = int(lengths[first:end].sum())
        starts = patch_starts(
            cache.of_documents(first, end) if patch_config.needs_entropies else None,
            **patch_config.arguments(),
            byte_values=stream.ids(begin, begin + positions).astype(np.uint8),
            document_starts=document_starts(lengths[first:end]),
        )
        is_start.append(starts)
    is_start.close()
    return is_start


def training_sample(cache, positions=SAMPLE_POSITIONS):
    """(entropies, is_document_start) of the first training documents, about this many positions."""
    lengths = cache.lengths[: len(cache.train)]
    count = max(1, int(np.searchsorted(np.cumsum(lengths), positions, side="right")))
    return cache.of_documents(0, count), document_starts(lengths[:count])


def training_patch_sizes(is_start, corpus, train):
    """Sizes in bytes of the training documents' patches, int64 [P]. Document ends count as no byte.

    is_start: what `training_starts` returned.
    """
    lengths = np.diff(corpus.offsets)[train]
    document_ends = np.cumsum(lengths + 1)  # positions in the stream
    sizes = []
    unfinished = np.empty(0, np.int64)  # the last start of the block before, whose patch ends in the next block
    block = 1 << 24
    for begin in range(1, len(is_start), block):
        flags = is_start.read(begin, min(begin + block, len(is_start)))
        first_end = np.searchsorted(document_ends, begin)
        ends_here = document_ends[first_end : np.searchsorted(document_ends, begin + len(flags))]
        # A patch also ends with its document. The end's own position then looks like a patch and
        # is left out.
        flags[ends_here - begin] = True
        start_positions = np.concatenate((unfinished, np.flatnonzero(flags) + begin))
        is_end = np.zeros(len(start_positions), dtype=bool)
        is_end[np.searchsorted(start_positions, ends_here)] = True
        sizes.append(np.diff(start_positions)[~is_end[:-1]])
        # The last patch of the block ends in the next one.
        unfinished = start_positions[-1:]
    return np.concatenate(sizes)
