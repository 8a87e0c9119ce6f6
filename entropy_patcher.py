"""From entropies to patches: the patching rules, EntropyPatcher, thresholds (BLT sections 2.1 to 2.3).

Index t always means "about byte t, from what stands before t": entropies[t] is the entropy, in nats, of the model's
distribution for byte t given the bytes before it, and starts[t] says whether byte t opens a patch. So every rule here can
be followed while text is being generated; `bpe` alone looks ahead, for comparison.

A document of N bytes has N + 1 places: one for each byte and one for its end. Whether a patch is complete when the
document ends is decided like everywhere else, from what stands before; the model must not be told by a patch that the text
is over.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import hash_of_documents
from rows import DocumentStream
from training import autocast, check, write_aside

METHODS = ("global", "monotonic", "both", "static", "space", "cumulative", "bpe")
NEEDS_ENTROPIES = ("global", "monotonic", "both", "cumulative")


@dataclass
class PatchConfig:
    method: str = "global"  # global, monotonic, both, static, space, cumulative, bpe
    entropy_threshold: float = 0.6  # nats; for static: bytes in a patch
    monotonic_threshold: float = 0.0  # nats; both: the rise of entropy that a start also needs
    min_patch_size: int = 1  # bytes; a start that comes earlier is suppressed
    max_patch_size: int | None = None  # bytes; after so many a patch is closed; None: no limit
    cache_patches: bool = True  # process_data keeps its result on disk under a cache_key
    cache_dir: str = "patch_cache"  # where
    tokenizer_path: str | None = None  # bpe: a tokenizer.json whose tokens are the patches

    def __post_init__(self):
        check(self, "method", self.method in METHODS, "one of " + ", ".join(METHODS))
        check(self, "entropy_threshold", math.isfinite(self.entropy_threshold), "a finite number")
        if self.method == "static":
            check(self, "entropy_threshold", self.entropy_threshold >= 1, "1 or more bytes with method static")
        check(self, "min_patch_size", self.min_patch_size >= 1, "1 or more")
        if self.max_patch_size is not None:
            check(self, "max_patch_size", self.max_patch_size >= self.min_patch_size, "at least min_patch_size")

    @property
    def rule(self):
        """The arguments that `patch_starts` takes from this config."""
        return dict(
            method=self.method, threshold=self.entropy_threshold, monotonic_threshold=self.monotonic_threshold,
            min_patch_size=self.min_patch_size, max_patch_size=self.max_patch_size,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The rules


def patch_starts(
    entropies, method="global", threshold=0.6, *, monotonic_threshold=0.0, min_patch_size=1, max_patch_size=None,
    byte_values=None, token_starts=None, document_starts=None,
):  # fmt: skip
    """Which bytes open a patch: bool [N]. A vectorised pass; byte 0 always opens one.

    With H = entropies, byte t opens a patch iff
        global      H[t] > threshold                                                       (paper, equation 1)
        monotonic   H[t] - H[t-1] > threshold                                              (paper, equation 2, approximate)
        both        H[t] > threshold and H[t] - H[t-1] > monotonic_threshold
        cumulative  H[s] + ... + H[t] > threshold, s the first byte of the patch so far
        static      t is a multiple of threshold (bytes)
        space       byte t-1 is space-like and byte t-2 is not (paper, section 2.2): not an ASCII letter or digit, and not
                    a UTF-8 continuation byte; the boundary before the text counts as space-like. Needs byte_values.
        bpe         token_starts[t]: looks ahead, for comparison only
    A start within min_patch_size bytes of the last one is suppressed; after max_patch_size bytes one is forced.

    Worked example (threshold 1.335): H = 3.0 2.5 2.0 1.0 .5 .4 2.4 gives starts at 0, 1, 2 and 6.

    entropies: float [N], nats; None for space, static and bpe when byte_values or token_starts give N.
    document_starts: bool [N], places where the next document's entropies begin, when several stand one after the other.
    """
    if method not in METHODS:
        raise ValueError(f"patch method is {method!r}; it must be one of {', '.join(METHODS)}")
    given = next((x for x in (entropies, byte_values, token_starts) if x is not None), None)
    if given is None or (method in NEEDS_ENTROPIES and entropies is None):
        raise ValueError(f"method {method!r} needs entropies" if method in NEEDS_ENTROPIES else "nothing to cut: pass byte_values")
    N = len(given)
    if N == 0:
        return np.zeros(0, dtype=bool)
    H = None if entropies is None else np.asarray(entropies)
    if H is not None and H.dtype == np.float16:
        H = H.astype(np.float32)  # a cache's dtype, slow to compute in
    first = np.zeros(N, dtype=bool) if document_starts is None else np.array(document_starts, dtype=bool)
    first[0] = True

    if method == "global":
        wanted = H > threshold
    elif method == "monotonic":
        wanted = _rise(H) > threshold
    elif method == "both":
        wanted = (H > threshold) & (_rise(H) > monotonic_threshold)
    elif method == "static":
        wanted = _is_static_start(np.arange(N) - _last_true(first), threshold)
    elif method == "space":
        wanted = _after_space(np.asarray(byte_values), first)
    elif method == "bpe":
        wanted = np.array(token_starts, dtype=bool)
    else:
        return _follow(_cumulative_next(H, threshold), first, min_patch_size, max_patch_size)
    if min_patch_size == 1 and max_patch_size is None:
        return wanted | first
    if min_patch_size == 1:
        starts = wanted | first
        return starts | ((np.arange(N) - _last_true(starts)) % max_patch_size == 0)
    return _follow(_next_true(wanted), first, min_patch_size, max_patch_size)


def _is_static_start(place, size):
    """Whether these places, counted from the document's first, are multiples of a size that may be fractional."""
    return place % int(size) == 0 if size == int(size) else place // size > (place - 1) // size


