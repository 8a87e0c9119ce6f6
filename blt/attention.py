"""Causal self-attention within a window and within a document, with rotary position embeddings.

`AttentionPlan` says which positions of a batch of rows attend to which. A model makes one per
forward pass and shares it among all layers of a stack.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from blt.kernels import BandAttention, RotatedPairs, apply_function, in_memory

# Documents of a row are numbered from 0 up. These two numbers are for positions that are in no
# document, so that no real position attends to them.
# Before the row:
NO_DOCUMENT = -1
# After the row, where the last block is filled up. These positions attend to each other, because a
# softmax over no key at all would be NaN, and NaN would spread through the gradients.
AFTER_ROW = -2

# Widths of a head that FlexAttention's kernels take. Below 16 they do not lower. Wider than these they
# need more shared memory than a card has: 256 channels need 149 KiB; an RTX 4090 has 99.
LEAST_FLEX_CHANNELS = 16
MOST_FLEX_CHANNELS = 128
# An H100 (capability 9) and a B200 (10) have 227 KiB. Consumer cards of capability 12 have 99 again.
MOST_FLEX_CHANNELS_OF_LARGE_CARDS = 256
LARGE_CARDS = (9, 10)

# FlexAttention's mask says of each tile of this many queries and keys whether it is seen in full, in part or not.
FLEX_TILE = 128

# A band on a CPU has at most about this many attention scores, so that they stay in a core's cache.
BAND_SCORES = 1 << 19


def rotary_cos_sin(positions_T, head_dim, theta):
    """Cosines and sines of the rotary embedding (RoPE, BLT section 4.8).

    The angle of channel pair i at a position is position * theta ** (-2 i / head_dim).
    positions_T may be negative: attention depends on differences of positions only.
    Returns float32 [T, 1, head_dim / 2, 2]: one head for all, and (cos, sin) on the last axis.
    """
    channels_K = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32)
    # 1 / theta ** x and not theta ** -x, to round as the published code does. In rows of thousands
    # of bytes the difference shows.
    frequencies_K = 1.0 / theta ** (channels_K / head_dim)
    angles_TK = positions_T.float()[:, None] * frequencies_K
    return torch.stack((angles_TK.cos(), angles_TK.sin()), dim=-1)[:, None]


def apply_rotary(x_BTHK, cos_sin):
    """Rotate the channel pairs (x0, x1), (x2, x3), ... of each head by the angles of its position.

    These interleaved pairs are the released BLT's layout; Llama's code pairs channel i with
    i + K / 2. cos_sin: `rotary_cos_sin` of the T positions. Computed in fp32, returned in x's dtype.
    """
    is_cpu = x_BTHK.device.type == "cpu"
    if is_cpu or (x_BTHK.device.type == "cuda" and not torch.compiler.is_compiling()):
        # A complex product is one operation instead of seven, but torch.compile cannot fuse it, and an
        # Apple GPU has few operations on complex numbers.
        pairs = x_BTHK.float().unflatten(-1, (-1, 2))
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin))
        return rotated.flatten(-2).to(x_BTHK.dtype)
    return apply_function(RotatedPairs, x_BTHK, cos_sin)


def may_attend(distance, is_same_document, window):
    """The attention mask: True where a query attends to a key that is `distance` positions before it.

    The key must be in the query's document, must not come after the query, and must be less than a
    window away: window 512 is the query's own position and the 511 before it. None: no limit.
    """
    is_in_reach = distance >= 0
    if window is not None:
        is_in_reach = is_in_reach & (distance < window)
    return is_same_document & is_in_reach


class AttentionPlan:
    """Which positions attend to which in a batch of rows (`may_attend`), and their rotary angles.

    Three implementations compute the same attention. `attend` chooses the one that is fast where the
    model runs:

        CPU                  `_by_bands`           a loop over bands of queries
        recent GPU compiled  `_by_flex_attention`  one kernel, made for the mask
        all else             `_by_blocks`          one call of torch's attention

    Generation attends to caches instead, under an `incremental.CachedAttentionPlan`.

    With a window, time and memory of all three are linear in the row: none makes T x T scores.

    documents_BT: int, the document number of each position, non-decreasing along the row.
    window: positions that a query attends to, its own included; None: all before it.
    past_documents_BW: the document numbers of the W positions before the row, when a long stream is
        read in chunks; NO_DOCUMENT before the start of the stream. `attend` then needs the keys and
        values of these positions as its `past`.
    """

    def __init__(self, documents_BT, head_dim, theta, window=None, past_documents_BW=None):
        self.documents = documents_BT
        self.head_dim = head_dim
        self.past_documents = past_documents_BW
        self.window = window
        self.length = documents_BT.shape[1]
        self.past_length = 0 if past_documents_BW is None else past_documents_BW.shape[1]
        # The row's positions count from 0, those of the past are negative.
        positions = torch.arange(-self.past_length, self.length, device=documents_BT.device)
        # Once, and not again in each layer's kernels.
        self.cos_sin = in_memory(rotary_cos_sin(positions, head_dim, theta))
        # The masks of the three implementations. The first layer makes the one it needs, and the
        # other layers of the stack use it again.
        self.bands = None
        self.flex_mask = None
        self.blocks = None

    @classmethod
    def carry_length(cls, window):
        """How many positions before a chunk its queries may attend to, when a stream is read in chunks.

        This is W: window - 1, rounded up to whole blocks of `BlockAttention`.
        """
        block_length, n_before = BlockAttention.block_length_and_number_before(window)
        return block_length * n_before

    def attend(self, q_BTHK, k_BTHK, v_BTHK, past=None):
        """Softmax attention of the row's positions under this plan: [B, T, H, K].

        q, k: not rotated yet. past: keys (not rotated either) and values [B, W, H, K] of the
        positions before the row.
        """
        if past is not None:
            past_k, past_v = past
            k_BTHK = torch.cat((past_k.to(k_BTHK.dtype), k_BTHK), dim=1)
            v_BTHK = torch.cat((past_v.to(v_BTHK.dtype), v_BTHK), dim=1)
        q = apply_rotary(q_BTHK, self.cos_sin[self.past_length :])
        k = apply_rotary(k_BTHK, self.cos_sin)
        self.make_mask(q.shape[2], q.dtype)
        implementation = self.implementation()
        if implementation == "bands":
            return self._by_bands(q, k, v_BTHK)
        if implementation == "flex":
            return self._by_flex_attention(q, k, v_BTHK)
        return self._by_blocks(q, k, v_BTHK)

    def implementation(self):
        """The name of the implementation that `attend` chooses: "bands", "flex" or "blocks"."""
        device = self.documents.device
        if device.type == "cpu":
            return "bands"
        if runs_flex_attention(device, self.head_dim):
            return "flex"
        return "blocks"

    def make_mask(self, n_heads, dtype):
        """Make the mask that `attend` needs, if it is not made yet. n_heads, dtype: of the queries.

        Layers inside torch's `checkpoint` need it made before: a plan that they changed would be a side
        effect, for which torch.compile gives up the graph.
        """
        implementation = self.implementation()
        # A band's bias is added to the scores in place, so both need one dtype.
        has_bands = self.bands is not None and self.bands[0][-1].dtype == dtype
        if implementation == "bands" and not has_bands:
            self.bands = self._make_bands(n_heads, dtype)
        elif implementation == "flex" and self.flex_mask is None:
            self.flex_mask = self._make_flex_mask()
        elif implementation == "blocks" and self.blocks is None:
            self.blocks = BlockAttention(self.documents, self.window, self.past_documents)

    def _by_bands(self, q_BTHK, k_BSHK, v_BSHK):
        """For CPUs: one band of queries after another, each with the keys that it can see."""
        q = q_BTHK.transpose(1, 2)
        k = k_BSHK.transpose(1, 2)
        v = v_BSHK.transpose(1, 2)
        if not torch.is_grad_enabled():
            # Queries times keys is faster with the keys transposed in memory. With gradients it does
            # not pay, because the products of the backward pass are slower then.
            k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
        return apply_function(BandAttention, q, k, v, self.bands).transpose(1, 2)

    def _make_bands(self, n_heads, dtype):
        """The `Band`s that cover the row, in order."""
        documents_BS = self.documents
        if self.past_length:
            documents_BS = torch.cat((self.past_documents, self.documents), dim=1)
        n_queries = self._queries_per_band(n_heads)
        bands = []
        for first_query in range(0, self.length, n_queries):
            end_query = min(self.length, first_query + n_queries)
            # Keys are numbered from the start of the past, so query i is at key past_length + i.
            key_of_first = self.past_length + first_query
            end_key = self.past_length + end_query
            first_key = 0
            if self.window is not None:
                # Rounded down to 64, because products are faster on aligned memory.
                first_key = max(0, key_of_first - self.window + 1) // 64 * 64
            distance = torch.arange(key_of_first, end_key)[:, None] - torch.arange(first_key, end_key)
            query_documents = documents_BS[:, key_of_first:end_key, None]
            key_documents = documents_BS[:, None, first_key:end_key]
            is_visible = may_attend(distance, query_documents == key_documents, self.window)
            bias = torch.zeros(is_visible.shape, dtype=dtype).masked_fill_(~is_visible, -torch.inf)
            bands.append(Band(first_query, end_query, first_key, end_key, bias[:, None]))
        return bands

    def _queries_per_band(self, n_heads):
        """A power of two: large for fast matrix products, but a band keeps to BAND_SCORES scores."""
        n_rows = self.documents.shape[0]
        keys_per_query = self.length // 2 if self.window is None else self.window
        n_queries = 64 if self.window else 128
        while n_queries < self.length:
            scores_if_doubled = n_rows * n_heads * 2 * n_queries * (keys_per_query + 2 * n_queries)
            if scores_if_doubled > BAND_SCORES:
                break
            n_queries *= 2
        return n_queries

    def _by_flex_attention(self, q_BTHK, k_BTHK, v_BTHK):
        """For compiled code on recent GPUs: a kernel made from the mask, which skips empty tiles."""
        q = q_BTHK.transpose(1, 2)
        k = k_BTHK.transpose(1, 2)
        v = v_BTHK.transpose(1, 2)
        # Rows of fewer than 128 positions would otherwise get the kernel for decoding, which takes a
        # minute to compile and spills its registers.
        options = {"FORCE_USE_FLEX_ATTENTION": True}
        return flex_attention(q, k, v, block_mask=self.flex_mask, kernel_options=options).transpose(1, 2)

    def _make_flex_mask(self):
        """The row's mask for FlexAttention, from the first and last document of each tile of positions.

        torch's own `create_block_mask` asks about each pair of positions, T x T of them in each row.
        """
        # Plain names, because torch.compile has to see through this function's closure.
        documents_BS = documents_BT = self.documents
        if self.past_length:
            documents_BS = in_memory(torch.cat((self.past_documents, documents_BT), dim=1))
        window = self.window
        past_length = self.past_length
        T = self.length
        S = past_length + T
        # The first key that a query sees. So `may_attend` costs the kernels two comparisons a pair, in
        # tiles that are seen in part.
        first_BT = torch.searchsorted(documents_BS, documents_BT.contiguous())
        if window is not None:
            first_of_window_T = torch.arange(T, device=documents_BT.device) + past_length - window + 1
            first_BT = torch.maximum(first_BT, first_of_window_T)
        first_BT = in_memory(first_BT.int())

        def is_visible(row, head, query, key):
            return (key >= first_BT[row, query]) & (key <= query + past_length)

        # Tile I of queries, tile J of keys. Keys are numbered from the start of the past, and queries like them.
        queries = _Tiles.of(documents_BT, past_length)
        keys = _Tiles.of(documents_BS, 0)
        nearest_IJ = queries.begin[:, None] - (keys.begin + FLEX_TILE - 1)
        farthest_IJ = queries.begin[:, None] + FLEX_TILE - 1 - keys.begin
        # Documents are numbered upwards, so two tiles share one if neither ends before the other begins.
        shares_document_BIJ = queries.first[:, :, None] <= keys.last[:, None, :]
        shares_document_BIJ = shares_document_BIJ & (keys.first[:, None, :] <= queries.last[:, :, None])
        # Some pair may be visible: of one document, and the key not after the query.
        is_seen_BIJ = shares_document_BIJ & (farthest_IJ >= 0)
        # All pairs are visible: both tiles lie in one document, and all keys are before all queries.
        is_one_document_BIJ = queries.last[:, :, None] == keys.first[:, None, :]
        is_one_document_BIJ = is_one_document_BIJ & (queries.first[:, :, None] == keys.last[:, None, :])
        is_full_BIJ = is_one_document_BIJ & (nearest_IJ >= 0) & queries.is_whole[:, None] & keys.is_whole
        # And in the window.
        if window is not None:
            is_seen_BIJ = is_seen_BIJ & (nearest_IJ < window)
            is_full_BIJ = is_full_BIJ & (farthest_IJ < window)
        seen_in_part = _listed_tiles(is_seen_BIJ & ~is_full_BIJ)
        seen_in_full = _listed_tiles(is_full_BIJ)
        tile = (FLEX_TILE, FLEX_TILE)
        return BlockMask.from_kv_blocks(*seen_in_part, *seen_in_full, tile, is_visible, seq_lengths=(T, S))

    def _by_blocks(self, q_BTHK, k_BSHK, v_BSHK):
        """For all else (older GPUs, code that is not compiled): torch's attention on blocks."""
        return self.blocks.attend(q_BTHK, k_BSHK, v_BSHK)


