"""Rows: what a model reads in training and evaluation.

Documents follow each other as one stream of ids, a boundary (256) before each and one at the end:

    256 d o c 0 256 d o c 1 256

A row is T + 1 neighbouring ids. The first T are the inputs, the last T are the targets: the model
reads ids 0 to t and predicts id t + 1. Only scored targets count in the loss and in bits per byte:

- padding is never scored;
- a document's end is scored only for models that have a class for it;
- evaluation scores each byte once, though its windows overlap.

`TrainingRows` splits the stream of the training documents into rows. `evaluation_batches` makes rows
that score whole documents.
"""

import mmap
from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from blt.ids import BYTES
from blt.segments import check_patch_lengths

# Share of patch slots that may stay empty in training rows.
MAX_PATCH_PADDING = 0.045
# Patch starts of the training stream are read this many ids at a time, which takes at most 40 MB.
BLOCK_IDS = 1 << 22
# Evaluation rows of up to this many ids keep their shape even if the text is shorter: models are compiled for it.
KEPT_ROW_BYTES = 1 << 16
# What a stream has read of a memory map is given back to the system after this many bytes.
MAPPED_BYTES = 1 << 26
# A read of one byte makes the system map the pages around it, too.
PAGES_AROUND = 1 << 18


class DocumentStream:
    """Documents as one stream of ids, read in slices: only what is asked for is copied.

    flat: uint8 array or memory map with the bytes of all documents; or, with another vocabulary
        than bytes, an array of its ids. Without boundaries.
    offsets, lengths: int64 [documents]; document i is flat[offsets[i]:offsets[i] + lengths[i]].
    ends: int64 [documents], the stream position of the boundary after each document.
    len(stream) counts ids: a boundary and the ids of each document, and the last boundary.

    Example: the documents b"ab" and b"c" give 256 97 98 256 99 256. `ends` is [3, 5].
    """

    def __init__(self, flat, offsets, lengths, vocabulary=BYTES):
        self.flat = flat
        self.offsets = np.asarray(offsets)
        self.lengths = np.asarray(lengths)
        self.vocabulary = vocabulary
        self.ends = np.cumsum(self.lengths + 1)
        self._mapped_bytes = 0

    @classmethod
    def of_corpus(cls, corpus, numbers):
        """The stream of the documents of a `Corpus` that have these numbers, in this order."""
        return cls(corpus.bytes, corpus.offsets[numbers], np.diff(corpus.offsets)[numbers])

    @classmethod
    def of_documents(cls, documents, vocabulary=BYTES):
        """The stream of a list of uint8 arrays (or of arrays of a vocabulary's ids)."""
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        # The empty array lets a list of no documents be joined, too.
        flat = np.concatenate([*documents, np.empty(0, np.uint8)])
        return cls(flat, np.cumsum(lengths) - lengths, lengths, vocabulary)

    def __len__(self):
        return (int(self.ends[-1]) if len(self.ends) else 0) + 1

    @property
    def total_bytes(self):
        """Raw bytes of all documents."""
        if self.vocabulary is BYTES:
            return int(self.lengths.sum())
        total = 0
        for offset, length in zip(self.offsets, self.lengths):
            ids = self.flat[offset : offset + length]
            total += int(self.vocabulary.bytes_of_id[ids].sum())
        return total

    def ids(self, begin, end):
        """Ids at stream positions begin to end - 1, int64; after the stream's end, boundaries."""
        # Fill with boundaries, then copy the documents that overlap this range.
        ids = np.full(end - begin, self.vocabulary.boundary, dtype=np.int64)
        # The first document that ends after `begin`: with `ends` [3, 5], begin 3 is the end of
        # document 0, so its bytes are no part of the range.
        document = int(np.searchsorted(self.ends, begin, side="right"))
        while document < len(self.ends):
            # Stream position of the document's first id, right after the boundary that opens it.
            first = int(self.ends[document]) - int(self.lengths[document])
            if first >= end:
                break
            low = max(first, begin)
            high = min(int(self.ends[document]), end)
            if low < high:
                shift = int(self.offsets[document]) - first
                ids[low - begin : high - begin] = self.flat[low + shift : high + shift]
                self._mapped_bytes += max(high - low, PAGES_AROUND)
            document += 1
        self._release()
        return ids

    def _release(self):
        """From time to time, give the pages of a memory map that were read back to the system.

        The system would do so itself when memory gets short. But until then a pass over 100 GB shows as
        100 GB, and a container with a limit may end the process.
        """
        if self._mapped_bytes < MAPPED_BYTES:
            return
        self._mapped_bytes = 0
        # Only where nothing can be lost: a map for reading. Windows and macOS differ.
        if getattr(self.flat, "mode", None) == "r" and hasattr(mmap, "MADV_DONTNEED"):
            self.flat._mmap.madvise(mmap.MADV_DONTNEED)


