"""Patches of a training corpus: the rule that create_patches.py has chosen, and where patches start."""

from collections import Counter
from pathlib import Path

import numpy as np

from blt.commands import command
from blt.files import read_sealed, write_sealed
from blt.patch_rules import PatchConfig, count_sizes, patch_starts
from blt.rows import BitArray, DocumentStream

# The version of patches.json.
FORMAT = 2
# Positions that are patched at once: tens of megabytes in memory.
BLOCK = 1 << 22
# Positions of training text from which a threshold is calibrated.
SAMPLE_POSITIONS = 2_000_000


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


# The rule


def write_patches(path, patch_config, facts):
    """Write patches.json: the rule, and what it was chosen on.

    facts: at least corpus_sha256 and entropy_model_sha256, which `read_patches` compares.
    """
    write_sealed(path, {"format": FORMAT, "patch_config": patch_config} | facts)


def read_patches(path, corpus, entropy_record, advice=None):
    """The `PatchConfig` in patches.json, checked.

    corpus: the `Corpus` in use. entropy_record: the `RunRecord` of the entropy model in use. None of
    either: it is not compared. A rule that needs no entropies is about neither.
    advice: what a message tells the user to do; None: the command that writes it.
    Raises FileNotFoundError if there is none, ValueError if it is damaged, outdated, or about another
    corpus or entropy model.
    """
    path = Path(path)
    if advice is None:
        advice = "run: " + command("create_patches.py", cache_dir=path.parent)
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; {advice}")
    try:
        chosen = read_sealed(path, FORMAT)
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from None
    missing = {"patch_config", "corpus_sha256", "entropy_model_sha256"} - set(chosen)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; {advice}")
    try:
        patch_config = PatchConfig(**chosen["patch_config"])
    # TypeError: settings that a PatchConfig does not have. ValueError: values that it refuses.
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no patching rule ({error}); {advice}") from None
    if patch_config.needs_entropies:
        if corpus is not None and chosen["corpus_sha256"] != corpus.hash:
            raise ValueError(f"{path} was made for another corpus (dataset {chosen.get('dataset')!r}); {advice}")
        is_named = entropy_record is not None
        if is_named and chosen["entropy_model_sha256"] != entropy_record.weights_sha256:
            made_with = chosen.get("entropy_model_path")
            raise ValueError(f"{path} was made with another entropy model ({made_with}); {advice}")
    return patch_config


# Patch starts


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


def training_sample(cache, n_documents, positions=SAMPLE_POSITIONS):
    """(entropies, is_document_start) of the first of these training documents, about this many positions.

    n_documents: how many training documents are in use. The cache may have more.
    """
    lengths = cache.lengths[: min(n_documents, len(cache.train))]
    count = max(1, int(np.searchsorted(np.cumsum(lengths), positions, side="right")))
    return cache.of_documents(0, count), document_starts(lengths[:count])


def training_patch_sizes(is_start, corpus, train, block=1 << 24):
    """How many of the training documents' patches have which size: {bytes: count}. Document ends count as no byte.

    Counts, because the sizes themselves would take more memory than the text.

    is_start: what `training_starts` returned. block: positions that are read at once.
    """
    lengths = np.diff(corpus.offsets)[train]
    document_ends = np.cumsum(lengths + 1)  # positions in the stream
    counts = Counter()
    unfinished = np.empty(0, np.int64)  # the last start of the block before, whose patch ends in the next block
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
        counts.update(count_sizes(np.diff(start_positions)[~is_end[:-1]]))
        # The last patch of the block ends in the next one, unless a document's end has closed it.
        unfinished = start_positions[-1:][~is_end[-1:]]
    return dict(sorted(counts.items()))