def _rise(H):
    """H[t] - H[t-1]; minus infinity at 0."""
    rise = np.empty_like(H)
    rise[0] = -np.inf
    np.subtract(H[1:], H[:-1], out=rise[1:])
    return rise


def _last_true(flags):
    """Index of the last True at or before each place (flags[0] is True)."""
    return np.maximum.accumulate(np.where(flags, np.arange(len(flags)), 0))


def _next_true(flags):
    """nexts(low) -> index of the first True at or after each of low; len(flags) where there is none."""
    N = len(flags)
    first_at_or_after = np.append(np.minimum.accumulate(np.where(flags, np.arange(N), N)[::-1])[::-1], N)
    return lambda patch_begin, low: first_at_or_after[np.minimum(low, N)]


def _cumulative_next(H, threshold):
    """nexts(s, low) -> the first t >= low with H[s] + ... + H[t] > threshold."""
    total = np.concatenate(([0.0], np.cumsum(H, dtype=np.float64)))
    return lambda patch_begin, low: np.maximum(np.searchsorted(total, total[patch_begin] + threshold, side="right") - 1, low)


def _follow(nexts, first, min_patch_size, max_patch_size, block=1 << 20):
    """Starts of a rule in which each patch depends on where the last one began.

    Where a patch that begins at s ends is worked out for all s of a block at once; the chain s -> end(s) is then followed.
    """
    N = len(first)
    starts = np.zeros(N, dtype=bool)
    next_document = np.append(np.minimum.accumulate(np.where(first, np.arange(N), N)[::-1])[::-1], N)
    at = 0
    for begin in range(0, N, block):
        s = np.arange(begin, min(begin + block, N))
        end = nexts(s, s + min_patch_size)
        if max_patch_size is not None:
            end = np.minimum(end, s + max_patch_size)
        end = np.minimum(end, next_document[s + 1]).tolist()
        chain = []
        while at < begin + len(end):
            chain.append(at)
            at = end[at - begin]
        starts[chain] = True
    return starts


