"""What the models share: rotary positions, causal attention within a window and within a document, feed-forward, block.

Every transformer of the project (entropy model, local encoder, latent transformer, local decoder) is a stack of `Block`,
the block of the released BLT: RMSNorm, attention without biases, residual, RMSNorm, SwiGLU, residual.

Attention never crosses a document boundary. So several documents share a row and each gets what it would get alone, and
a row's result does not depend on how documents were packed. (The released training code masks documents as well; the
transformers port does not.)
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

NO_DOCUMENT = -1  # document number of the empty places before a row: equals no real one, so nobody attends to them
AFTER_ROW = -2  # document number of the places that fill up a row's last block: they attend to each other only


def rotary_angles(positions_T, head_dim, theta):
    """Cosine and sine of the rotary embedding's angles (RoPE, BLT section 4.8).

    positions_T: any numbers, negative ones too: only differences matter. Returns two float32 [T, 1, head_dim / 2].
    """
    # 1 / theta ** x, not theta ** -x: rounded as in the published code, which matters in rows of thousands of bytes.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim)
    angles_TK = positions_T.float()[:, None] * frequencies
    return angles_TK.cos()[:, None], angles_TK.sin()[:, None]


def rotate(x_BTHK, cos, sin):
    """Turn each pair (x0, x1), (x2, x3), ... of a head by its position's angles: the released BLT's interleaved layout."""
    even, odd = x_BTHK.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BTHK.dtype)


class CausalPlan:
    """Who attends to whom in one row batch, and the rotary angles: made once, shared by all layers of a stack.

    Position i attends to j iff j is in i's document and i - window < j <= i (window None: any j <= i).

    With a window the row is cut into blocks of half a window; a block's queries see their own block and the two before it.
    Time and memory are linear in the row, and the mask is a band of window + block columns, never row by row.

    documents_BT: int, the document number of each position, rising along the row.
    past_documents_BW: document numbers of the `carry` positions before the row, when their keys and values are passed
        to `attend` (a long stream read in chunks); NO_DOCUMENT where there is nothing.
    """

    def __init__(self, documents_BT, head_dim, theta, window=None, past_documents_BW=None):
        B, T = documents_BT.shape
        device = documents_BT.device
        self.length, self.window, self.bias = T, window, None
        has_past = past_documents_BW is not None
        if window is None:
            self.carry = 0
            same_document = documents_BT[:, :, None] == documents_BT[:, None, :]
            self.mask = (same_document & torch.ones(T, T, dtype=torch.bool, device=device).tril())[:, None]
        else:
            if not has_past and T <= window:
                self.block, self.before = T, 0
            else:
                self.block, self.before = self.block_and_blocks_before(window)
            self.carry = self.before * self.block
            self.n_blocks = -(-T // self.block)
            self.fill = self.n_blocks * self.block - T
            if not has_past:
                past_documents_BW = documents_BT.new_full((B, self.carry), NO_DOCUMENT)
            keys_BS = torch.cat((past_documents_BW, F.pad(documents_BT, (0, self.fill), value=AFTER_ROW)), dim=1)
            width = self.carry + self.block
            key_documents = keys_BS.unfold(1, width, self.block)[:, :, None, :]
            query_documents = keys_BS[:, self.carry :].unflatten(1, (self.n_blocks, self.block))[..., None]
            query_place = torch.arange(self.carry, width, device=device)[:, None]
            distance = query_place - torch.arange(width, device=device)[None, :]
            mask = (key_documents == query_documents) & (distance >= 0) & (distance < window)
            self.mask = mask.flatten(0, 1)[:, None]
        positions = torch.arange(-self.carry if has_past else 0, T, device=device)
        self.cos, self.sin = rotary_angles(positions, head_dim, theta)

    @staticmethod
    def block_and_blocks_before(window):
        """Positions in a block and how many blocks before its own a query may look into: window 512 gives 256 and 2."""
        block = max(1, window // 2)
        return block, -(-(window - 1) // block)

    @classmethod
    def carry_length(cls, window):
        """How many positions' keys and values a stream read in chunks hands from chunk to chunk."""
        block, before = cls.block_and_blocks_before(window)
        return block * before

    def attend(self, q_BTHK, k_BTHK, v_BTHK, past=None, dropout=0.0):
        """Softmax attention under this plan. past: keys and values [B, carry, H, K] before the row, keys not rotated."""
        q = rotate(q_BTHK, self.cos[-self.length :], self.sin[-self.length :])
        if self.window is None:
            k = rotate(k_BTHK, self.cos, self.sin)
            return self._softmax(q, k, v_BTHK, dropout)
        if past is not None:
            k, v = (torch.cat((old.to(new.dtype), new), dim=1) for old, new in zip(past, (k_BTHK, v_BTHK)))
            k = rotate(k, self.cos, self.sin)
        else:
            k = rotate(k_BTHK, self.cos[-self.length :], self.sin[-self.length :])
            k, v = (F.pad(x, (0, 0, 0, 0, self.carry, 0)) for x in (k, v_BTHK))
        out = self._softmax(self._query_blocks(q), self._key_blocks(k), self._key_blocks(v), dropout)
        return out.unflatten(0, (-1, self.n_blocks)).flatten(1, 2)[:, : self.length]

    def _query_blocks(self, x_BTHK):
        """[B, T, H, K] -> [B * blocks, block, H, K]."""
        return F.pad(x_BTHK, (0, 0, 0, 0, 0, self.fill)).unflatten(1, (self.n_blocks, self.block)).flatten(0, 1)

    def _key_blocks(self, x_BSHK):
        """[B, carry + T, H, K] -> [B * blocks, carry + block, H, K]: each block together with those before it."""
        blocks = F.pad(x_BSHK, (0, 0, 0, 0, 0, self.fill)).unflatten(1, (-1, self.block))
        shifted = [blocks[:, i : i + self.n_blocks] for i in range(self.before + 1)]
        return torch.cat(shifted, dim=2).flatten(0, 1)

    def _softmax(self, q, k, v, dropout):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if q.device.type == "cpu" and v.dtype == torch.bfloat16:
            # On CPUs that multiply in bf16 plain products train 1.7 to 3 times faster than the fused kernel.
            if self.bias is None:
                self.bias = torch.zeros_like(self.mask, dtype=v.dtype).masked_fill_(~self.mask, -torch.inf)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            return (F.dropout(scores.add_(self.bias).softmax(-1), dropout) @ v).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout).transpose(1, 2)


