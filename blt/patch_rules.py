"""The patching methods (BLT sections 2.1 to 2.3): each is one small class with its two forms side by side.

Index t always means "about byte t, from what is before t": entropies[t] is the entropy, in nats,
of the entropy model's distribution for byte t given the bytes before it, and is_start[t] says
whether byte t starts a patch. Every causal method can therefore be followed while text is
generated. `bpe` looks ahead and serves comparisons only.

A document of N bytes has N + 1 positions: one for each byte and one for its end. The end is a
position like any other: if it always started a patch, the patches would tell the model that the
text is over.

To add a method, write a subclass of `PatchRule` with `register` above it, here or in your own
script. It needs

    wants_start           the vectorised form: all positions of a text at once, for training and evaluation
    wants_start_online    the same decision for one position of many texts, for generation and compression

Command lines, messages and tests take their lists from `RULES`. The table in docs/patching.md and the
JavaScript of the interactive page are written by hand; tests say what is missing there. A model that
was trained with a method of your own script can be loaded only where that script has been imported.
Everything here is NumPy.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from blt.checks import check
from blt.commands import command

# Bytes a patch where neither a threshold nor a size is given: about that of the released models.
DEFAULT_PATCH_SIZE = 4.5
# What is before a document's first byte. `blt.ids.BOUNDARY` is the same number, but this module
# imports NumPy only.
BOUNDARY = 256

RULES = {}  # {name: PatchRule}, in the order in which the methods are listed everywhere


@dataclass
class Texts:
    """What the vectorised forms read: one or several documents, one after the other, N positions in all."""

    entropies: np.ndarray | None  # float32 or float64 [N], nats
    byte_values: np.ndarray | None  # uint8 [N]; the value at a document's end is arbitrary
    token_starts: np.ndarray | None  # bool [N], where a BPE token begins
    is_document_start: np.ndarray  # bool [N]; position 0 is always one


@dataclass
class NextPositions:
    """What the online forms read: the next position of each of B texts, about which they decide."""

    entropies_B: np.ndarray | None  # float32 [B], nats, of this position
    previous_entropies_B: np.ndarray  # float32 [B], of the position before it
    position_B: np.ndarray  # int64 [B], how many bytes of this document come before the position
    patch_size_B: np.ndarray  # int64 [B], bytes in the open patch so far
    entropy_sum_B: np.ndarray  # float64 [B], entropies of the open patch, added up
    last_byte_B: np.ndarray  # int64 [B], the byte before this position; 256 at a document's first position
    byte_before_last_B: np.ndarray  # int64 [B], the byte before that


class PatchRule:
    """A patching method. `threshold` and `rise` are PatchConfig's entropy_threshold and monotonic_threshold."""

    name = None  # as in PatchConfig.method and --method
    condition = None  # in words: "byte t starts a patch if ..."
    unit = "nats"  # of the threshold: nats, bytes (the threshold is the patch size), or None (no threshold)
    needs_entropies = True
    is_causal = True  # False: a start depends on later bytes; training, generation and the leak gate refuse it
    depends_on_patch = False  # True: a start depends on where the open patch began; then define next_start
    compares_entropy = False  # True: the threshold is a level of the entropy, which pictures draw as a line
    uses_rise = False  # True: the monotonic threshold counts too

    def wants_start(self, texts, threshold, rise):
        """Which positions of `Texts` start a patch, minimum and maximum sizes apart: bool [N]."""
        raise NotImplementedError

    def wants_start_online(self, rows, threshold, rise):
        """Whether these `NextPositions` start a patch, minimum and maximum sizes apart: bool [B]."""
        raise NotImplementedError

    def next_start(self, texts, threshold, rise):
        """A function (begin, low) -> the first start at or after `low` of a patch that began at `begin`.

        begin, low: int arrays of equal shape. The result is N or more where no later position
        starts one.
        """
        first_true = _first_true_at_or_after(self.wants_start(texts, threshold, rise))
        return lambda begin, low: first_true[np.minimum(low, len(first_true) - 1)]

    def threshold_range(self, entropies):
        """(low, high): thresholds between which the average patch size varies, for entropies float32 [N]."""
        return float(entropies.min()) - 1e-3, float(entropies.max()) + 1e-3


