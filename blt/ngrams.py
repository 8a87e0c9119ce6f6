"""Embeddings of hashed n-grams (BLT section 3.2.1): a table for each n, whose rows they share by hash.

`hash_spans` hashes n-grams of no fixed n: those that begin where a patch begins.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from blt.checks import check, check_positive, check_shares
from blt.ids import BOUNDARY
from blt.kernels import SparseLookup, apply_function

# The n-gram hash is that of the released code, so that its tables can be used here. That code numbers
# ids in another way: byte b has id b + 4, the boundary that opens a document has id 1, and positions
# before the document count as id 0. Tokens are numbered as bytes are.
HASH_PRIME = 1_000_000_007
HASH_ID_OFFSET = 4
HASH_BOUNDARY = 1
HASH_NOTHING = 0
# Its inverse among 64-bit integers, as a signed number: HASH_PRIME * PRIME_INVERSE wraps to 1.
PRIME_INVERSE = pow(HASH_PRIME, -1, 1 << 64) - (1 << 64)
# Hash tables with more rows than this get sparse gradients: a batch reads few of their rows.
DENSE_HASH_ROWS = 32768


class TableConfig:
    """What configs with ngram_sizes, patch_ngrams and gate_ngrams have in common."""

    @property
    def n_embedding_tables(self):
        """Hash tables of embeddings: one for each n-gram size, one for each of the patch n-grams."""
        return len(self.ngram_sizes) + len(self.patch_ngrams)

    @property
    def n_tables(self):
        """All hash tables, those of gates too."""
        return self.n_embedding_tables + len(self.gate_ngrams)


def check_tables(config):
    """Raise ValueError unless what a config says of hash tables describes some, or none."""
    check_positive(config, "hash_rows")
    for name, least in (("ngram_sizes", 2), ("patch_ngrams", 0), ("gate_ngrams", 2)):
        values = getattr(config, name)
        are_numbers = all(isinstance(n, int) and n >= least for n in values)
        are_different = len(set(values)) == len(values)
        allowed = f"different whole numbers, {least} or more each (or empty)"
        check(config, name, are_numbers and are_different, allowed)
    check_shares(config, "ngram_dropout")


def released_ids(ids, boundary=BOUNDARY):
    """Ids as the released code numbers them."""
    return torch.where(ids == boundary, HASH_BOUNDARY, ids + HASH_ID_OFFSET)


def hash_ngrams(ids_BT, documents_BT, sizes, n_rows, boundary=BOUNDARY):
    """Hash the n-gram that ends at each id: its row 0..n_rows-1 in each size's table (section 3.2.1).

        hash(t) = (sum over i = 0..n-1 of id[t - n + 1 + i] * HASH_PRIME ** i) mod n_rows

    in wrapping 64-bit integers, so the oldest id has the factor 1. Ids are the released code's (see
    HASH_ID_OFFSET): with p the prime, "abc" gives (101 + 102 p + 103 p ** 2) mod n_rows. Positions
    before the document of id t count as HASH_NOTHING, so no n-gram crosses a document boundary.
    sizes: the values of n. boundary: the id of the document boundary. Returns int64 [B, T, number of sizes].
    """
    T = ids_BT.shape[1]
    released_ids_BT = released_ids(ids_BT, boundary)
    sum_BT = torch.zeros_like(ids_BT)
    hash_of_size = {}
    # Horner's rule: multiply by the prime and add the next older id. The sum for n - 1 is a step on the
    # way to the sum for n, so one pass over the largest n gives all sizes.
    for back in range(max(sizes)):
        older_ids_BT = F.pad(released_ids_BT, (back, 0), value=HASH_NOTHING)[:, :T]
        older_documents_BT = F.pad(documents_BT, (back, 0), value=-1)[:, :T]
        is_outside_BT = older_documents_BT != documents_BT
        sum_BT = sum_BT * HASH_PRIME + older_ids_BT.masked_fill(is_outside_BT, HASH_NOTHING)
        n = back + 1
        if n in sizes:
            # remainder, not fmod: the wrapped sum may be negative, a row may not.
            hash_of_size[n] = sum_BT.remainder(n_rows)
    return torch.stack([hash_of_size[n] for n in sizes], dim=-1)


def hash_spans(ids_BT, starts_BTS, boundary=BOUNDARY):
    """Hash the ids from each start to the id itself: n-grams of no fixed n.

        hash(t) = sum over i = start..t of id[i] * HASH_PRIME ** (t - i)

    in wrapping 64-bit integers. The newest id has the factor 1, so `SpanHashes` can go on from id to
    id. Ids are numbered as in `hash_ngrams`. starts_BTS: int64, S starts of each id t, in 0..t.
    Returns int64 [B, T, S].
    """
    # With p the prime: p ** t times (the sum of id[i] * p ** -i up to t, minus that before the start).
    T = ids_BT.shape[1]
    powers_T = _powers(HASH_PRIME, T, ids_BT.device)
    sums_BT = (released_ids(ids_BT, boundary) * _powers(PRIME_INVERSE, T, ids_BT.device)).cumsum(dim=1)
    before_BT = F.pad(sums_BT, (1, 0))[:, :T]
    before_start_BTS = before_BT.gather(1, starts_BTS.flatten(1)).unflatten(1, starts_BTS.shape[1:])
    return (sums_BT[..., None] - before_start_BTS) * powers_T[:, None]


def _powers(base, n, device):
    """base to the powers 0 to n - 1, in wrapping 64-bit integers: int64 [n]."""
    factors = torch.full((n,), base, dtype=torch.int64, device=device)
    factors[:1] = 1
    return factors.cumprod(dim=0)


class NgramHashes:
    """The sums of `hash_ngrams`, before the remainder, of text that is being written. In NumPy.

    recent: uint64 [B, longest n - 1], the last ids of each of B rows as the released code numbers
    them, HASH_NOTHING before the first.
    """

    def __init__(self, sizes, n_rows):
        longest = max(sizes, default=1)
        self.recent = np.full((n_rows, longest - 1), HASH_NOTHING, np.uint64)
        # In a window of the longest n-gram, what each id is multiplied by for each n.
        self.factors = np.zeros((longest, len(sizes)), np.uint64)
        powers = np.cumprod([1] + [HASH_PRIME] * (longest - 1), dtype=np.uint64)
        for column, n in enumerate(sizes):
            self.factors[longest - n :, column] = powers[:n]

    def read(self, ids_BN):
        """Read N more ids. Returns the sums after each, int64 [B, N, sizes], and the recent and new ids.

        The recent ids stay as they are until `keep`.
        """
        ids_BT = np.concatenate((self.recent, _released(ids_BN)), axis=1)
        windows_BNW = np.lib.stride_tricks.sliding_window_view(ids_BT, len(self.factors), axis=1)
        # Products of unsigned integers wrap without a warning.
        return (windows_BNW @ self.factors).view(np.int64), ids_BT

    def keep(self, ids_BT, counts_B):
        """Let the first counts_B of the new ids become text. ids_BT: the ids that `read` returned."""
        columns_BT = counts_B[:, None] + np.arange(self.recent.shape[1])
        self.recent = np.take_along_axis(ids_BT, columns_BT, axis=1)


def _released(ids_BN):
    """`released_ids` of an array, as uint64."""
    return np.where(ids_BN == BOUNDARY, HASH_BOUNDARY, ids_BN + HASH_ID_OFFSET).astype(np.uint64)


class SpanHashes:
    """The `hash_spans` of text that is being written, from the starts of patches. For B rows, in NumPy.

    patch_ngrams: as in `BLTConfig`.
    state: uint64 [B, M], the hashes of what a row holds since the start of its open patch, since the
    start of the patch before, and so on; of the whole row, if it has fewer patches.
    """

    def __init__(self, patch_ngrams, n_rows):
        self.patch_ngrams = list(patch_ngrams)
        self.state = np.zeros((n_rows, max(patch_ngrams) + 1), np.uint64)

    def read(self, ids_BN, is_end_BN):
        """Read N more ids. Returns hashes after each, int64 [B, N, S], and states, uint64 [N + 1, B, M].

        is_end_BN: the ids that end a patch. states: before the first id, and after each. The own state
        stays as it is: set it to that of the ids that become text.
        """
        released_BN = _released(ids_BN)
        states = [self.state]
        hashes = []
        for n in range(ids_BN.shape[1]):
            # Arrays of unsigned integers wrap without a warning.
            hash_BM = states[-1] * np.uint64(HASH_PRIME) + released_BN[:, n, None]
            hashes.append(hash_BM[:, self.patch_ngrams])
            # A patch that has ended is the patch before the open one, which has no id yet.
            begun_BM = np.pad(hash_BM, ((0, 0), (1, 0)))[:, :-1]
            states.append(np.where(is_end_BN[:, n, None], begun_BM, hash_BM))
        return np.stack(hashes, axis=1).view(np.int64), np.stack(states)


class HashEmbedding(nn.Module):
    """The sum of each id's n-gram embeddings: of each n-gram size (section 3.2.1), and of n_spans spans.

    All tables are one weight [tables * n_rows, D], read in one fused lookup. Tables of more
    than DENSE_HASH_ROWS rows get sparse gradients and are updated by `optimizers.RowWiseAdam`: a step
    then costs what the batch's bytes cost, however large the tables are.

    dropout: the share of n-grams that training leaves out, each id's of each size by chance. Those that
    are left are not scaled up: a dropped n-gram is like one that no training text had, and one that is
    there has the size that it has in new text.
    """

    def __init__(self, sizes, n_rows, dim, boundary=BOUNDARY, dropout=0.0, n_spans=0):
        super().__init__()
        self.boundary = boundary
        self.dropout = nn.Dropout(dropout)
        self.sizes = tuple(sizes)
        self.n_tables = len(self.sizes) + n_spans
        self.n_rows = n_rows
        is_sparse = n_rows > DENSE_HASH_ROWS
        self.tables = nn.EmbeddingBag(self.n_tables * n_rows, dim, mode="sum", sparse=is_sparse)
        # torch.compile does not know sparse gradients. It splits the graph in two at this call, and the
        # graph of each caller up the stack as well: only a model's `forward` calls it.
        self.embed = torch.compiler.disable(embed_ngrams) if is_sparse else embed_ngrams
        # Not in the state dict, because it follows from the sizes.
        self.register_buffer("first_row", None, persistent=False)
        self.number_rows()

    def number_rows(self):
        """Set the first row of each size's table in the common weight, on the weight's device."""
        self.first_row = torch.arange(self.n_tables, device=self.tables.weight.device) * self.n_rows

    def forward(self, ids_BT, documents_BT, spans_BTS=None):
        """Returns the sums [B, T, D]. spans_BTS: `hash_spans`, if there are n_spans."""
        return self.sums(self.hashes(ids_BT, documents_BT, spans_BTS))

    def hashes(self, ids_BT, documents_BT, spans_BTS=None):
        """The row of each id in each table: int64 [B, T, tables]."""
        hashes = []
        if self.sizes:
            hashes.append(hash_ngrams(ids_BT, documents_BT, self.sizes, self.n_rows, self.boundary))
        if spans_BTS is not None:
            hashes.append(spans_BTS.remainder(self.n_rows))
        return torch.cat(hashes, dim=-1)

    def sums(self, hashes_BTS):
        """The sums [B, T, D] of the rows with these numbers."""
        rows_NS = (hashes_BTS + self.first_row).flatten(0, 1)
        kept_NS = None
        if self.training and self.dropout.p > 0:
            ones_NS = torch.ones(rows_NS.shape, dtype=self.tables.weight.dtype, device=rows_NS.device)
            kept_NS = (self.dropout(ones_NS) > 0).to(ones_NS.dtype)
        # A bag adds up the S rows of each id without keeping them apart in memory.
        if self.tables.sparse:
            sums_ND = apply_function(SparseLookup, self.tables.weight, rows_NS, kept_NS)
        else:
            sums_ND = self.tables(rows_NS, per_sample_weights=kept_NS)
        return sums_ND.unflatten(0, hashes_BTS.shape[:2])


def embed_ngrams(hash_embedding, ids_BT, documents_BT, spans_BTS=None):
    """hash_embedding(...), as a function that can be left out of a compiled graph."""
    return hash_embedding(ids_BT, documents_BT, spans_BTS)
