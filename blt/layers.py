"""The transformer layer of all models: RMSNorm, self-attention, feed-forward (SwiGLU, or squared ReLU).

Every stack of the project (entropy model, local encoder, latent transformer, local decoder, the plain
transformers of template_llm.py) is made of `Block`, the layer of the released BLT:

    x = x + attention(norm(x))
    x = x + feed_forward(norm(x))

Linear layers have no biases. Attention never crosses a document boundary, so several documents share
a row and each gets the result that it would get alone, however documents are packed into rows. (The
released training code masks documents as well; the port in transformers does not.)
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blt.kernels import GatedLinear, JoinedGatedLinear, SquaredLinear, apply_function, rms_norm
from blt.sharding import local


def feed_forward_width(dim):
    """Hidden width of the feed-forward: 2/3 of 4 * dim, rounded up to a multiple of 256.

    Examples: 512 -> 1536, 768 -> 2048.
    """
    # SwiGLU has three matrices where a plain feed-forward has two of width 4 * dim. At 2/3 of the
    # width it has as many weights.
    return 256 * math.ceil(int(8 * dim / 3) / 256)


def default_heads(dim):
    """The number of attention heads for a width: as many as give each at least 64 channels.

    The number must divide dim evenly. Raises ValueError if dim is odd.
    """
    for n_heads in range(max(1, dim // 64), 0, -1):
        # The rotary embedding rotates pairs of channels, so a head has an even number of them.
        if dim % n_heads == 0 and (dim // n_heads) % 2 == 0:
            return n_heads
    raise ValueError(f"width {dim} is odd; the rotary embedding needs an even number of channels a head")


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in fp32, whatever the precision of its input, as the released code does."""

    def __init__(self, dim, eps=1e-5):
        super().__init__(dim, eps)

    def forward(self, x):
        dtype = x.dtype
        # The output goes into a matrix product, for which autocast would round it anyway.
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return rms_norm(x, self.weight, self.eps, dtype)


def trains_on_cuda(x):
    """Whether this is a training pass on CUDA.

    Some layers then compute the same result in another way, which on CUDA is faster or repeats exactly.
    """
    return x.device.type == "cuda" and torch.is_grad_enabled()


def embed(embedding, ids_BT):
    """embedding(ids) [B, T, D]. In training on CUDA its gradient is added up in a fixed order, so runs can be repeated.

    torch.compile's own gradient of an embedding has atomic additions, on CUDA thousands to each of few rows.
    """
    if not trains_on_cuda(ids_BT):
        return embedding(ids_BT)
    # Bags of one id each: their gradients are sorted by id first.
    return F.embedding_bag(ids_BT.reshape(-1, 1), embedding.weight, mode="sum").unflatten(0, ids_BT.shape)


def as_stream(x):
    """x as the states that layers add to: bf16 on CUDA under bf16 autocast, else as it is.

    Sums of embeddings are fp32, and all layers would add to them in fp32: twice the bytes to move, of which a GPU
    has none to spare. Norms compute in fp32 whatever they are given.
    """
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        if torch.get_autocast_dtype("cuda") == torch.bfloat16:
            return x.bfloat16()
    return x


def products_of(x, *linears):
    """The outputs of several `nn.Linear` without bias, of one input: in training on CUDA by one matrix product.

    One large product is faster there than several small ones, and x is read once. Joining copies the
    weights. Under autocast and torch.compile that is the copy that autocast makes anyway; in fp32 it is
    an extra one.
    """
    if not trains_on_cuda(x):
        return [linear(x) for linear in linears]
    return joined_products(x, *linears).split([linear.out_features for linear in linears], dim=-1)


def joined_products(x, *linears):
    """The outputs of several `nn.Linear` without bias side by side, by one matrix product."""
    return F.linear(x, torch.cat([linear.weight for linear in linears]))