def register(rule_class):
    """Class decorator: add a method to `RULES`. Raises TypeError, at import, for a method that lacks a part."""
    name = rule_class.name
    vectorised = "next_start" if rule_class.depends_on_patch else "wants_start"
    parts = ["name", "condition", vectorised]
    if rule_class.is_causal:
        parts.append("wants_start_online")
    # An attribute that is still the base class's own has not been written.
    missing = [part for part in parts if getattr(rule_class, part) is getattr(PatchRule, part)]
    if missing:
        raise TypeError(f"patching method {name or rule_class.__name__!r} has no {' and no '.join(missing)}")
    if name in RULES:
        raise TypeError(f"there is a patching method {name!r} already")
    RULES[name] = rule_class()
    return rule_class


def rule_of(method):
    """The `PatchRule` of this name. Raises ValueError if there is none."""
    if method not in RULES:
        raise ValueError(f"patch method is {method!r}; it must be one of {', '.join(RULES)}")
    return RULES[method]


def check_thresholds(method, target_patch_size, entropy_threshold, monotonic_threshold=0.0):
    """Raise ValueError for flags (None: not given) that contradict each other or that the method ignores."""
    if target_patch_size is not None and entropy_threshold is not None:
        raise ValueError("give either target_patch_size or entropy_threshold, not both: one follows from the other")
    given = {"target_patch_size": target_patch_size, "entropy_threshold": entropy_threshold}
    names = [name for name, value in given.items() if value is not None]
    if names and rule_of(method).unit is None:
        raise ValueError(f"method {method} has no threshold, its patches are what the text gives; leave out {names[0]}")
    if monotonic_threshold != 0 and not rule_of(method).uses_rise:
        users = ", ".join(rule.name for rule in RULES.values() if rule.uses_rise)
        raise ValueError(f"monotonic_threshold is of method {users}; leave it out with method {method}")


def causal_methods():
    """Names of the methods that training and generation accept: all that do not look ahead."""
    return [rule.name for rule in RULES.values() if rule.is_causal]


# The methods


@register
class GlobalRule(PatchRule):
    """The paper's equation 1, and the rule of the released models."""

    name = "global"
    condition = "its entropy is above the threshold"
    compares_entropy = True

    def wants_start(self, texts, threshold, rise):
        # Above, not at: as the released code compares.
        return texts.entropies > threshold

    def wants_start_online(self, rows, threshold, rise):
        return rows.entropies_B > threshold


@register
class MonotonicRule(PatchRule):
    """The paper's equation 2, the approximate monotonic constraint. The released code also forces a start at byte 1."""

    name = "monotonic"
    condition = "its entropy has risen by more than the threshold"

    def wants_start(self, texts, threshold, rise):
        return entropy_rise(texts.entropies) > threshold

    def wants_start_online(self, rows, threshold, rise):
        return rows.entropies_B - rows.previous_entropies_B > threshold

    def threshold_range(self, entropies):
        # The first position has no rise.
        rises = entropy_rise(entropies)[1:]
        return float(rises.min(initial=np.inf)) - 1e-3, float(rises.max(initial=-np.inf)) + 1e-3


@register
class BothRule(PatchRule):
    """Equations 1 and 2 together, with a threshold each."""

    name = "both"
    condition = "its entropy is above the threshold and has risen by more than the monotonic threshold"
    compares_entropy = True
    uses_rise = True

    def wants_start(self, texts, threshold, rise):
        return (texts.entropies > threshold) & (entropy_rise(texts.entropies) > rise)

    def wants_start_online(self, rows, threshold, rise):
        return (rows.entropies_B > threshold) & (rows.entropies_B - rows.previous_entropies_B > rise)


@register
class CumulativeRule(PatchRule):
    """Every patch holds about the same uncertainty."""

    name = "cumulative"
    condition = "the entropies since the patch began, its own included, sum to more than the threshold"
    depends_on_patch = True

    def next_start(self, texts, threshold, rise):
        # In float64: the sums run over whole corpora.
        total = np.concatenate(([0.0], np.cumsum(texts.entropies, dtype=np.float64)))

        def first_above(begin, low):
            # total[t + 1] - total[begin] is the sum from `begin` to t; it rises with t, so a
            # binary search finds t.
            return np.maximum(np.searchsorted(total, total[begin] + threshold, side="right") - 1, low)

        return first_above

    def wants_start_online(self, rows, threshold, rise):
        return rows.entropy_sum_B + rows.entropies_B > threshold

    def threshold_range(self, entropies):
        return 0.0, float(entropies.sum(dtype=np.float64)) + 1.0