IS_LETTER_OR_DIGIT = np.zeros(256, dtype=bool)  # or a UTF-8 continuation byte
for _low, _high in ((48, 57), (65, 90), (97, 122), (0x80, 0xBF)):
    IS_LETTER_OR_DIGIT[_low : _high + 1] = True


def _after_space(byte_values, first):
    """Places after a space-like byte whose predecessor is none. byte_values may be one shorter per document's end."""
    is_space = ~IS_LETTER_OR_DIGIT[byte_values]
    before = np.roll(is_space, 1)
    before[first] = True  # the boundary
    ends_patch = is_space & ~before
    after = np.roll(ends_patch, 1)
    after[0] = False
    return after


class OnlineStarts:
    """`patch_starts` place by place, for rows of text that are still being written.

    config: `PatchConfig`, any method that is causal. State is one number a row in each array of `state`; `reset` begins rows
    anew. The same starts as `patch_starts` gives for the whole text.
    """

    def __init__(self, config, n_rows):
        if config.method == "bpe":
            raise ValueError("patch method 'bpe' looks ahead: it cannot follow a text that is being written")
        self.config = config
        self.state = {
            "place": np.zeros(n_rows, np.int64),  # places so far, bytes and the coming one
            "size": np.zeros(n_rows, np.int64),  # of the open patch, so far
            "total": np.zeros(n_rows),  # its entropies' sum
            "entropy": np.zeros(n_rows, np.float32),  # of the last place
            "after_space": np.ones(n_rows, bool),  # whether the last byte was space-like
        }
        self.reset(slice(None))

    def reset(self, rows):
        for name, values in self.state.items():
            values[rows] = name == "after_space"

    def copy_state(self):
        return {name: values.copy() for name, values in self.state.items()}

    def step(self, entropies_B, last_bytes_B, is_active_B):
        """Whether the next place of each row opens a patch: bool [B], False for rows that are not active.

        entropies_B: float32, nats, of that place (None for static and space). last_bytes_B: the byte before it; for a document's
        first place anything.
        """
        c, s = self.config, self.state
        place, H, threshold = s["place"], entropies_B, c.entropy_threshold
        is_space = ~IS_LETTER_OR_DIGIT[last_bytes_B & 255] & (place > 0)
        if c.method == "global":
            wanted = H > threshold
        elif c.method == "monotonic":
            wanted = H - s["entropy"] > threshold
        elif c.method == "both":
            wanted = (H > threshold) & (H - s["entropy"] > c.monotonic_threshold)
        elif c.method == "cumulative":
            wanted = s["total"] + H > threshold
        elif c.method == "static":
            wanted = _is_static_start(place, threshold)
        else:
            wanted = is_space & ~s["after_space"]
        starts = wanted & (s["size"] >= c.min_patch_size)
        if c.max_patch_size is not None:
            starts |= s["size"] >= c.max_patch_size
        starts |= place == 0
        after = {
            "place": place + 1, "size": np.where(starts, 1, s["size"] + 1), "total": s["total"] if H is None else np.where(starts, 0.0, s["total"]) + H,
            "entropy": s["entropy"] if H is None else H, "after_space": is_space | (place == 0),
        }  # fmt: skip
        for name, values in after.items():
            np.copyto(s[name], values, where=is_active_B)
        return starts & is_active_B


def threshold_for_patch_size(entropies, method, target, document_starts=None, **options):
    """The threshold that cuts these entropies into patches of `target` bytes on average (as near as there is one).

    options: further arguments of `patch_starts`. Example: entropies 1 2 3 4 5 6, global, target 3 gives a threshold between
    4 and 5 or so: starts at 0 and wherever H is above it.
    """
    if target < 1:
        raise ValueError(f"target patch size is {target}; it must be at least 1 byte")
    if method == "static":
        return float(target)
    if method in ("space", "bpe"):
        raise ValueError(f"method {method!r} has no threshold; its patch size is what the text gives")
    H = np.asarray(entropies, dtype=np.float32)
    if len(H) == 0:
        raise ValueError("no entropies to find a threshold for")
    wanted = len(H) / target
    values = _rise(H)[1:] if method == "monotonic" else H
    low, high = float(values.min(initial=np.inf)) - 1e-3, float(values.max(initial=-np.inf)) + 1e-3
    if len(values) == 0:
        return 0.0
    if method == "cumulative":
        low, high = 0.0, float(H.sum(dtype=np.float64)) + 1.0
    for _ in range(40):
        middle = (low + high) / 2
        count = patch_starts(H, method, middle, document_starts=document_starts, **options).sum()
        low, high = (middle, high) if count > wanted else (low, middle)
        if high - low < 1e-5:
            break
    return (low + high) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Entropies


