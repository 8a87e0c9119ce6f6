"""Rows: what a model reads in training and evaluation.

Documents follow each other as ids, a boundary before each and one at the very end:

    256 d o c 0 256 d o c 1 256

A row is T + 1 neighbouring ids: the first T are inputs, the last T are targets.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from blt.ids import BYTES
from blt.segments import check_patch_lengths


class DocumentStream:
    """Documents as one sequence of ids, read piece by piece from the byte store (nothing is copied until it is asked for).

    flat_bytes: uint8 array or memory map; begins, lengths: int64 [documents], where each document lies in it.
    len(stream) counts ids: one boundary and the bytes of each document, and the last boundary.
    vocabulary: what the ids stand for; if not bytes, flat_bytes holds these ids.
    """

    def __init__(self, flat_bytes, begins, lengths, vocabulary=BYTES):
        self.flat_bytes, self.begins, self.lengths, self.vocabulary = (
            flat_bytes,
            np.asarray(begins),
            np.asarray(lengths),
            vocabulary,
        )
        self.ends = np.cumsum(self.lengths + 1)

    @classmethod
    def of_corpus(cls, corpus, numbers):
        """The stream of a corpus's documents of these numbers, in this order."""
        return cls(corpus.bytes, corpus.offsets[numbers], np.diff(corpus.offsets)[numbers])

    @classmethod
    def of_documents(cls, documents, vocabulary=BYTES):
        """The stream of a list of uint8 arrays (or arrays of a vocabulary's ids)."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        flat = np.concatenate([*documents, np.empty(0, np.uint8)])
        return cls(flat, np.cumsum(lengths) - lengths, lengths, vocabulary)

    def __len__(self):
        return int(self.ends[-1]) + 1

    @property
    def total_bytes(self):
        if self.vocabulary is BYTES:
            return int(self.lengths.sum())
        return sum(
            int(self.vocabulary.bytes_of_id[self.flat_bytes[b : b + n]].sum())
            for b, n in zip(self.begins, self.lengths)
        )

    def ids(self, begin, end):
        """Ids begin to end (not included) of the stream, int64; places after the last boundary are boundaries too."""
        out = np.full(end - begin, self.vocabulary.boundary, dtype=np.int64)
        number = int(np.searchsorted(self.ends, begin, side="right"))
        while number < len(self.ends):
            first = int(self.ends[number]) - int(self.lengths[number])  # where the document's first byte stands
            if first >= end:
                break
            low, high = max(first, begin), min(first + int(self.lengths[number]), end)
            if low < high:
                source = int(self.begins[number]) - first
                out[low - begin : high - begin] = self.flat_bytes[source + low : source + high]
            number += 1
        return out


class BitArray:
    """A long bool array in one bit an item, appended to in pieces and read in slices (10 GB of text: 1.25 GB)."""

    def __init__(self):
        self._packed, self._rest, self._length = [], np.empty(0, dtype=bool), 0

    def append(self, flags):
        flags = np.concatenate((self._rest, flags))
        whole = len(flags) // 8 * 8
        self._packed.append(np.packbits(flags[:whole]))
        self._rest = flags[whole:]
        self._length += whole

    def close(self):
        """Call once after the last `append`."""
        self._length += len(self._rest)
        self._packed = np.concatenate((*self._packed, np.packbits(self._rest)))

    def __len__(self):
        return self._length

    def read(self, begin, end):
        """bool [end - begin]; False after the end."""
        bits = np.unpackbits(self._packed[begin // 8 : (end + 7) // 8])[begin % 8 :][: end - begin].astype(bool)
        return np.pad(bits, (0, end - begin - len(bits)))


@dataclass
class RowBatch:
    """Rows for one forward pass. is_scored marks the targets that count: those that are no padding."""

    ids: torch.Tensor  # int64 [B, T + 1]
    is_scored: torch.Tensor  # bool [B, T]
    patch_lengths: torch.Tensor | None  # int64 [B, P], the sum of each row is T + 1; None for models without patches
    targets: int  # targets that count
    bytes: int  # raw bytes that they stand for; a document's end stands for none
    pieces: list | None = None  # evaluation rows: of each row, its (document, first input, end of inputs, scored from)

    def to(self, device):
        """The same on a device; from pinned memory the copy runs beside the computation."""
        moved = [
            x if x is None else x.to(device, non_blocking=True) for x in (self.ids, self.is_scored, self.patch_lengths)
        ]
        return RowBatch(*moved, self.targets, self.bytes, self.pieces)

    def pin(self):
        """The same in pinned memory (CUDA only)."""
        pinned = [x if x is None else x.pin_memory() for x in (self.ids, self.is_scored, self.patch_lengths)]
        return RowBatch(*pinned, self.targets, self.bytes, self.pieces)


def make_batch(rows, row_bytes, patch_slots=None, score_ends=True, vocabulary=BYTES):
    """Put rows of different fill into one batch of equal shape.

    rows: list of (ids int64 [n], is_start bool [n] or None, is_scored bool [n - 1]), n <= row_bytes + 1. Missing ids are
    filled with boundaries that all lie in one last patch and count nowhere. score_ends=False leaves document ends
    unscored, for models without a class for them. vocabulary: what the ids stand for.
    """
    T = row_bytes
    ids = np.full((len(rows), T + 1), vocabulary.boundary, dtype=np.int64)
    is_scored = np.zeros((len(rows), T), dtype=bool)
    lengths = []
    for r, (row_ids, is_start, row_scored) in enumerate(rows):
        ids[r, : len(row_ids)] = row_ids
        is_scored[r, : len(row_scored)] = row_scored
        if is_start is not None:
            starts = np.flatnonzero(is_start)
            if len(row_ids) < T + 1:
                starts = np.append(starts, len(row_ids))
            lengths.append(np.diff(starts, append=T + 1))
    if not score_ends:
        is_scored &= ids[:, 1:] != vocabulary.boundary
    patch_lengths_BP = None
    if lengths:
        patch_slots = patch_slots or max(len(row) for row in lengths)
        padded = np.zeros((len(rows), patch_slots), dtype=np.int64)
        for r, row in enumerate(lengths):
            padded[r, : len(row)] = row
        patch_lengths_BP = torch.from_numpy(padded)
        check_patch_lengths(patch_lengths_BP, T + 1)
    return RowBatch(
        torch.from_numpy(ids),
        torch.from_numpy(is_scored),
        patch_lengths_BP,
        targets=int(is_scored.sum()),
        bytes=int(vocabulary.bytes_of_id[ids[:, 1:][is_scored]].sum()),
    )


MAX_PATCH_PADDING = 0.045  # share of patch slots


class TrainingRows:
    """The training stream cut into rows of row_bytes + 1 ids; neighbours share one id, so each id is a target just once.

    is_start: `BitArray` over the stream (None: a model without patches). A row then also ends where patch_slots patches
    are full, so that both the bytes and the patches of a batch have a fixed shape with little padding. A row's first id
    and its second open a patch whatever the rule says (a row may begin inside a patch, of which nothing is seen).
    """

    def __init__(self, stream, row_bytes, is_start=None, patch_slots=None, score_ends=True):
        self.stream, self.row_bytes, self.is_start, self.score_ends = stream, row_bytes, is_start, score_ends
        last = len(stream) - 1  # the last id is a target only
        if last < 1:
            raise ValueError("there is no training text")
        if is_start is None:
            self.patch_slots = None
            self.begins = np.arange(0, last, row_bytes)
            self.sizes = np.minimum(row_bytes, last - self.begins) + 1
        else:
            self.patch_slots = patch_slots or self._choose_slots()
            self.begins, self.sizes = self._cut()

    def __len__(self):
        return len(self.begins)

    def _blocks(self, block=1 << 22):
        for begin in range(0, len(self.stream), block):
            yield begin, np.flatnonzero(self.is_start.read(begin, min(begin + block, len(self.stream)))) + begin

    def _choose_slots(self):
        """The most slots of which less than MAX_PATCH_PADDING stay empty. Rows with more patches end early, and pad bytes."""
        counts = np.zeros(-(-len(self.stream) // self.row_bytes))
        for _, starts in self._blocks():
            np.add.at(counts, starts // self.row_bytes, 1)
        counts = counts[:-1] if len(counts) > 1 else counts
        counts += 2  # the patches that a row opens itself
        slots = np.arange(8, counts.max() + 16, 8)
        empty = np.array([np.maximum(n - counts, 0).mean() / n for n in slots])
        return int(slots[max(0, np.searchsorted(empty, MAX_PATCH_PADDING) - 1)])

    def _cut(self):
        begins, sizes, at, last = [], [], 0, len(self.stream) - 1
        blocks, starts = self._blocks(), np.empty(0, dtype=np.int64)
        known = 0  # starts are known up to here
        while at < last:
            end = min(at + self.row_bytes + 1, len(self.stream))
            while known < end:
                begin, more = next(blocks)
                starts = np.concatenate((starts[np.searchsorted(starts, at) :], more))
                known = begin + (1 << 22)
            first = np.searchsorted(starts, at + 2)  # the row's first two ids open patches anyway
            extra = np.searchsorted(starts, end) - first
            if 2 + extra + (end < at + self.row_bytes + 1) > self.patch_slots:
                end = int(starts[first + self.patch_slots - 3])  # one slot is left for the padding
            begins.append(at)
            sizes.append(end - at)
            at = end - 1
        return np.array(begins), np.array(sizes)

    def batch(self, numbers):
        """The rows of these numbers as a `RowBatch`."""
        rows = []
        for number in numbers:
            begin, size = int(self.begins[number]), int(self.sizes[number])
            is_start = None
            if self.is_start is not None:
                is_start = self.is_start.read(begin, begin + size)
                is_start[:2] = True
            rows.append((self.stream.ids(begin, begin + size), is_start, np.ones(size - 1, dtype=bool)))
        return make_batch(rows, self.row_bytes, self.patch_slots, self.score_ends, self.stream.vocabulary)

    def shuffled_batch(self, position, batch_rows, seed):
        """Batch number `position` of an endless pass in random order, each epoch a new one; a pure function of its arguments."""
        numbers = []
        for i in range(position * batch_rows, (position + 1) * batch_rows):
            epoch, place = divmod(i, len(self))
            numbers.append(_epoch_order(len(self), seed, epoch)[place])
        return self.batch(numbers)

    def padding(self):
        """Share of byte places and of patch slots that hold padding, over all rows: two numbers in [0, 1]."""
        byte_waste = 1 - (self.sizes - 1).sum() / (len(self) * self.row_bytes)
        if self.is_start is None:
            return float(byte_waste), 0.0
        patches = sum(len(starts) for _, starts in self._blocks())
        return float(byte_waste), float(1 - min(1.0, (patches + len(self)) / (len(self) * self.patch_slots)))


@lru_cache(maxsize=2)
def _epoch_order(n, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(n)


def evaluation_batches(documents, is_start=None, row_bytes=4096, batch_rows=8, score_ends=True, vocabulary=BYTES):
    """Rows that score every byte of whole documents once, each from its boundary on: yields `RowBatch`es.

    documents: list of uint8 arrays; is_start: list of bool [N + 1] (the last one for the document's end), or None.
    Documents of up to row_bytes - 1 bytes are scored whole, several to a row (the model keeps them apart). A longer one is
    read in windows of row_bytes ids, half a window apart, and each byte is scored in the first window that holds it: it has
    at least half a window of context (and the last window may not be full). A window thus begins where it would if the document were
    still being written. With a vocabulary other than bytes, documents are arrays of its ids and row_bytes counts ids.
    """
    rows, short = [], []
    for number, document in enumerate(documents):
        inputs = len(document) + 1
        if inputs <= row_bytes:
            short.append(number)
            continue
        scored_to = 0
        for begin in range(0, inputs, max(1, row_bytes // 2)):
            if scored_to < inputs:
                end = min(inputs, begin + row_bytes)
                rows.append([(number, begin, end, scored_to)])
                scored_to = end
    short.sort(key=lambda number: len(documents[number]), reverse=True)
    low, high = 0, len(short) - 1
    while low <= high:  # the longest that is left, then as many of the shortest as fit
        row, room = [(short[low], 0, len(documents[short[low]]) + 1, 0)], row_bytes - len(documents[short[low]]) - 1
        low += 1
        while low <= high and len(documents[short[high]]) + 1 <= room:
            row.append((short[high], 0, len(documents[short[high]]) + 1, 0))
            room -= len(documents[short[high]]) + 1
            high -= 1
        rows.append(row)
    slots = None
    if is_start is not None:
        slots = max((sum(2 + int(is_start[n][b:e].sum()) for n, b, e, _ in row) + 1 for row in rows), default=0)
    for begin in range(0, len(rows), batch_rows):
        made = [
            _evaluation_row(documents, is_start, row, vocabulary.boundary) for row in rows[begin : begin + batch_rows]
        ]
        batch = make_batch(made, row_bytes, slots, score_ends, vocabulary)
        batch.pieces = rows[begin : begin + batch_rows]
        yield batch


def _evaluation_row(documents, is_start, pieces, boundary):
    """Join pieces (document, first input, end of inputs, scored from); the end of one document opens the next."""
    ids, starts, scored = [], [], []
    for number, begin, end, scored_from in pieces:
        first = begin if not ids else begin + 1  # place 0 of a document is its boundary, place t + 1 its byte t
        piece = np.full(end + 1 - first, boundary, dtype=np.int64)
        low, high = max(first, 1), min(end + 1, len(documents[number]) + 1)
        piece[low - first : high - first] = documents[number][low - 1 : high - 1]
        if is_start is not None:
            piece_starts = np.ones(len(piece), dtype=bool)
            piece_starts[low - first :] = is_start[number][low - 1 : end]
            if not ids:
                piece_starts[:2] = True
            starts.append(piece_starts)
        ids.append(piece)
        scored.append(np.arange(begin, end) >= scored_from)
    return np.concatenate(ids), np.concatenate(starts) if starts else None, np.concatenate(scored)


def target_places(batch, vocabulary=BYTES):
    """Where the targets of a batch of `evaluation_batches` stand: two int64 [B, T] arrays.

    The number of each target's document (-1: padding), and the raw bytes of that document which its row shows before it. Example: the
    document b"abc" alone in a row has targets a, b, c and the end, with 0, 1, 2 and 3 bytes before them. A later window of a long
    document begins inside it, so that the count begins anew there, at 1.
    """
    inputs = batch.ids[:, :-1].cpu().numpy()
    document_BT, context_BT = np.full(inputs.shape, -1), np.zeros(inputs.shape, dtype=np.int64)
    for r, pieces in enumerate(batch.pieces):
        column = 0
        for number, begin, end, _ in pieces:
            place = slice(column, column + end - begin)
            document_BT[r, place] = number
            context_BT[r, place] = np.cumsum(vocabulary.bytes_of_id[inputs[r, place]])  # a boundary stands for none
            column = place.stop
    return document_BT, context_BT