@register
class StaticRule(PatchRule):
    """Patches of a fixed size (paper, section 2.1). A fractional size alternates: 4.5 gives 5, 4, 5, 4, ..."""

    name = "static"
    condition = "t is a multiple of the threshold, a number of bytes"
    unit = "bytes"
    needs_entropies = False

    def wants_start(self, texts, threshold, rise):
        document_start = _last_true_at_or_before(texts.is_document_start)
        return self._is_multiple(np.arange(len(document_start)) - document_start, threshold)

    def wants_start_online(self, rows, threshold, rise):
        return self._is_multiple(rows.position_B, threshold)

    @staticmethod
    def _is_multiple(position, size):
        if size == int(size):
            return position % int(size) == 0
        # A fractional size: a multiple of it lies between this position and the one before.
        return position // size > (position - 1) // size


@register
class SpaceRule(PatchRule):
    """The paper's section 2.2: patches begin after space-like bytes, so they are words with the space that follows."""

    name = "space"
    condition = "it follows a space-like byte that follows one which is not space-like"
    unit = None
    needs_entropies = False

    # Space-like: not an ASCII letter or digit, and not a UTF-8 continuation byte. The boundary
    # (256) is space-like.
    is_space_like = np.ones(257, dtype=bool)
    for _first, _last in (("0", "9"), ("A", "Z"), ("a", "z"), ("\x80", "\xbf")):
        is_space_like[ord(_first) : ord(_last) + 1] = False

    def wants_start(self, texts, threshold, rise):
        is_space = self.is_space_like[np.asarray(texts.byte_values)]
        # At each byte: is the byte before it space-like? Before a document's first byte is the boundary.
        space_before = np.roll(is_space, 1)
        space_before[texts.is_document_start] = True
        ends_word = is_space & ~space_before
        # The patch starts one byte later, after the space-like byte.
        starts = np.roll(ends_word, 1)
        starts[0] = False
        return starts

    def wants_start_online(self, rows, threshold, rise):
        return self.is_space_like[rows.last_byte_B] & ~self.is_space_like[rows.byte_before_last_B]


@register
class BPERule(PatchRule):
    """Token boundaries as patch starts. A token's end depends on later bytes, so this serves comparisons only."""

    name = "bpe"
    condition = "a BPE token begins there; looks ahead, for comparison only"
    unit = None
    needs_entropies = False
    is_causal = False

    def wants_start(self, texts, threshold, rise):
        return np.array(texts.token_starts, dtype=bool)


# A rule with its settings


@dataclass
class PatchConfig:
    """A patching method and its settings."""

    method: str = "global"  # a name in `RULES`
    entropy_threshold: float = 0.6  # nats; for static: bytes in a patch
    monotonic_threshold: float = 0.0  # nats; both: the rise of entropy that a start also needs
    min_patch_size: int = 1  # bytes; a start that comes earlier is suppressed
    max_patch_size: int | None = None  # bytes; a patch that reaches this size is closed; None: no limit
    cache_patches: bool = True  # process_data keeps its entropies on disk under a cache_key
    cache_dir: str = "patch_cache"  # where
    tokenizer_path: str | None = None  # bpe: a tokenizer.json whose tokens are the patches

    def __post_init__(self):
        check(self, "method", self.method in RULES, "one of " + ", ".join(RULES))
        check(self, "entropy_threshold", math.isfinite(self.entropy_threshold), "a finite number")
        check(self, "monotonic_threshold", math.isfinite(self.monotonic_threshold), "a finite number")
        if self.rule.unit == "bytes":
            check(self, "entropy_threshold", self.entropy_threshold >= 1, f"1 or more bytes with method {self.method}")
        check(self, "min_patch_size", self.min_patch_size >= 1, "1 or more")
        if self.max_patch_size is not None:
            check(self, "max_patch_size", self.max_patch_size >= self.min_patch_size, "at least min_patch_size")

    @property
    def rule(self):
        """The `PatchRule` of the method."""
        return RULES[self.method]

    @property
    def needs_entropies(self):
        return self.rule.needs_entropies

    def arguments(self):
        """What `patch_starts` takes from this config, as keyword arguments."""
        return {
            "method": self.method,
            "threshold": self.entropy_threshold,
            "monotonic_threshold": self.monotonic_threshold,
            "min_patch_size": self.min_patch_size,
            "max_patch_size": self.max_patch_size,
        }

    def entropy_level(self):
        """The threshold in nats where the rule compares the entropy itself with it, to draw as a line; else None."""
        return self.entropy_threshold if self.rule.compares_entropy else None

    def describe(self):
        """In words: "global, threshold 1.335 nats, at most 16 bytes"."""
        words = [self.method]
        if self.rule.unit:
            words.append(f"threshold {self.entropy_threshold:.3f} {self.rule.unit}")
        if self.rule.uses_rise:
            words.append(f"rise {self.monotonic_threshold:.3f} nats")
        if self.min_patch_size > 1:
            words.append(f"at least {self.min_patch_size} bytes")
        if self.max_patch_size is not None:
            words.append(f"at most {self.max_patch_size} bytes")
        return ", ".join(words)


