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
from torch.utils.checkpoint import checkpoint

NO_DOCUMENT = -1  # document number of the empty places before a row: equals no real one, so nobody attends to them
AFTER_ROW = -2  # document number of the places that fill up a row's last block: they attend to each other only


def rotary_turns(positions_T, head_dim, theta):
    """Cosines and sines of the rotary embedding's angles (RoPE, BLT section 4.8).

    positions_T: any numbers, negative ones too: only differences matter. Returns float32 [T, 1, head_dim / 2, 2].
    """
    # 1 / theta ** x, not theta ** -x: rounded as in the published code, which matters in rows of thousands of bytes.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim)
    angles_TK = positions_T.float()[:, None] * frequencies
    return torch.stack((angles_TK.cos(), angles_TK.sin()), dim=-1)[:, None]


def rotate(x_BTHK, turns):
    """Turn each pair (x0, x1), (x2, x3), ... of a head by its position's `rotary_turns`: the released BLT's interleaved layout."""
    pairs = x_BTHK.float().unflatten(-1, (-1, 2))
    if x_BTHK.device.type == "cpu":  # complex numbers: several times faster there, but torch.compile cannot fuse them
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x_BTHK.dtype)


class CausalPlan:
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
        self.turns = rotary_turns(torch.arange(-self.past, T, device=device), head_dim, theta)

    @classmethod
    def carry_length(cls, window):
        """How many positions' keys and values a stream read in chunks hands from chunk to chunk."""
        block, before = Blocks.size_and_number_before(window)
        return block * before

    def attend(self, q_BTHK, k_BTHK, v_BTHK, past=None, dropout=0.0):
        """Softmax attention under this plan. past: keys and values [B, carry, H, K] before the row, keys not rotated."""
        if past is not None:
            k_BTHK, v_BTHK = (torch.cat((old.to(new.dtype), new), dim=1) for old, new in zip(past, (k_BTHK, v_BTHK)))
        q, k = rotate(q_BTHK, self.turns[self.past :]), rotate(k_BTHK, self.turns)
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
        if not torch.is_grad_enabled():  # neighbouring keys side by side: faster products with queries, slower ones backward
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
            first_key = 0 if self.window is None else max(0, past + first - self.window + 1) // 64 * 64  # aligned for the products
            distance = torch.arange(past + first, past + last)[:, None] - torch.arange(first_key, past + last)
            visible = (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)
            visible = visible & (keys_BS[:, past + first : past + last, None] == keys_BS[:, None, first_key : past + last])
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
    return torch.compiler.is_compiling() and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def apply_function(function, *arguments):
    """function.apply(*arguments), or its forward pass alone where no gradients are wanted: that saves 15 us a call."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_KeepNothing(), *arguments)


class _KeepNothing:
    save_for_backward = staticmethod(lambda *tensors: None)


class BandAttention(torch.autograd.Function):
    """Attention for CPUs, block of queries by block of queries. The backward pass makes the scores again: none are kept."""

    @staticmethod
    def forward(ctx, q_BHTK, k_BHSK, v_BHSK, bands):
        out_BHTK = torch.empty_like(q_BHTK)
        for first, last, first_key, last_key, bias in bands:
            weights = BandAttention.weights(q_BHTK[:, :, first:last], k_BHSK[:, :, first_key:last_key], bias)
            out_BHTK[:, :, first:last] = weights @ v_BHSK[:, :, first_key:last_key]
        ctx.save_for_backward(q_BHTK, k_BHSK, v_BHSK)
        ctx.bands = bands
        return out_BHTK

    @staticmethod
    def weights(q, k, bias):
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).add_(bias).softmax(-1)

    @staticmethod
    def backward(ctx, d_out):
        q_BHTK, k_BHSK, v_BHSK = ctx.saved_tensors
        scale = q_BHTK.shape[-1] ** -0.5
        dq, dk, dv = torch.empty_like(q_BHTK), torch.zeros_like(k_BHSK), torch.zeros_like(v_BHSK)
        for first, last, first_key, last_key, bias in ctx.bands:
            q, k, v = q_BHTK[:, :, first:last], k_BHSK[:, :, first_key:last_key], v_BHSK[:, :, first_key:last_key]
            d = d_out[:, :, first:last]
            weights = BandAttention.weights(q, k, bias)
            dv[:, :, first_key:last_key].add_(weights.transpose(-1, -2) @ d)
            d_scores = torch.ops.aten._softmax_backward_data(d @ v.transpose(-1, -2), weights, -1, weights.dtype)
            dq[:, :, first:last] = d_scores @ k
            dk[:, :, first_key:last_key].add_(d_scores.transpose(-1, -2) @ q)
        return dq.mul_(scale), dk.mul_(scale), dv, None


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
    """RMSNorm computed in fp32 whatever the precision of its input, as the released code does.

    Under autocast the output has autocast's precision: it feeds a matrix product, which would round it anyway.
    """

    def __init__(self, dim, eps=1e-5):
        super().__init__(dim, eps)

    def forward(self, x):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return _rms_norm(x, self.weight, self.eps, dtype)


def _rms_norm(x, weight, eps, dtype):
    if x.device.type != "cpu" or (not torch.is_grad_enabled() and x.numel() < 1 << 14):  # for few numbers torch's is faster
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(dtype)
    return apply_function(_CPURMSNorm, x, weight, eps, dtype)


class _CPURMSNorm(torch.autograd.Function):
    """RMSNorm with its backward pass by hand: torch has no kernel for it on the CPU, and composes it of a dozen passes.

    y = x * s * w with s = 1 / rms(x);   dx = s * w * dy - x * s^3 / D * sum(w * dy * x);   dw = sum over rows of s * x * dy
    """

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        dy, dim = dy.float(), x.shape[-1]
        product = (dy * x).view(-1, dim)
        d_weight = (scale.view(1, -1) @ product)[0]
        back = (product @ weight.float()).view_as(scale).mul_(scale**3).div_(-dim)
        dx = (dy * weight).mul_(scale).addcmul_(x.float(), back)
        return dx.to(x.dtype), d_weight, None, None


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
        return apply_function(_GatedLinear, self.w1(x), self.w3(x), self.w2.weight)


class _GatedLinear(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, keeping gate and up only: the gated states are made again in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, dy):
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        d_weight = dy.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        d_gated = dy @ weight.to(dy.dtype)
        d_gate = torch.ops.aten.silu_backward(d_gated * up, gate)
        return d_gate, d_gated * activated, d_weight.to(weight.dtype)


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


def run_block(block, x_BTD, plan, recompute=False, past=None):
    """block(x) without its keys and values. recompute: keep nothing but x, and run the block again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(lambda x: block(x, plan, past)[0], x_BTD, use_reentrant=False)
    return block(x_BTD, plan, past)[0]


@torch.no_grad()
def init_weights(module):
    """The released code's initial weights: normal of std fan_in ** -0.5 cut at 3 std; norms at one.

    An embedding's fan-in is its width. No extra factor by depth (the released default).
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
            std = child.weight.shape[1] ** -0.5
            for rows in child.weight.split(1 << 16):  # trunc_normal_ needs three times the memory of what it fills
                nn.init.trunc_normal_(rows, std=std, a=-3 * std, b=3 * std)
        elif isinstance(child, nn.RMSNorm):
            nn.init.ones_(child.weight)