def entropy_of(logits_BTV):
    """Entropy in nats of each distribution: float32 [B, T]."""
    log_p = logits_BTV.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def stream_entropies(model, stream, lanes=4, chunk_bytes=1024, precision="fp32", progress=None, out=None, visit=None):
    """Entropies of every place of a `DocumentStream` but its last boundary: N + 1 numbers per document, in its order.

    The stream is cut into `lanes` equal shares, read side by side in chunks; the model hands its window on from chunk to
    chunk. A lane begins as far before its share as the model can see, so every number is what one pass over its document
    gives, whatever the number of lanes and the size of the chunks. Short streams get fewer lanes, that little is read twice.
    out: array to write to (float32 by default). visit: called with (first, last + 1, logits [n, 256]) of each piece, for what else
    is to be read from the logits. Entropies as in the paper's equation 1.
    """
    device = next(model.parameters()).device
    total = len(stream) - 1
    out = np.empty(total, dtype=np.float32) if out is None else out
    sight = model.config.n_layers * (model.config.max_seq_len - 1)  # places before a byte that its entropy depends on
    lanes = max(1, min(lanes, total // (4 * sight + 1)))
    shares = np.linspace(0, total, lanes + 1).astype(np.int64)
    begins, starts, finishes = np.maximum(shares[:-1] - sight, 0), shares[:-1], shares[1:]
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
class Guesses:
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
        return cls(*(x.cpu().numpy() for x in (likeliest.indices, likeliest.values, probabilities_NV.gather(1, came)[:, 0])))

    @classmethod
    def joined(cls, pieces):
        """Pieces of one text, in order, as one."""
        return cls(*(np.concatenate(parts) for parts in zip(*((p.ids_Nk, p.probabilities_Nk, p.of_byte_N) for p in pieces))))

    @property
    def bits_per_byte(self):
        """Bits that the bytes cost the model; the document's end is not counted."""
        return float(-np.log2(np.maximum(self.of_byte_N, 1e-30), dtype=np.float64).mean())


def stream_guesses(model, document, k=5, precision="fp32", progress=None):
    """An entropy model's entropies [N + 1] of a document, as `EntropyPatcher` computes them, and its `Guesses`."""
    pieces, document = [], to_bytes(document)

    def visit(low, high, logits_NV):
        pieces.append(Guesses.of_logits(logits_NV, document[low:high], k))

    H = stream_entropies(model, DocumentStream.of_documents([document]), lanes=1, precision=precision, progress=progress, visit=visit)
    return H, Guesses.joined(pieces)


def to_bytes(byte_sequence):
    """bytes, bytearray, memoryview, list of ints, uint8 array or tensor, or str (as UTF-8) -> uint8 array [N]."""
    if isinstance(byte_sequence, str):
        byte_sequence = byte_sequence.encode("utf-8", "surrogatepass")
    if isinstance(byte_sequence, (bytes, bytearray, memoryview)):
        return np.frombuffer(bytes(byte_sequence), dtype=np.uint8)
    if isinstance(byte_sequence, torch.Tensor):
        byte_sequence = byte_sequence.detach().cpu().numpy()
    values = np.asarray(byte_sequence)
    if values.ndim != 1 or (values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 255)):
        raise ValueError("a byte sequence must be bytes, str, or one row of whole numbers from 0 to 255")
    return values.astype(np.uint8)


class EntropyPatcher:
    """Cuts byte sequences into patches by an entropy model's uncertainty.

    EntropyPatcher(entropy_model, threshold=0.6, method="global"), or EntropyPatcher(entropy_model, patch_config).
    entropy_model: `MinimalLLM`; None for the methods that need none (static, space, bpe).
    precision: of the entropy model's matrix products: fp32, or bf16/fp16 for speed (entropies then move by some 0.01 nats).
    """

    def __init__(self, entropy_model, patch_config=None, *, threshold=None, method=None, precision="fp32"):
        if patch_config is None:
            patch_config = PatchConfig(method=method or "global", entropy_threshold=0.6 if threshold is None else threshold)
        elif threshold is not None or method is not None:
            raise ValueError("pass either a PatchConfig or threshold and method, not both")
        if not isinstance(patch_config, PatchConfig):
            raise ValueError(f"patch_config must be a PatchConfig, not {type(patch_config).__name__}; a threshold goes by name: threshold=0.6")
        if entropy_model is None and patch_config.method in NEEDS_ENTROPIES:
            raise ValueError(f"method {patch_config.method!r} needs an entropy model; train one: python entropy_llm.py")
        self.entropy_model, self.config, self.precision = entropy_model, patch_config, precision
        self.tokenizer = load_tokenizer(patch_config.tokenizer_path) if patch_config.method == "bpe" else None

    @property
    def is_causal(self):
        """Whether a start depends on earlier bytes only (all methods but bpe)."""
        return self.config.method != "bpe"

    def entropies(self, byte_sequence):
        """Entropy in nats of the distribution for byte t, given the boundary and the bytes before t: float32 [N]."""
        return self._entropies_with_end([to_bytes(byte_sequence)])[0][:-1]

    def _entropies_with_end(self, documents, progress=None):
        """List of float32 [N + 1]: for every byte of each document and for its end."""
        if self.entropy_model is None:
            raise ValueError("there is no entropy model to compute entropies with")
        if not documents:
            return []
        stream = DocumentStream.of_documents(documents)
        lanes = min(8, len(documents))
        flat = stream_entropies(self.entropy_model, stream, lanes, precision=self.precision, progress=progress)
        return np.split(flat, stream.ends[:-1])

    def starts(self, byte_sequence, entropies=None):
        """Which places open a patch, the document's end included: bool [N + 1]."""
        document = to_bytes(byte_sequence)
        if self.config.method in NEEDS_ENTROPIES and entropies is None:
            entropies = self._entropies_with_end([document])[0]
        with_end = np.append(document, np.uint8(0))  # no rule reads the byte it decides about
        token_starts = bpe_starts(self.tokenizer, document) if self.config.method == "bpe" else None
        return patch_starts(entropies, **self.config.rule, byte_values=with_end, token_starts=token_starts)

    def create_patches(self, byte_sequence):
        """The patches of a byte sequence, a list of bytes that concatenate to it. The empty sequence has none."""
        document = to_bytes(byte_sequence)
        return split_at(document, self.starts(document)[:-1])

    def process_data(self, byte_sequences, cache_key=None):
        """Patch many sequences: (a list of patches for each sequence, statistics).

        cache_key: name under which the entropies are kept in config.cache_dir; a second call with the same key, model and
        sequences reads them. Kept entropies of another model or other sequences are refused with ValueError.
        """
        documents = [to_bytes(sequence) for sequence in byte_sequences]
        entropies = None
        if self.entropy_model is not None:
            cached = cache_key is not None and self.config.cache_patches
            entropies = self._cached_entropies(documents, cache_key) if cached else self._entropies_with_end(documents)
        starts = [self.starts(d, None if entropies is None else entropies[i])[:-1] for i, d in enumerate(documents)]
        sizes = np.concatenate([patch_sizes(s) for s in starts] or [np.empty(0, np.int64)])
        flat = np.concatenate([e[:-1] for e in entropies]) if entropies else np.empty(0, np.float32)
        return [split_at(d, s) for d, s in zip(documents, starts)], patch_statistics(sizes, flat)

    def _cached_entropies(self, documents, cache_key):
        from save_entropy_model import model_hash

        if not cache_key or Path(cache_key).name != cache_key:
            raise ValueError(f"cache_key is {cache_key!r}; it must be a plain file name")
        made_from = {"sequences": hash_of_documents(documents), "entropy_model": model_hash(self.entropy_model), "precision": self.precision}
        path = Path(self.config.cache_dir) / f"{cache_key}.npz"
        lengths = [len(d) + 1 for d in documents]
        if path.exists():
            with np.load(path) as kept:
                for name, value in made_from.items():
                    if str(kept[name]) != value:
                        raise ValueError(f"{path} was made from another {name.replace('_', ' ')}; delete it or use another cache_key")
                flat = kept["entropies"]
        else:
            flat = np.concatenate(self._entropies_with_end(documents) or [np.empty(0, np.float32)])

            def write(temporary):
                with open(temporary, "wb") as file:
                    np.savez(file, entropies=flat, **made_from)

            write_aside(path, write)
        return np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []


def split_at(document, starts):
    """uint8 [N] and bool [N] -> the list of patches as bytes."""
    places = np.flatnonzero(starts).tolist() + [len(document)]
    raw = document.tobytes()
    return [raw[begin:end] for begin, end in zip(places[:-1], places[1:])]


def patch_sizes(starts):
    """Lengths of the patches that bool [N] cuts, int64 [P]."""
    return np.diff(np.flatnonzero(starts), append=len(starts)) if len(starts) else np.empty(0, np.int64)


def patch_statistics(sizes, entropies_nats):
    """Total and sizes of patches: total_patches, avg/min/max_patch_size (bytes), avg_entropy (nats), patch_size_histogram."""
    values, counts = np.unique(sizes, return_counts=True)
    return {
        "total_patches": int(len(sizes)),
        "avg_patch_size": float(sizes.mean()) if len(sizes) else 0.0,
        "avg_entropy": float(np.mean(entropies_nats, dtype=np.float64)) if len(entropies_nats) else float("nan"),
        "min_patch_size": int(sizes.min()) if len(sizes) else 0,
        "max_patch_size": int(sizes.max()) if len(sizes) else 0,
        "patch_size_histogram": {int(size): int(count) for size, count in zip(values, counts)},
    }


def analyze_entropy_distribution(entropy_model, byte_sequences):
    """Mean, std, min, max and percentiles of the entropies, in nats: for choosing a threshold by hand."""
    entropies = EntropyPatcher(entropy_model)._entropies_with_end([to_bytes(sequence) for sequence in byte_sequences])
    return entropy_distribution(np.concatenate([e[:-1] for e in entropies] or [np.empty(0, np.float32)]))


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


# ---------------------------------------------------------------------------------------------------------------------
# BPE boundaries, for comparison


def train_tokenizer(documents, vocab_size, path):
    """Train a byte-level BPE on uint8 documents and write it as a tokenizer.json. Bytes are read as latin-1: any bytes will do."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z\x80-\xff]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=[chr(b) for b in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator((d.tobytes().decode("latin-1") for d in documents), trainer)
    write_aside(path, lambda temporary: tokenizer.save(temporary))
    return tokenizer


def load_tokenizer(path):
    """A tokenizer that `train_tokenizer` wrote."""
    if path is None or not Path(path).exists():
        raise FileNotFoundError(f"method 'bpe' needs a tokenizer, and {path} is none; run: python create_patches.py --method bpe")
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def bpe_starts(tokenizer, document):
    """Starts of the document's BPE tokens, and of its end: bool [N + 1]."""
    starts = np.zeros(len(document) + 1, dtype=bool)
    starts[[begin for begin, _ in tokenizer.encode(document.tobytes().decode("latin-1")).offsets]] = True
    starts[-1] = True
    return starts