def refuse_lookahead(patch_config, purpose):
    """Raise ValueError if a method looks ahead. purpose: what it cannot do, "train"."""
    if not patch_config.rule.is_causal:
        raise ValueError(
            f"patch method {patch_config.method!r} looks ahead: it serves comparisons of boundaries only and cannot "
            f"{purpose}; use one of {', '.join(causal_methods())}"
        )


# From a rule to patch starts


def patch_starts(
    entropies,
    method="global",
    threshold=0.6,
    *,
    monotonic_threshold=0.0,
    min_patch_size=1,
    max_patch_size=None,
    byte_values=None,
    token_starts=None,
    document_starts=None,
):
    """Which positions start a patch: bool [N], by one vectorised pass. Position 0 always starts one.

    With H = entropies, byte t starts a patch iff
        global      H[t] > threshold                                        (paper, equation 1)
        monotonic   H[t] - H[t-1] > threshold                               (paper, equation 2, approximate)
        both        H[t] > threshold and H[t] - H[t-1] > monotonic_threshold
        cumulative  H[s] + ... + H[t] > threshold, where s is the first byte of the open patch
        static      t is a multiple of threshold (bytes)
        space       byte t-1 is space-like and byte t-2 is not (paper, section 2.2); needs byte_values
        bpe         token_starts[t]: looks ahead, for comparison only
    A start within min_patch_size bytes of the last one is suppressed; after max_patch_size bytes one is forced.

    Worked example (threshold 1.335): H = 3.0 2.5 2.0 1.0 .5 .4 2.4 gives starts at 0, 1, 2 and 6.

    entropies: float [N], nats; None for methods without entropies when byte_values or
    token_starts give N.
    document_starts: bool [N], where documents begin when several are concatenated.
    Raises ValueError for an unknown method and for a missing input.
    """
    rule = rule_of(method)
    if rule.needs_entropies and entropies is None:
        raise ValueError(f"method {method!r} needs entropies")
    inputs = [array for array in (entropies, byte_values, token_starts) if array is not None]
    if not inputs:
        raise ValueError("there is no text to split: pass byte_values")
    N = len(inputs[0])
    if N == 0:
        return np.zeros(0, dtype=bool)
    is_document_start = np.zeros(N, dtype=bool) if document_starts is None else np.array(document_starts, dtype=bool)
    # No patch crosses a document boundary: every document starts one.
    is_document_start[0] = True
    texts = Texts(_as_float32(entropies), byte_values, token_starts, is_document_start)

    # With a minimum size a start depends on where the patch before it began, so the chain is followed.
    if rule.depends_on_patch or min_patch_size > 1:
        next_start = rule.next_start(texts, threshold, monotonic_threshold)
        return _follow_chain(next_start, is_document_start, min_patch_size, max_patch_size)
    is_start = rule.wants_start(texts, threshold, monotonic_threshold) | is_document_start
    if max_patch_size is not None:
        # A long patch is divided from its beginning into pieces of the maximum size.
        bytes_since_start = np.arange(N) - _last_true_at_or_before(is_start)
        is_start |= bytes_since_start % max_patch_size == 0
    return is_start


def entropy_rise(entropies):
    """H[t] - H[t-1] for every t; minus infinity at 0."""
    rise = np.empty_like(entropies)
    rise[0] = -np.inf
    np.subtract(entropies[1:], entropies[:-1], out=rise[1:])
    return rise


def _as_float32(entropies):
    """Entropies as an array; float16, a cache's type, becomes float32, in which NumPy computes several times faster."""
    if entropies is None:
        return None
    array = np.asarray(entropies)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _last_true_at_or_before(flags):
    """For each position, the index of the last True at or before it; flags[0] must be True."""
    return np.maximum.accumulate(np.where(flags, np.arange(len(flags)), 0))


