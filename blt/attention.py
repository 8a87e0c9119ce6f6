"""Causal attention within a window and within a document, with rotary positions."""

import torch
import torch.nn.functional as F

from blt.kernels import BandAttention, apply_function

NO_DOCUMENT = -1  # document number of the empty places before a row: equals no real one, so nobody attends to them
AFTER_ROW = -2  # document number of the places that fill up a row's last block: they attend to each other only


def rotary_cos_sin(positions_T, head_dim, theta):
    """Cosines and sines of the rotary embedding's angles (RoPE, BLT section 4.8).

    positions_T: any numbers, negative ones too: only differences matter. Returns float32 [T, 1, head_dim / 2, 2].
    """
    # 1 / theta ** x, not theta ** -x: rounded as in the published code, which matters in rows of thousands of bytes.
    frequencies = 1.0 / theta ** (
        torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    )
    angles_TK = positions_T.float()[:, None] * frequencies
    return torch.stack((angles_TK.cos(), angles_TK.sin()), dim=-1)[:, None]


def apply_rotary(x_BTHK, cos_sin):
    """Turn each pair (x0, x1), (x2, x3), ... of a head by its position's `rotary_cos_sin`: the released BLT's interleaved layout."""
    pairs = x_BTHK.float().unflatten(-1, (-1, 2))
    if x_BTHK.device.type == "cpu":  # complex numbers: several times faster there, but torch.compile cannot fuse them
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), cos_sin.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BTHK.dtype)


class AttentionPlan:
    """Who attends to whom in one row batch, and the rotary angles: made once, shared by all layers of a stack.

    Position i attends to j iff j is in i's document and i - window < j <= i (window None: any j <= i).

    The same attention is computed by whichever of three ways is fast where it runs; time and memory are linear in the row
    when there is a window, and no mask has row by row entries:
        on a CPU      `BandAttention`: one block of queries after another, each with the keys it can see
        CUDA graphs   FlexAttention, under torch.compile on cards from compute capability 8.0 on
        elsewhere     scaled_dot_product_attention over blocks of half a window, each with the two before it

    documents_BT: int, the document number of each position, rising along the row.
    past_documents_BW: document numbers of the `carry` positions before the row, when their keys and values are passed
        to `attend` (a long stream read in chunks); NO_DOCUMENT where there is nothing.
    """

    def __init__(self, documents_BT, head_dim, theta, window=None, past_documents_BW=None):
        T, device = documents_BT.shape[1], documents_BT.device
        self.documents, self.past_documents = documents_BT, past_documents_BW
        self.length, self.window = T, window
        self.past = 0 if past_documents_BW is None else past_documents_BW.shape[1]
        self.bands = self.blocks = self.flex_mask = None
        self.cos_sin = rotary_cos_sin(torch.arange(-self.past, T, device=device), head_dim, theta)

    @classmethod
    def carry_length(cls, window):
        """How many positions' keys and values a stream read in chunks hands from chunk to chunk."""
        block, before = Blocks.size_and_number_before(window)
        return block * before

    def attend(self, q_BTHK, k_BTHK, v_BTHK, past=None, dropout=0.0):
        """Softmax attention under this plan. past: keys and values [B, carry, H, K] before the row, keys not rotated."""
        if past is not None:
            k_BTHK, v_BTHK = (torch.cat((old.to(new.dtype), new), dim=1) for old, new in zip(past, (k_BTHK, v_BTHK)))
        q, k = apply_rotary(q_BTHK, self.cos_sin[self.past :]), apply_rotary(k_BTHK, self.cos_sin)
        if q.device.type == "cpu" and not dropout:
            return self._by_bands(q, k, v_BTHK)
        if not dropout and past is None and runs_flex_attention(q.device):
            return self._by_flex_attention(q, k, v_BTHK)
        if self.blocks is None:
            self.blocks = Blocks(self.documents, self.window, self.past_documents)
        return self.blocks.attend(q, k, v_BTHK, dropout)

    def _by_bands(self, q, k, v):
        if self.bands is None or self.bands[0][-1].dtype != q.dtype:
            self.bands = self._make_bands(q.shape[2], q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if (
            not torch.is_grad_enabled()
        ):  # neighbouring keys side by side: faster products with queries, slower ones backward
            k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
        return apply_function(BandAttention, q, k, v, self.bands).transpose(1, 2)

    def _make_bands(self, heads, dtype):
        """[(first query, last + 1, first key, last + 1, bias [B, 1, queries, keys]), ...] covering the row."""
        B, T, past = self.documents.shape[0], self.length, self.past
        keys_BS = self.documents if not past else torch.cat((self.past_documents, self.documents), dim=1)
        seen = T // 2 if self.window is None else self.window  # keys of a query, about
        # Blocks for which the scores stay in a core's cache, and large enough for fast products.
        block = 64 if self.window else 128
        while block < T and B * heads * 2 * block * (seen + 2 * block) <= BAND_SCORES:
            block *= 2
        bands = []
        for first in range(0, T, block):
            last = min(T, first + block)
            first_key = (
                0 if self.window is None else max(0, past + first - self.window + 1) // 64 * 64
            )  # aligned for the products
            distance = torch.arange(past + first, past + last)[:, None] - torch.arange(first_key, past + last)
            visible = (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)
            visible = visible & (
                keys_BS[:, past + first : past + last, None] == keys_BS[:, None, first_key : past + last]
            )
            bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)[:, None]
            bands.append((first, last, first_key, past + last, bias))
        return bands

    def _by_flex_attention(self, q, k, v):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if self.flex_mask is None:
            documents, window, T = self.documents, self.window, self.length

            def visible(row, head, query, key):
                same = documents[row, query] == documents[row, key]
                return same & (query >= key) & (query - key < (T if window is None else window))

            self.flex_mask = create_block_mask(visible, documents.shape[0], None, T, T, device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=self.flex_mask).transpose(1, 2)


