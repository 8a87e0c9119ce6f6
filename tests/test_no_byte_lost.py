"""Random bytes through every patching method, the entropy pass and the rows: each byte comes out once, in order."""

import numpy as np
import pytest
from helpers import tiny_entropy_model

from blt.entropies import stream_entropies
from blt.ids import BOUNDARY
from blt.patch_rules import RULES, PatchConfig, causal_methods, patch_sizes, patch_starts
from blt.rows import BitArray, DocumentStream, TrainingRows, evaluation_batches
from blt.tokens import train_tokenizer
from blt.training_patches import document_starts, training_patch_sizes, training_starts
from entropy_patcher import EntropyPatcher

# What the documents of a case are made of: all bytes, few of them, text, and what decoders stumble over.
ALPHABETS = (
    np.arange(256, dtype=np.uint8),
    np.frombuffer(b"ab ", np.uint8),
    np.frombuffer("Grüße, 世界. \r\n\t0".encode(), np.uint8),
    np.array([0, 0x80, 0xBF, 0xC0, 0xED, 0xFF], np.uint8),
)


@pytest.fixture(scope="module")
def model():
    return tiny_entropy_model(n_layers=2)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_tokenizer([np.tile(alphabet, 3) for alphabet in ALPHABETS], 300, str(path))
    return str(path)


def random_documents(rng):
    """One to four documents of 0 to 300 bytes."""
    documents = []
    for _ in range(rng.integers(1, 5)):
        alphabet = ALPHABETS[rng.integers(len(ALPHABETS))]
        documents.append(rng.choice(alphabet, rng.choice([0, 1, 2, 15, 16, 17, rng.integers(0, 300)])))
    return documents


def random_config(rng, method, tokenizer_path):
    """Any rule that a `PatchConfig` accepts."""
    low = int(rng.integers(1, 6))
    high = None if rng.random() < 0.5 else low + int(rng.integers(0, 20))
    # Entropies of an untrained model are about ln 256; thresholds lie below, above and among them.
    threshold = float(rng.integers(1, 9)) if RULES[method].unit == "bytes" else float(rng.uniform(-1, 12))
    path = tokenizer_path if method == "bpe" else None
    return PatchConfig(method, threshold, float(rng.normal()), low, high, tokenizer_path=path)


class Corpus:
    """What `training_starts` needs of one."""

    def __init__(self, documents):
        self.bytes = np.concatenate([*documents, np.empty(0, np.uint8)])
        self.offsets = np.cumsum([0, *(len(document) for document in documents)])


class Cache:
    """What `training_starts` needs of one: entropies of all documents."""

    def __init__(self, entropies, lengths):
        self.entropies = entropies
        self.ends = np.cumsum(lengths)

    def of_documents(self, first, end):
        begin = int(self.ends[first - 1]) if first else 0
        return self.entropies[begin : int(self.ends[end - 1])]


def ids_of(batch, row):
    """Scored targets of a row, in order."""
    return batch.ids[row, 1:][batch.is_scored[row]].tolist()


def check_case(number, model, tokenizer_path):
    rng = np.random.default_rng(number)
    methods = [*causal_methods(), "bpe"]
    documents = random_documents(rng)
    config = random_config(rng, methods[number % len(methods)], tokenizer_path)
    patcher = EntropyPatcher(model, config)
    stream = DocumentStream.of_documents(documents)
    stream_ids = [BOUNDARY]
    for document in documents:
        stream_ids += [*document.tolist(), BOUNDARY]
    # The stream itself, read in pieces of any size.
    cuts = np.sort(rng.integers(0, len(stream) + 1, 3)).tolist()
    pieces = [stream.ids(begin, end) for begin, end in zip([0, *cuts], [*cuts, len(stream)])]
    assert np.concatenate(pieces).tolist() == stream_ids

    # Entropies: one number a byte and one a document's end.
    lengths = np.array([len(document) + 1 for document in documents])
    n_streams, chunk = int(rng.integers(1, 9)), int(rng.integers(1, 70))
    flat = stream_entropies(model, stream, n_streams, chunk)
    assert len(flat) == lengths.sum() and np.isfinite(flat).all() and (flat >= 0).all()
    entropies = np.split(flat, np.cumsum(lengths)[:-1])

    # Patches of each document.
    is_start = []
    for document, H in zip(documents, entropies):
        starts = patcher.starts(document, H)
        assert len(starts) == len(document) + 1 and starts[0]
        sizes = patch_sizes(starts[:-1])
        assert sizes.sum() == len(document)
        if config.max_patch_size is not None and len(sizes):
            assert sizes.max() <= config.max_patch_size
        is_start.append(starts)
    document = documents[0]
    assert b"".join(patcher.create_patches(document)) == document.tobytes()

    check_rows(rng, documents, is_start, stream, stream_ids)
    if config.method == "bpe":
        return
    # All documents in one pass have the patches of each alone.
    numbers = np.arange(len(documents))
    corpus = Corpus(documents)
    cached = training_starts(corpus, numbers, config, Cache(flat, lengths))
    assert cached.read(1, len(stream)).tolist() == np.concatenate(is_start).tolist()
    sizes = training_patch_sizes(cached, corpus, numbers)
    assert sum(size * count for size, count in sizes.items()) == len(corpus.bytes)
    # Wherever a block of positions ends, also at a document's end.
    assert training_patch_sizes(cached, corpus, numbers, block=int(rng.integers(1, 9))) == sizes
    assert (
        patch_starts(
            flat,
            **config.arguments(),
            byte_values=stream.ids(1, len(stream)).astype(np.uint8),
            document_starts=document_starts(lengths),
        ).tolist()
        == np.concatenate(is_start).tolist()
    )


def check_rows(rng, documents, is_start, stream, stream_ids):
    """Training rows have every id of the stream as a target once, evaluation rows those of every document."""
    row_bytes = int(rng.integers(2, 80))
    flags = BitArray()
    flags.append(np.concatenate([[True], *is_start]))
    flags.close()
    slots = None if rng.random() < 0.5 else int(rng.integers(4, 40))
    for rows in (TrainingRows(stream, row_bytes, flags, slots), TrainingRows(stream, row_bytes)):
        batch = rows.batch(range(len(rows)))
        targets = [target for row in range(len(rows)) for target in ids_of(batch, row)]
        assert targets == stream_ids[1:]
        assert batch.bytes == sum(len(document) for document in documents)

    scored = {}
    for batch in evaluation_batches(documents, is_start, row_bytes, batch_rows=3):
        for row, pieces in enumerate(batch.pieces):
            targets = ids_of(batch, row)
            for piece in pieces:
                count = piece.end - piece.scored_from
                scored.setdefault(piece.document, []).extend(targets[:count])
                targets = targets[count:]
            assert not targets
    for number, document in enumerate(documents):
        assert scored[number] == [*document.tolist(), BOUNDARY]


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_no_byte_is_lost(first, model, tokenizer_path):
    for number in range(first, first + 40):
        check_case(number, model, tokenizer_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 10_000, 1000))
def test_no_byte_is_lost_in_10000_cases(first, model, tokenizer_path):
    for number in range(first, first + 1000):
        check_case(number, model, tokenizer_path)