def _first_true_at_or_after(flags):
    """For each position 0..N, the index of the first True at or after it; N where there is none."""
    N = len(flags)
    # A running minimum from the right end.
    reversed_minimum = np.minimum.accumulate(np.where(flags, np.arange(N), N)[::-1])
    return np.append(reversed_minimum[::-1], N)


def _follow_chain(next_start, is_document_start, min_patch_size, max_patch_size, block=1 << 20):
    """Patch starts where each one depends on where the patch before it began: bool [N].

    For all positions s of a block at once, work out where a patch that begins at s would end;
    then follow the chain of ends from position 0. Only the following is a Python loop, and it
    takes one step a patch.
    """
    N = len(is_document_start)
    is_start = np.zeros(N, dtype=bool)
    next_document = _first_true_at_or_after(is_document_start)
    position = 0
    for first in range(0, N, block):
        begin = np.arange(first, min(first + block, N))
        end = next_start(begin, begin + min_patch_size)
        # A patch ends early at its maximum size, and where its document ends.
        if max_patch_size is not None:
            end = np.minimum(end, begin + max_patch_size)
        end = np.minimum(end, next_document[begin + 1]).tolist()
        chain = []
        while position < first + len(end):
            chain.append(position)
            position = end[position - first]
        is_start[chain] = True
    return is_start


class OnlineStarts:
    """The decisions of `patch_starts` position by position, for B texts that are still being written.

    config: `PatchConfig` of a causal method. `state` has one value a text in each array; `reset`
    begins texts again. Gives the same starts as `patch_starts` over the whole text.
    """

    def __init__(self, config, n_texts):
        refuse_lookahead(config, "follow a text that is being written")
        self.config = config
        self.state = {
            "position": np.zeros(n_texts, np.int64),
            "patch_size": np.zeros(n_texts, np.int64),
            "entropy_sum": np.zeros(n_texts),
            "previous_entropy": np.zeros(n_texts, np.float32),
            "last_byte": np.full(n_texts, BOUNDARY),
        }

    def reset(self, rows):
        """Forget these texts: the next position of each is the first of a new document.

        rows: an index or a mask over the texts.
        """
        for name, values in self.state.items():
            values[rows] = BOUNDARY if name == "last_byte" else 0

    def copy_state(self):
        """A copy of `state`, to assign back when the positions read since are rolled back."""
        return {name: values.copy() for name, values in self.state.items()}

    def step(self, entropies_B, last_bytes_B, is_active_B):
        """Whether the next position of each text starts a patch: bool [B], False for texts that are not active.

        entropies_B: float32, nats, of that position; None for methods without entropies.
        last_bytes_B: the byte before it; for a document's first position any value.
        """
        config, state = self.config, self.state
        # What is before a document is its boundary, whatever the caller passes.
        is_first = state["position"] == 0
        last_byte_B = np.where(is_first, BOUNDARY, last_bytes_B)
        rows = NextPositions(
            entropies_B=entropies_B,
            previous_entropies_B=state["previous_entropy"],
            position_B=state["position"],
            patch_size_B=state["patch_size"],
            entropy_sum_B=state["entropy_sum"],
            last_byte_B=last_byte_B,
            byte_before_last_B=state["last_byte"],
        )
        is_start = config.rule.wants_start_online(rows, config.entropy_threshold, config.monotonic_threshold)
        is_start = is_start & (state["patch_size"] >= config.min_patch_size)
        if config.max_patch_size is not None:
            is_start |= state["patch_size"] >= config.max_patch_size
        is_start |= is_first

        # The state after this position, which is now decided: a start begins a patch of one byte.
        after = {
            "position": state["position"] + 1,
            "patch_size": np.where(is_start, 1, state["patch_size"] + 1),
            "last_byte": last_byte_B,
        }
        if entropies_B is not None:
            after["entropy_sum"] = np.where(is_start, 0.0, state["entropy_sum"]) + entropies_B
            after["previous_entropy"] = entropies_B
        # Texts that read nothing in this step keep their state.
        for name, values in after.items():
            np.copyto(state[name], values, where=is_active_B)
        return is_start & is_active_B


# Thresholds


def check_finite(entropies):
    """Raise ValueError unless all entropies of an array are finite."""
    # NaN is above no threshold: it would give patches as long as the text, without a word.
    if not np.isfinite(entropies).all():
        raise ValueError(
            "the entropy model gives entropies that are not finite; compute them in fp32, "
            f"or train it again: {command('entropy_llm.py')}"
        )