class BitArray:
    """A long bool array that takes one bit an item: appended to in pieces, then read in slices.

    The patch starts of 10 GB of text take 1.25 GB. Order of use: `append` any number of times,
    `close` once, then `read` and `len`.
    """

    def __init__(self):
        # It grows in place: pieces that are joined at the end would be in memory twice.
        self._packed = bytearray()
        # Items that do not fill a byte yet, fewer than 8.
        self._rest = np.empty(0, dtype=bool)
        self._length = 0

    def append(self, flags):
        """Add a bool array at the end."""
        flags = np.concatenate((self._rest, flags))
        whole = len(flags) // 8 * 8
        self._packed += np.packbits(flags[:whole]).data
        self._rest = flags[whole:]
        self._length += whole

    def close(self):
        """Call once after the last `append`."""
        self._length += len(self._rest)
        self._packed += np.packbits(self._rest).data
        self._packed = np.frombuffer(self._packed, dtype=np.uint8)

    def __len__(self):
        return self._length

    def read(self, begin, end):
        """Items begin to end - 1: bool [end - begin], False after the last item."""
        packed = self._packed[begin // 8 : (end + 7) // 8]
        # The first byte may hold items before `begin`, the last one items after `end`.
        bits = np.unpackbits(packed)[begin % 8 :][: end - begin].astype(bool)
        return np.pad(bits, (0, end - begin - len(bits)))


class Piece(NamedTuple):
    """A part of one document in an evaluation row.

    begin, end and scored_from are positions in the document's inputs: position 0 is the boundary
    before it, position t + 1 its byte t. The target of an input is the byte after it, or the
    document's end.
    """

    document: int  # index in the list of documents
    begin: int  # first input
    end: int  # one past the last input
    scored_from: int  # earlier inputs are context: their targets are not scored here


@dataclass
class RowBatch:
    """Rows for one forward pass."""

    ids: torch.Tensor  # int64 [B, T + 1]
    is_scored: torch.Tensor  # bool [B, T], the targets that count
    patch_lengths: torch.Tensor | None  # int64 [B, P], each row sums to T + 1; None: no patches
    targets: int  # number of scored targets
    bytes: int  # raw bytes of the scored targets; a document's end has none
    pieces: list[list[Piece]] | None = None  # evaluation: the parts of documents in each row

    def to(self, device):
        """The same batch on a device; from pinned memory it is copied while the GPU computes."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self):
        """The same batch in pinned memory (CUDA only)."""
        return self._with_tensors(lambda tensor: tensor.pin_memory())

    def for_losses(self):
        """The arguments of `metric.RowLosses`."""
        return self.ids, self.is_scored, self.patch_lengths

    def _with_tensors(self, change):
        """The same batch with `change` applied to each tensor."""
        patch_lengths = None if self.patch_lengths is None else change(self.patch_lengths)
        ids = change(self.ids)
        is_scored = change(self.is_scored)
        return RowBatch(ids, is_scored, patch_lengths, self.targets, self.bytes, self.pieces)


def make_batch(rows, row_bytes, patch_slots=None, score_ends=True, vocabulary=BYTES):
    """Put rows of up to row_bytes + 1 ids into one `RowBatch` of equal shape.

    rows: list of (ids int64 [n], is_start bool [n] or None, is_scored bool [n - 1]).
    row_bytes: T. Rows of fewer than T + 1 ids are filled with boundaries, which are never scored.
    patch_slots: P, columns of patch_lengths; None: as many as the row with the most patches needs.
    score_ends: False leaves the documents' ends unscored, for models without a class for them.

    Example: ids [256, 97, 98, 256] with is_start [1, 1, 0, 1] and row_bytes 5 become ids
    [256, 97, 98, 256, 256, 256], is_scored [1, 1, 1, 0, 0] and patch_lengths [1, 2, 1, 2].
    """
    n_ids = row_bytes + 1
    ids = np.full((len(rows), n_ids), vocabulary.boundary, dtype=np.int64)
    is_scored = np.zeros((len(rows), row_bytes), dtype=bool)
    lengths_of_rows = []
    for r, (row_ids, is_start, row_is_scored) in enumerate(rows):
        ids[r, : len(row_ids)] = row_ids
        is_scored[r, : len(row_is_scored)] = row_is_scored
        if is_start is not None:
            lengths_of_rows.append(_patch_lengths(is_start, n_ids))
    if not score_ends:
        is_scored &= ids[:, 1:] != vocabulary.boundary

    patch_lengths_BP = None
    if lengths_of_rows:
        if patch_slots is None:
            patch_slots = max(len(lengths) for lengths in lengths_of_rows)
        padded = np.zeros((len(rows), patch_slots), dtype=np.int64)
        for r, lengths in enumerate(lengths_of_rows):
            padded[r, : len(lengths)] = lengths
        patch_lengths_BP = torch.from_numpy(padded)
        # A model given other lengths could see its targets, so no batch leaves unchecked.
        check_patch_lengths(patch_lengths_BP, n_ids)

    # The bytes of bits per byte: a scored token counts as all bytes that it holds.
    scored_ids = ids[:, 1:][is_scored]
    return RowBatch(
        torch.from_numpy(ids),
        torch.from_numpy(is_scored),
        patch_lengths_BP,
        targets=int(is_scored.sum()),
        bytes=int(vocabulary.bytes_of_id[scored_ids].sum()),
    )


def _patch_lengths(is_start, n_ids):
    """Patch lengths of a row that is filled up to n_ids ids: all its padding is one last patch."""
    start_positions = np.flatnonzero(is_start)
    if len(is_start) < n_ids:
        start_positions = np.append(start_positions, len(is_start))
    return np.diff(start_positions, append=n_ids)


class TrainingRows:
    """The training stream split into rows.

    Neighbouring rows share one id, the last of one and the first of the next. So each id is a target
    once, except for the first boundary, which no model predicts.

    Without patches, each row has row_bytes + 1 ids: the stream 256 a b c d 256 with row_bytes 2 gives
    256 a b | b c d | d 256.

    With patches, a batch needs two fixed shapes: [B, row_bytes + 1] ids and [B, patch_slots]
    patches. A row takes ids until it has row_bytes + 1, or until one more patch would not fit into
    its slots. So a row of small patches ends early and is padded in bytes; a row of large patches
    has all its bytes and leaves slots empty. A row's first two ids always start patches: the first
    must be a patch of its own (see `check_patch_lengths`), and the row may begin inside a patch
    whose earlier bytes it lacks.

    is_start: `BitArray` over the stream, True where a patch starts; None for a model without patches.
    patch_slots: None lets the text decide, see `_choose_slots`.
    row_positions: int64 [rows], the stream position of each row's first id.
    row_lengths: int64 [rows], the ids of each row without padding; at most row_bytes + 1.
    Raises ValueError if the stream has fewer than two ids, or a row fewer than 4 patch slots.
    """

    def __init__(self, stream, row_bytes, is_start=None, patch_slots=None, score_ends=True):
        self.stream = stream
        self.row_bytes = row_bytes
        self.is_start = is_start
        self.score_ends = score_ends
        # The last id of the stream is a target only, so no row begins there.
        last = len(stream) - 1
        if last < 1:
            raise ValueError("there is no training text")
        # Two for a row's first ids, one for another patch and one for padding: with fewer, rows make no
        # progress.
        if patch_slots is not None and patch_slots < 4:
            raise ValueError(f"patch_slots is {patch_slots}; it must be 4 or more")
        if is_start is None:
            self.patch_slots = None
            self.row_positions = np.arange(0, last, row_bytes)
            self.row_lengths = np.minimum(row_bytes, last - self.row_positions) + 1
        else:
            self.patch_slots = self._choose_slots() if patch_slots is None else patch_slots
            self.row_positions, self.row_lengths = self._split_by_patches()

    def __len__(self):
        return len(self.row_positions)

    def _start_blocks(self):
        """Yield (end, start positions since the previous end) over the stream, block by block."""
        for begin in range(0, len(self.stream), BLOCK_IDS):
            end = min(begin + BLOCK_IDS, len(self.stream))
            yield end, np.flatnonzero(self.is_start.read(begin, end)) + begin

    def _choose_slots(self):
        """Patch slots per row: the largest multiple of 8 of which less than MAX_PATCH_PADDING are empty.

        More slots mean more empty slots; fewer slots mean more rows that end early and pad bytes.
        Example: if all stretches of row_bytes ids have 98 patches, a row needs 98 + 2. Of 104 slots,
        4 / 104 = 3.8% would be empty; of 112, 10.7%. The choice is 104.

        Where stretches differ much in their patches, that would pad too many bytes. Then it is the
        multiple of 8 with the smallest sum of both shares of padding, of those up to the first that
        pads no larger share of the bytes than of the slots.
        """
        # Patches in each stretch of row_bytes ids. The rows do not exist yet: these stand for them.
        counts = np.zeros(-(-len(self.stream) // self.row_bytes))
        for _, start_positions in self._start_blocks():
            np.add.at(counts, start_positions // self.row_bytes, 1)
        # The last stretch is shorter than a row.
        if len(counts) > 1:
            counts = counts[:-1]
        # A row's first two ids start patches, whether the stream has patch starts there or not.
        counts += 2

        candidates = np.arange(8, counts.max() + 16, 8)
        empty_shares = [np.maximum(slots - counts, 0).mean() / slots for slots in candidates]
        # The shares rise with the slots, so this finds the last candidate below the limit.
        last_below = np.searchsorted(np.array(empty_shares), MAX_PATCH_PADDING) - 1
        fewest = max(0, last_below)
        # A stretch of more patches than slots takes counts / slots rows, padded in bytes. One of fewer
        # patches takes one, with empty slots.
        rows_of_all = np.array([np.maximum(counts / slots, 1).mean() for slots in candidates])
        used_bytes = 1 / rows_of_all
        used_slots = counts.mean() / (candidates * rows_of_all)
        first_balanced = np.argmax(used_bytes >= used_slots)
        worth_a_look = slice(fewest, max(fewest, first_balanced) + 1)
        best = np.argmax((used_bytes + used_slots)[worth_a_look])
        return int(candidates[worth_a_look][best])

    def _split_by_patches(self):
        """row_positions and row_lengths of rows limited by both row_bytes and patch_slots.

        Example: patch starts at 0, 1, 3, 4, 7, 8, ..., 4 slots, many bytes per row. The row at 0
        has the patches 0, 1-2, 3; a fourth would need the slot that is kept for padding. It ends
        before 4. The next row begins at 3, the id that both share.
        """
        # Arrays, because a list of numbers takes several times the memory.
        row_positions = array("q")
        row_lengths = array("q")
        blocks = self._start_blocks()
        # Start positions from the current row on, complete below `read_to`.
        start_positions = np.empty(0, dtype=np.int64)
        read_to = 0
        position = 0
        while position < len(self.stream) - 1:
            full_end = position + self.row_bytes + 1
            end = min(full_end, len(self.stream))
            while read_to < end:
                read_to, block_positions = next(blocks)
                # Drop what earlier rows have used.
                kept = start_positions[np.searchsorted(start_positions, position) :]
                start_positions = np.concatenate((kept, block_positions))

            # Two patches for the first two ids, one for each later patch start, one for padding.
            first_later = np.searchsorted(start_positions, position + 2)
            n_later = np.searchsorted(start_positions, end) - first_later
            needs_padding = end < full_end
            if 2 + n_later + needs_padding > self.patch_slots:
                # Too many. A row that ends early is padded, which takes one slot, so it keeps
                # patch_slots - 3 of the later patches and ends where the next one starts.
                end = int(start_positions[first_later + self.patch_slots - 3])
            row_positions.append(position)
            row_lengths.append(end - position)
            position = end - 1
        return np.frombuffer(row_positions, np.int64), np.frombuffer(row_lengths, np.int64)

    def batch(self, numbers):
        """The rows of these numbers as a `RowBatch`."""
        rows = []
        for number in numbers:
            begin = int(self.row_positions[number])
            length = int(self.row_lengths[number])
            is_start = None
            if self.is_start is not None:
                is_start = self.is_start.read(begin, begin + length)
                is_start[:2] = True
            is_scored = np.ones(length - 1, dtype=bool)
            rows.append((self.stream.ids(begin, begin + length), is_start, is_scored))
        return make_batch(rows, self.row_bytes, self.patch_slots, self.score_ends, self.stream.vocabulary)

    def shuffled_batch(self, position, batch_rows, seed):
        """Batch number `position` of endless epochs over the rows, each in its own random order.

        It depends on the arguments only, so a resumed run reads what an uninterrupted one would have.
        """
        numbers = []
        for i in range(position * batch_rows, (position + 1) * batch_rows):
            epoch, index = divmod(i, len(self))
            numbers.append(_epoch_order(len(self), seed, epoch)[index])
        return self.batch(numbers)

    def document_parts(self):
        """Ids of each part of a document that is in one row: int64 [parts]. Attention stays within them."""
        # A document begins with the boundary before it. The last id of the stream is a target only.
        begins = np.union1d(np.append(0, self.stream.ends[:-1]), self.row_positions)
        return np.diff(begins, append=len(self.stream) - 1)

    def padding(self):
        """Shares of inputs and of patch slots that are padding, over all rows: two floats in [0, 1].

        The share of slots is slightly too high: patches that exist only because a row begins there, and
        the patch of padding, are not counted.
        """
        inputs = (self.row_lengths - 1).sum()
        byte_padding = 1 - inputs / (len(self) * self.row_bytes)
        if self.is_start is None:
            return float(byte_padding), 0.0
        # A row begins with the last id of the row before it, as a patch of its own: one more a row.
        patches = len(self) + sum(len(positions) for _, positions in self._start_blocks())
        slots = len(self) * self.patch_slots
        return float(byte_padding), float(1 - min(1.0, patches / slots))


# A batch at the end of an epoch needs the orders of two epochs.
@lru_cache(maxsize=2)
def _epoch_order(n_rows, seed, epoch):
    """The order in which an epoch reads the rows: a permutation, int64 [n_rows]."""
    return np.random.default_rng((seed, epoch)).permutation(n_rows)


def evaluation_batches(documents, is_start=None, row_bytes=4096, batch_rows=8, score_ends=True, vocabulary=BYTES):
    """Yield `RowBatch`es that score every byte of whole documents once.

    documents: list of uint8 arrays, or of arrays of a vocabulary's ids; then row_bytes counts ids.
    is_start: list of bool [N + 1], the patch starts of each document and of its end; or None.
    score_ends: whether the ends of documents are scored, too.

    A document of N bytes has N + 1 inputs, the boundary before it and its bytes. Documents of up to
    row_bytes inputs are read whole, several to a row; the model keeps them apart. A longer one is
    read in windows of row_bytes inputs, each half a window after the one before. A byte is scored
    in the first window that has it as a target, so it has at least half a window of context.
    Example: 9 inputs and row_bytes 4 give the windows (inputs -> scored targets)

        0 1 2 3 -> 1 2 3 4    2 3 4 5 -> 5 6    4 5 6 7 -> 7 8    6 7 8 -> 9

    Windows begin at fixed distances from the document's start, never from its end: a generator that
    writes the document from left to right would use the same ones.
    """
    # A setting of billions must not take memory for padding when the text has thousands.
    all_inputs = sum(len(document) + 1 for document in documents)
    row_bytes = min(row_bytes, max(all_inputs, KEPT_ROW_BYTES))
    rows = []
    short = []
    for number, document in enumerate(documents):
        n_inputs = len(document) + 1
        if n_inputs <= row_bytes:
            short.append(Piece(number, begin=0, end=n_inputs, scored_from=0))
        else:
            rows += [[window] for window in _windows(number, n_inputs, row_bytes)]
    rows += _pack(short, row_bytes)

    # The same number of patch slots for all batches, so that a compiled model sees one shape.
    patch_slots = None
    if is_start is not None:
        patch_slots = max((_slots_needed(row, is_start) for row in rows), default=0)
    for first_row in range(0, len(rows), batch_rows):
        pieces = rows[first_row : first_row + batch_rows]
        made = [_evaluation_row(documents, is_start, row, vocabulary.boundary) for row in pieces]
        batch = make_batch(made, row_bytes, patch_slots, score_ends, vocabulary)
        batch.pieces = pieces
        yield batch


def _windows(document, n_inputs, row_bytes):
    """Windows of a document longer than a row, as a list of `Piece`; see `evaluation_batches`."""
    windows = []
    stride = max(1, row_bytes // 2)
    begin = 0
    scored_to = 0
    while scored_to < n_inputs:
        end = min(n_inputs, begin + row_bytes)
        windows.append(Piece(document, begin, end, scored_from=scored_to))
        scored_to = end
        begin += stride
    return windows


def _pack(pieces, row_bytes):
    """Distribute whole documents over rows of row_bytes inputs: a list of lists of `Piece`.

    Each row takes the longest document that is left, then the shortest ones as long as they fit.
    Pieces of 5, 4, 2 and 1 inputs in rows of 8 give [5, 1, 2] and [4].
    """
    rows = []
    by_length = sorted(pieces, key=lambda piece: piece.end, reverse=True)
    longest = 0
    shortest = len(by_length) - 1
    while longest <= shortest:
        row = [by_length[longest]]
        room = row_bytes - by_length[longest].end
        longest += 1
        while longest <= shortest and by_length[shortest].end <= room:
            row.append(by_length[shortest])
            room -= by_length[shortest].end
            shortest -= 1
        rows.append(row)
    return rows


def _slots_needed(pieces, is_start):
    """Patch slots that are enough for an evaluation row."""
    # One for padding. Per piece, two for its first two ids and one for each patch start after the
    # first; if the second id is such a start, it counts twice, which does no harm.
    slots = 1
    for piece in pieces:
        slots += 2 + int(is_start[piece.document][piece.begin : piece.end].sum())
    return slots


def _evaluation_row(documents, is_start, pieces, boundary):
    """Join the pieces of a row: (ids, is_start or None, is_scored), as `make_batch` takes them.

    Neighbouring documents share a boundary: the end of one opens the next. So the documents b"ab" and
    b"c" give 256 97 98 256 99 256.
    """
    ids = []
    starts = []
    scored = []
    for number, piece in enumerate(pieces):
        # The shared boundary is the last id of the piece before. (Only whole documents share a row.)
        first = piece.begin if number == 0 else piece.begin + 1
        # The ids are the inputs and one more, the last target.
        stop = piece.end + 1
        ids.append(_framed(documents[piece.document], first, stop, boundary, np.int64))
        if is_start is not None:
            # The entry for the document's end is the last one, so the frame sets only position 0.
            starts.append(_framed(is_start[piece.document], first, stop, True, bool))
        scored.append(np.arange(piece.begin, piece.end) >= piece.scored_from)

    row_starts = None
    if is_start is not None:
        row_starts = np.concatenate(starts)
        # The first id must be a patch of its own, and a window may begin inside a patch.
        row_starts[:2] = True
    return np.concatenate(ids), row_starts, np.concatenate(scored)


def _framed(values, begin, end, frame, dtype):
    """Items begin to end - 1 of [frame, *values, frame], without a copy of all values."""
    out = np.full(end - begin, frame, dtype=dtype)
    # Value t is at position t + 1.
    low = max(begin, 1)
    high = min(end, len(values) + 1)
    out[low - begin : high - begin] = values[low - 1 : high - 1]
    return out


def target_positions(batch, vocabulary=BYTES):
    """Document and context of each target in an `evaluation_batches` batch: two int64 [B, T] arrays.

    document_BT: index of the target's document; -1 for padding.
    context_BT: raw bytes of that document that the row shows before the target.

    Example: the document b"abc", alone in a row, has the targets a, b, c and its end, with 0, 1, 2
    and 3 bytes before them. A later window of a long document counts only the bytes from its own
    beginning, so its first target has 1 byte before it.
    """
    inputs = batch.ids[:, :-1].cpu().numpy()
    document_BT = np.full(inputs.shape, -1)
    context_BT = np.zeros(inputs.shape, dtype=np.int64)
    for r, pieces in enumerate(batch.pieces):
        column = 0
        for piece in pieces:
            columns = slice(column, column + piece.end - piece.begin)
            document_BT[r, columns] = piece.document
            # The boundary before a document adds 0 bytes.
            context_BT[r, columns] = np.cumsum(vocabulary.bytes_of_id[inputs[r, columns]])
            column = columns.stop
    return document_BT, context_BT
