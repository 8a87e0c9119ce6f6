"""From entropies to patches: the patching rules, EntropyPatcher, thresholds (BLT sections 2.1 to 2.3).

Index t always means "about byte t, from what stands before t": entropies[t] is the entropy, in nats, of the model's
distribution for byte t given the bytes before it, and starts[t] says whether byte t opens a patch. So every rule here can
be followed while text is being generated; `bpe` alone looks ahead, for comparison.

A document of N bytes has N + 1 places: one for each byte and one for its end. Whether a patch is complete when the
document ends is decided like everywhere else, from what stands before; the model must not be told by a patch that the text
is over.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from blt.checks import check

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
        raise ValueError(
            f"method {method!r} needs entropies" if method in NEEDS_ENTROPIES else "nothing to cut: pass byte_values"
        )
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
    return lambda patch_begin, low: np.maximum(
        np.searchsorted(total, total[patch_begin] + threshold, side="right") - 1, low
    )


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


DEFAULT_PATCH_SIZE = (
    4.5  # bytes a patch where neither a threshold nor a size is given: about that of the released models
)


def calibrate(patch_config, target_patch_size, sample):
    """The same rule with the threshold that gives this patch size on a sample of entropies with their document starts.

    space and bpe have no threshold and stay as they are.
    """
    if patch_config.method in ("space", "bpe"):
        return patch_config
    H, document_starts = sample
    rule = {name: value for name, value in patch_config.rule.items() if name not in ("method", "threshold")}
    threshold = threshold_for_patch_size(H, patch_config.method, target_patch_size, document_starts, **rule)
    return replace(patch_config, entropy_threshold=threshold)


def warn_about_sizes(patches, total_bytes, documents, threshold):
    """Say so when a rule cuts at every byte or nowhere: both waste the latent transformer."""
    size = total_bytes / max(1, patches)
    advice = f"the threshold ({threshold:.3f}) or use --target_patch_size {DEFAULT_PATCH_SIZE}"
    if size < 1.1:
        print(f"warning: {size:.2f} bytes a patch: nearly every byte is a patch of its own; raise {advice}")
    if patches <= 1.1 * documents:
        print(
            f"warning: {patches:,} patches in {documents:,} documents: nearly a whole document is one patch; lower {advice}"
        )