def threshold_for_patch_size(entropies, method, target, document_starts=None, **options):
    """The threshold that gives patches of `target` bytes on average, as near as there is one.

    options: further arguments of `patch_starts`.
    Raises ValueError for a method without a threshold. Example: entropies 1 2 3 4 5 6, global,
    target 3 gives a threshold between 4 and 5: starts at 0 and where the entropy is above it.
    """
    if target < 1:
        raise ValueError(f"target patch size is {target}; it must be at least 1 byte")
    rule = rule_of(method)
    if rule.unit == "bytes":
        return float(target)
    if rule.unit is None:
        raise ValueError(f"method {method!r} has no threshold; its patch size is what the text gives")
    H = np.asarray(entropies, dtype=np.float32)
    if len(H) == 0:
        raise ValueError("there are no entropies to find a threshold for")
    check_finite(H)
    low, high = rule.threshold_range(H)
    if not math.isfinite(low):
        # A single entropy has no rise, so every threshold gives the same patch.
        return 0.0
    wanted_patches = len(H) / target
    # A higher threshold gives fewer patches, so bisection finds it.
    for _ in range(40):
        middle = (low + high) / 2
        patches = patch_starts(H, method, middle, document_starts=document_starts, **options).sum()
        if patches > wanted_patches:
            low = middle
        else:
            high = middle
        if high - low < 1e-5:
            break
    return (low + high) / 2


def calibrate(patch_config, target_patch_size, entropies, document_starts=None):
    """The same config with the threshold that gives this patch size on a sample of entropies (one value a position).

    A method without a threshold stays as it is.
    """
    if patch_config.rule.unit is None:
        return patch_config
    options = patch_config.arguments()
    method = options.pop("method")
    options.pop("threshold")
    threshold = threshold_for_patch_size(entropies, method, target_patch_size, document_starts, **options)
    return replace(patch_config, entropy_threshold=threshold)


# Patches and their sizes


def split_at(document, is_start):
    """A uint8 [N] document and its starts, bool [N], as the list of its patches in bytes."""
    begins = np.flatnonzero(is_start).tolist()
    ends = [*begins[1:], len(document)]
    raw = document.tobytes()
    return [raw[begin:end] for begin, end in zip(begins, ends)]


def patch_sizes(is_start):
    """Sizes in bytes of the patches that starts, bool [N], make: int64 [P]."""
    if not len(is_start):
        return np.empty(0, np.int64)
    return np.diff(np.flatnonzero(is_start), append=len(is_start))


def patch_statistics(sizes, entropies_nats):
    """A dict: total_patches, avg/min/max_patch_size (bytes), avg_entropy (nats), patch_size_histogram.

    sizes: bytes of each patch, int [P], or how many patches have which size, {size: count}.
    """
    counts = sizes if isinstance(sizes, dict) else count_sizes(sizes)
    n_patches = sum(counts.values())
    return {
        "total_patches": n_patches,
        "avg_patch_size": sum(size * count for size, count in counts.items()) / n_patches if n_patches else 0.0,
        "avg_entropy": float(np.mean(entropies_nats, dtype=np.float64)) if len(entropies_nats) else float("nan"),
        "min_patch_size": min(counts, default=0),
        "max_patch_size": max(counts, default=0),
        "patch_size_histogram": counts,
    }


def count_sizes(sizes):
    """How many of the patches have which size: int [P] -> {size: count}, the smallest size first."""
    values, counts = np.unique(sizes, return_counts=True)
    return {int(size): int(count) for size, count in zip(values, counts)}


def warn_about_sizes(patches, total_bytes, documents, patch_config):
    """Warn if nearly every byte is a patch, or nearly a whole document: both waste the latent transformer."""
    size = total_bytes / max(1, patches)
    if size < 1.1:
        change = "raise"
        warning = f"{size:.2f} bytes a patch: nearly every byte is a patch of its own"
    elif patches <= 1.1 * documents:
        change = "lower"
        warning = f"{patches:,} patches in {documents:,} documents: nearly a whole document is one patch"
    else:
        return
    if patch_config.rule.unit is None:
        advice = "choose another --method (--patch_method of training scripts)"
    else:
        threshold = f"the threshold ({patch_config.entropy_threshold:.3f})"
        advice = f"{change} {threshold} or use --target_patch_size {DEFAULT_PATCH_SIZE}"
    print(f"warning: {warning}; {advice}")