BAND_SCORES = 1 << 19  # attention scores computed at once on a CPU


def runs_flex_attention(device):
    """Whether this is code under torch.compile for a CUDA device whose Triton kernels FlexAttention supports."""
    return (
        torch.compiler.is_compiling() and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class Blocks:
    """Attention over blocks of half a window by scaled_dot_product_attention: a band of 1.5 windows for each block of queries.

    window None: one block, the whole row, with a mask of row by row.
    """

    def __init__(self, documents_BT, window, past_documents_BW=None):
        B, T = documents_BT.shape
        has_past = past_documents_BW is not None
        if not has_past and (window is None or T <= window):
            self.block, before = T, 0
        else:
            self.block, before = self.size_and_number_before(window)
        self.length, self.before, self.carry = T, before, before * self.block
        self.number = -(-T // self.block)
        self.fill = self.number * self.block - T
        if not has_past:
            past_documents_BW = documents_BT.new_full((B, self.carry), NO_DOCUMENT)
        self.missing = self.carry if not has_past else 0  # keys to be filled in before the row
        keys_BS = torch.cat((past_documents_BW, F.pad(documents_BT, (0, self.fill), value=AFTER_ROW)), dim=1)
        width = self.carry + self.block
        key_documents = keys_BS.unfold(1, width, self.block)[:, :, None, :]
        query_documents = keys_BS[:, self.carry :].unflatten(1, (self.number, self.block))[..., None]
        device = documents_BT.device
        distance = torch.arange(self.carry, width, device=device)[:, None] - torch.arange(width, device=device)
        mask = (key_documents == query_documents) & (distance >= 0)
        if window is not None:
            mask = mask & (distance < window)
        self.mask = mask.flatten(0, 1)[:, None]

    @staticmethod
    def size_and_number_before(window):
        """Positions in a block and how many blocks before its own a query may look into: window 512 gives 256 and 2."""
        block = max(1, window // 2)
        return block, -(-(window - 1) // block)

    def attend(self, q_BTHK, k_BSHK, v_BSHK, dropout):
        queries = F.pad(q_BTHK, (0, 0, 0, 0, 0, self.fill)).unflatten(1, (self.number, self.block)).flatten(0, 1)
        q, k, v = (x.transpose(1, 2) for x in (queries, self._keys(k_BSHK), self._keys(v_BSHK)))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout).transpose(1, 2)
        return out.unflatten(0, (-1, self.number)).flatten(1, 2)[:, : self.length]

    def _keys(self, x_BSHK):
        """[B, S, H, K] -> [B * blocks, carry + block, H, K]: each block together with those before it."""
        blocks = F.pad(x_BSHK, (0, 0, 0, 0, self.missing, self.fill)).unflatten(1, (-1, self.block))
        return torch.cat([blocks[:, i : i + self.number] for i in range(self.before + 1)], dim=2).flatten(0, 1)