class _Tiles(NamedTuple):
    """Consecutive tiles of FLEX_TILE positions."""

    begin: torch.Tensor  # [tiles]: the first position
    first: torch.Tensor  # [B, tiles]: the first position's document
    last: torch.Tensor  # [B, tiles]: the last position's document
    is_whole: torch.Tensor  # [tiles]: whether the tile is in the row as a whole

    @classmethod
    def of(cls, documents_BT, begin):
        """The tiles of a row of documents, whose first position is `begin`."""
        T = documents_BT.shape[1]
        n_tiles = -(-T // FLEX_TILE)
        filled_BT = F.pad(documents_BT, (0, n_tiles * FLEX_TILE - T), value=AFTER_ROW)
        # What fills the last tile up has the least number.
        last_BI = filled_BT.unflatten(1, (n_tiles, FLEX_TILE)).amax(-1)
        begin_I = torch.arange(n_tiles, device=documents_BT.device) * FLEX_TILE
        return cls(begin_I + begin, filled_BT[:, ::FLEX_TILE], last_BI, begin_I + FLEX_TILE <= T)


def _listed_tiles(is_chosen_BIJ):
    """How many tiles of keys each tile of queries has chosen, and all numbers of tiles, theirs first.

    int32 [B, 1, I] and [B, 1, I, J]: all heads have the same mask.
    """
    numbers = is_chosen_BIJ.int().argsort(dim=-1, descending=True, stable=True)
    return is_chosen_BIJ.sum(-1, dtype=torch.int32)[:, None], numbers.int()[:, None]


class Band(NamedTuple):
    """A range of a row's queries, the range of keys that they can see, and the mask between them."""

    first_query: int
    end_query: int  # one past the last
    first_key: int  # numbered from the start of the past, or of the row if there is none
    end_key: int  # one past the last
    bias: torch.Tensor  # [B, 1, queries, keys]: added to the scores, 0 where visible and -inf where not


def runs_flex_attention(device, head_dim):
    """Whether this is code under torch.compile for a GPU, and a head width, that FlexAttention's kernels support."""
    if not torch.compiler.is_compiling() or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and head_dim in flex_head_dims(device)


def flex_head_dims(device):
    """The widths of a head, a range, for which FlexAttention's kernels compile on this CUDA device."""
    most = MOST_FLEX_CHANNELS
    if torch.cuda.get_device_capability(device)[0] in LARGE_CARDS:
        most = MOST_FLEX_CHANNELS_OF_LARGE_CARDS
    return range(LEAST_FLEX_CHANNELS, most + 1)


def slow_attention(device, precision, head_dim, is_compiled):
    """Why training with heads of this width has no fast attention kernel on a GPU, in words; None: it has.

    is_compiled: whether the model runs under torch.compile.
    """
    if device.type != "cuda":
        return None
    is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
    has_flex = is_compiled and is_recent
    if has_flex and head_dim in flex_head_dims(device):
        return None
    # torch's kernels that take a mask read 16 bytes of a head at a time. For other widths it
    # multiplies whole matrices of scores.
    multiple = 4 if precision == "fp32" else 8
    if head_dim % multiple:
        return (
            f"heads of {head_dim} channels are no multiple of {multiple}: torch has only its slow attention for "
            "them, which keeps all scores"
        )
    if has_flex:
        widths = flex_head_dims(device)
        return (
            f"heads of {head_dim} channels: FlexAttention takes {widths[0]} to {widths[-1]} on this GPU; "
            "attention runs with masks instead: slower"
        )
    return None


class BlockAttention:
    """Windowed attention as one scaled_dot_product_attention over blocks of half a window.

    The row is split into equal blocks, and each block becomes a row of the batch: its queries, and
    the keys of this block and of the two before it. Window 4 and 5 positions give three blocks:

        queries   0 1        2 3            4 .             .  fills the last block
        keys      - - - - 0 1    - - 0 1 2 3    0 1 2 3 4 .     -  is before the row

    A row no longer than the window, or without one, is a single block with a mask of T x T.
    """

    def __init__(self, documents_BT, window, past_documents_BW=None):
        B, T = documents_BT.shape
        has_past = past_documents_BW is not None
        if not has_past and (window is None or T <= window):
            self.block_length = T
            self.n_before = 0
        else:
            self.block_length, self.n_before = self.block_length_and_number_before(window)
        self.length = T
        self.n_blocks = -(-T // self.block_length)
        self.fill = self.n_blocks * self.block_length - T
        carry = self.n_before * self.block_length
        # Keys to be filled in before the row where no past is given.
        self.missing = 0 if has_past else carry
        if not has_past:
            past_documents_BW = documents_BT.new_full((B, carry), NO_DOCUMENT)
        filled_BT = F.pad(documents_BT, (0, self.fill), value=AFTER_ROW)
        documents_BS = torch.cat((past_documents_BW, filled_BT), dim=1)
        # As [B, blocks, queries, keys]: what a block's queries and its keys belong to.
        n_keys = carry + self.block_length
        key_documents = documents_BS.unfold(1, n_keys, self.block_length)[:, :, None, :]
        query_documents = documents_BS[:, carry:].unflatten(1, (self.n_blocks, -1))[..., None]
        # The same in every block, whose queries are at the positions of its last keys.
        positions = torch.arange(n_keys, device=documents_BT.device)
        distance = positions[carry:, None] - positions
        mask = may_attend(distance, key_documents == query_documents, window)
        self.mask = mask.flatten(0, 1)[:, None]

    @staticmethod
    def block_length_and_number_before(window):
        """Positions in a block, and the blocks before its own that a query can see: 512 gives 256, 2."""
        block_length = max(1, window // 2)
        return block_length, -(-(window - 1) // block_length)

    def attend(self, q_BTHK, k_BSHK, v_BSHK):
        """Attention [B, T, H, K] of q to k and v, which have the past in front if there is one."""
        filled = F.pad(q_BTHK, (0, 0, 0, 0, 0, self.fill))
        queries = filled.unflatten(1, (self.n_blocks, self.block_length)).flatten(0, 1)
        q = queries.transpose(1, 2)
        k = self._keys_of_blocks(k_BSHK).transpose(1, 2)
        v = self._keys_of_blocks(v_BSHK).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        return out.transpose(1, 2).unflatten(0, (-1, self.n_blocks)).flatten(1, 2)[:, : self.length]

    def _keys_of_blocks(self, x_BSHK):
        """Each block together with those before it: [B, S, H, K] -> [B * blocks, keys, H, K]."""
        filled = F.pad(x_BSHK, (0, 0, 0, 0, self.missing, self.fill))
        blocks = filled.unflatten(1, (-1, self.block_length))
        # The i-th of the blocks that a query sees, for all blocks of the row at once.
        seen = [blocks[:, i : i + self.n_blocks] for i in range(self.n_before + 1)]
        return torch.cat(seen, dim=2).flatten(0, 1)
