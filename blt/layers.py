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
from torch.utils.checkpoint import checkpoint

from blt.kernels import _GatedLinear, _rms_norm, apply_function


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


class SelfAttention(nn.Module):
    """Multi-head causal self-attention under a `AttentionPlan`, without biases. qk_norm: RMSNorm of each head's q and k."""

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

    def __init__(self, dim, ffn_dim=None):
        super().__init__()
        hidden = ffn_dim or feed_forward_width(dim)
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return apply_function(_GatedLinear, self.w1(x), self.w3(x), self.w2.weight)


class Block(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dim, n_heads, norm_eps=1e-5, qk_norm=False, dropout=0.0, ffn_dim=None):
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = SelfAttention(dim, n_heads, norm_eps, qk_norm, dropout)
        self.feed_forward_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = FeedForward(dim, ffn_dim)
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
