"""Embeddings of hashed n-grams (BLT section 3.2.1): a table for each n, whose rows n-grams share by their hash."""

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
# Hash tables with more rows than this get sparse gradients: a batch reads few of their rows.
DENSE_HASH_ROWS = 32768


def check_tables(config):
    """Raise ValueError unless a config's ngram_sizes, hash_rows and ngram_dropout describe hash tables, or none."""
    check_positive(config, "hash_rows")
    are_sizes = all(isinstance(n, int) and n >= 2 for n in config.ngram_sizes)
    are_different = len(set(config.ngram_sizes)) == len(config.ngram_sizes)
    allowed = "different whole numbers, 2 or more each (or empty)"
    check(config, "ngram_sizes", are_sizes and are_different, allowed)
    check_shares(config, "ngram_dropout")


def hash_ngrams(ids_BT, documents_BT, sizes, n_rows, boundary=BOUNDARY):
    """Hash the n-gram that ends at each id: its row 0..n_rows-1 in each size's table (section 3.2.1).

        hash(t) = (sum over i = 0..n-1 of id[t - n + 1 + i] * HASH_PRIME ** i) mod n_rows

    in wrapping 64-bit integers, so the oldest id has the factor 1. Ids are the released code's (see
    HASH_ID_OFFSET): with p the prime, "abc" gives (101 + 102 p + 103 p ** 2) mod n_rows. Positions
    before the document of id t count as HASH_NOTHING, so no n-gram crosses a document boundary.
    sizes: the values of n. boundary: the id of the document boundary. Returns int64 [B, T, number of sizes].
    """
    T = ids_BT.shape[1]
    released_ids_BT = torch.where(ids_BT == boundary, HASH_BOUNDARY, ids_BT + HASH_ID_OFFSET)
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


class HashEmbedding(nn.Module):
    """The sum of each id's n-gram embeddings, one for each n-gram size (section 3.2.1).

    The tables of all sizes are one weight [sizes * n_rows, D], read in one fused lookup. Tables of more
    than DENSE_HASH_ROWS rows get sparse gradients and are updated by `optimizers.RowWiseAdam`: a step
    then costs what the batch's bytes cost, however large the tables are.

    dropout: the share of n-grams that training leaves out, each id's of each size by chance. Those that
    are left are not scaled up: a dropped n-gram is like one that no training text had, and one that is
    there has the size that it has in new text.
    """

    def __init__(self, sizes, n_rows, dim, boundary=BOUNDARY, dropout=0.0):
        super().__init__()
        self.boundary = boundary
        self.dropout = nn.Dropout(dropout)
        self.sizes = tuple(sizes)
        self.n_rows = n_rows
        is_sparse = n_rows > DENSE_HASH_ROWS
        self.tables = nn.EmbeddingBag(len(self.sizes) * n_rows, dim, mode="sum", sparse=is_sparse)
        # torch.compile does not know sparse gradients. It splits the graph in two at this call, and the
        # graph of each caller up the stack as well: only a model's `forward` calls it.
        self.embed = torch.compiler.disable(embed_ngrams) if is_sparse else embed_ngrams
        # Not in the state dict, because it follows from the sizes.
        self.register_buffer("first_row", None, persistent=False)
        self.number_rows()

    def number_rows(self):
        """Set the first row of each size's table in the common weight, on the weight's device."""
        self.first_row = torch.arange(len(self.sizes), device=self.tables.weight.device) * self.n_rows

    def forward(self, ids_BT, documents_BT):
        """Returns the sums [B, T, D]."""
        hashes_BTS = hash_ngrams(ids_BT, documents_BT, self.sizes, self.n_rows, self.boundary)
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
        return sums_ND.unflatten(0, ids_BT.shape)


def embed_ngrams(hash_embedding, ids_BT, documents_BT):
    """hash_embedding(ids_BT, documents_BT), as a function that can be left out of a compiled graph."""
    return hash_embedding(ids_BT, documents_BT)