def documents_of(ids_BT, boundary):
    """Number the document of each id: a boundary opens the next one. [x, x, 256, y, 256] gives 0, 0, 1, 1, 2."""
    return (ids_BT == boundary).cumsum(dim=1)


def feed_forward_width(dim):
    """Hidden width of the SwiGLU feed-forward: two thirds of 4 * dim, rounded up to 256 (512 -> 1536, 768 -> 2048)."""
    return 256 * math.ceil(int(8 * dim / 3) / 256)


def default_heads(dim):
    """Heads of about 64 channels: the most that divide `dim` into even parts (rotary positions turn pairs)."""
    for heads in range(max(1, dim // 64), 0, -1):
        if dim % heads == 0 and (dim // heads) % 2 == 0:
            return heads
    raise ValueError(f"width {dim} is odd; rotary positions need an even number of channels a head")


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in fp32 whatever the precision of its input, as the released code does."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head causal self-attention under a `CausalPlan`, without biases. qk_norm: RMSNorm of each head's q and k."""

    def __init__(self, dim, n_heads, norm_eps=1e-5, qk_norm=False, dropout=0.0):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.q_norm = RMSNorm(dim // n_heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // n_heads, norm_eps) if qk_norm else nn.Identity()

    def forward(self, x_BTD, plan, past=None):
        """Returns the output [B, T, D] and the row's (keys, values) [B, T, H, K], the keys before rotation."""
        q, k, v = (w(x_BTD).unflatten(-1, (self.n_heads, -1)) for w in (self.wq, self.wk, self.wv))
        q, k = self.q_norm(q), self.k_norm(k)
        out = plan.attend(q, k, v, past, self.dropout if self.training else 0.0)
        return self.wo(out.flatten(2)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim):
        super().__init__()
        hidden = feed_forward_width(dim)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dim, n_heads, norm_eps=1e-5, qk_norm=False, dropout=0.0):
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = SelfAttention(dim, n_heads, norm_eps, qk_norm, dropout)
        self.feed_forward_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = FeedForward(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD, plan, past=None):
        """Returns the new states [B, T, D] and the row's (keys, values)."""
        attended, keys_values = self.attention(self.attention_norm(x_BTD), plan, past)
        x_BTD = x_BTD + self.dropout(attended)
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD))), keys_values


@torch.no_grad()
def init_weights(module):
    """The released code's initial weights: normal of std fan_in ** -0.5 cut at 3 std; norms at one.

    An embedding's fan-in is its width. No extra factor by depth (the released default).
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
            std = child.weight.shape[1] ** -0.5
            nn.init.trunc_normal_(child.weight, std=std, a=-3 * std, b=3 * std)
        elif isinstance(child, nn.RMSNorm):
            nn.init.ones_(child.weight)