class SelfAttention(nn.Module):
    """Multi-head self-attention; an `AttentionPlan` says what attends to what. No biases.

    qk_norm: RMSNorm over the channels of each head's queries and keys, before the rotary embedding.
    """

    def __init__(self, dim, n_heads, norm_eps=1e-5, qk_norm=False):
        super().__init__()
        self.n_heads = n_heads
        self.head_dim = dim // n_heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        # One weight per channel of a head, the same for all heads.
        self.q_norm = RMSNorm(dim // n_heads, norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // n_heads, norm_eps) if qk_norm else nn.Identity()

    def forward(self, x_BTD, plan, past=None):
        """Returns the output [B, T, D] and the row's (keys, values) [B, T, H, K], keys not yet rotated.

        past: what `plan.attend` takes for the positions before the row.
        """
        products = products_of(x_BTD, self.wq, self.wk, self.wv)
        q_BTHK, k_BTHK, v_BTHK = [x.unflatten(-1, (self.n_heads, -1)) for x in products]
        q_BTHK = self.q_norm(q_BTHK)
        k_BTHK = self.k_norm(k_BTHK)
        # The plan applies the rotary embedding, because it knows the positions.
        out_BTHK = plan.attend(q_BTHK, k_BTHK, v_BTHK, past)
        return self.wo(out_BTHK.flatten(2)), (k_BTHK, v_BTHK)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). ffn_dim: the hidden width; None: `feed_forward_width`."""

    def __init__(self, dim, ffn_dim=None):
        super().__init__()
        hidden = feed_forward_width(dim) if ffn_dim is None else ffn_dim
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD):
        # One autograd function for silu, product and w2. It keeps two tensors of the hidden width for
        # the backward pass, where autograd would keep four.
        if trains_on_cuda(x_BTD):
            return apply_function(JoinedGatedLinear, joined_products(x_BTD, self.w1, self.w3), self.w2.weight)
        return apply_function(GatedLinear, self.w1(x_BTD), self.w3(x_BTD), self.w2.weight)


class SquaredReLU(nn.Module):
    """A feed-forward of two matrices: w2(relu(w1 x) ** 2), of the parameters and FLOPs of `FeedForward`.

    ffn_dim: the hidden width of that one; this one is one and a half times as wide, having no w3.
    """

    def __init__(self, dim, ffn_dim=None):
        super().__init__()
        hidden = feed_forward_width(dim) if ffn_dim is None else ffn_dim
        hidden = 3 * hidden // 2
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD):
        return apply_function(SquaredLinear, self.w1(x_BTD), self.w2.weight)


def logits_of(head, x, cap=0.0):
    """head(x), for cap > 0 as cap * tanh(logits / cap) in fp32: between -cap and cap, almost the same where small."""
    fill = -head.out_features % 8
    if fill and trains_on_cuda(x):
        # The fast kernels of a GPU need a multiple of 8 columns, and a head has 257.
        logits = F.linear(x, F.pad(head.weight, (0, 0, 0, fill)))[..., : head.out_features]
    else:
        logits = head(x)
    return cap * torch.tanh(logits.float() / cap) if cap > 0 else logits


class Block(nn.Module):
    """One transformer layer: attention, then feed-forward, each with a norm before and a residual.

    dropout: the share of each one's output that training leaves out. Attention weights are never left out: the
    fast implementations of attention have no dropout.
    """

    def __init__(self, dim, n_heads, norm_eps=1e-5, qk_norm=False, dropout=0.0, ffn_dim=None, relu2=False):
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = SelfAttention(dim, n_heads, norm_eps, qk_norm)
        self.feed_forward_norm = RMSNorm(dim, norm_eps)
        self.feed_forward = SquaredReLU(dim, ffn_dim) if relu2 else FeedForward(dim, ffn_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD, plan, past=None, gates_BTD=None):
        """Returns the new states [B, T, D] and the row's (keys, values) of `SelfAttention`.

        gates_BTD: the attention's output is multiplied by 1 + gates; None: as it is.
        """
        attended, keys_values = self.attention(self.attention_norm(x_BTD), plan, past)
        if gates_BTD is not None:
            # Multiplied in fp32: bf16 has no number between 1 and 1.0078.
            attended = as_stream(attended * (1 + gates_BTD))
        x_BTD = x_BTD + self.dropout(attended)
        x_BTD = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return x_BTD, keys_values


def run_block(block, x_BTD, plan, recompute=False, past=None):
    """The block's new states [B, T, D], without its keys and values.

    recompute: keep only x for the backward pass, and run the block again there.
    """

    def new_states(x_BTD):
        return block(x_BTD, plan, past)[0]

    if recompute and torch.is_grad_enabled():
        # Ahead of the checkpoint, which must not change the plan.
        attention = block.attention
        dtype = attention.wq.weight.dtype
        if torch.is_autocast_enabled(x_BTD.device.type):
            dtype = torch.get_autocast_dtype(x_BTD.device.type)
        plan.make_mask(attention.n_heads, dtype)
        return checkpoint(new_states, x_BTD, use_reentrant=False)
    return new_states(x_BTD)


@torch.no_grad()
def init_weights(module):
    """Draw the released code's initial weights: normal of std fan_in ** -0.5, cut at 3 std; norms one.

    The fan-in of an embedding is its width. Depth does not change the std (the released default).
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
            std = child.weight.shape[1] ** -0.5
            # Some rows at a time: trunc_normal_ needs three times the memory of what it fills, and
            # hash tables are large.
            for rows in child.weight.split(1 << 16):
                nn.init.trunc_normal_(rows, std=std, a=-3 * std, b=3 * std)
        elif isinstance(child, nn.RMSNorm):
            nn.init.ones_(child.weight)


@torch.no_grad()
def zero_outputs(model):
    """Set a new model's output projections and hash tables to zero: the wo and w2 of all layers, cross-attentions too.

    Each layer then begins as the identity, and an n-gram that training has never seen adds nothing. The first
    update moves these matrices, and their gradients reach the other ones from the second update on.
    """
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag):
            module.weight.zero_()
        for name in ("wo", "w2"):
            if hasattr(module, name):
                getattr(module, name).weight.zero_()


@contextmanager
def without_zeros(model):
    """Inside the block, matrices that are all zeros hold random numbers of the usual size; afterwards they are zeros.

    For whoever tests a model by what it computes: as long as each layer is the identity (`zero_outputs`), no logit
    depends on another position, whatever the layers do.
    """
    zeros = [local(p) for p in model.parameters() if p.dim() > 1 and not local(p).any()]
    with torch.no_grad():
        for number, p in enumerate(zeros):
            # A generator of its own: dropout and later draws must not depend on the test.
            generator = torch.Generator(p.device).manual_seed(number)
            p.normal_(std=p.shape[1] ** -0.5, generator=generator)
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()
