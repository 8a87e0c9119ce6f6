"""The Byte Latent Transformer (arXiv 2412.09871, section 3): bytes in, patches through the large transformer, bytes out.

    ids -> local encoder  (byte + n-gram hash embeddings, windowed layers)                        one state a byte
        -> patch vectors  (pooled, then cross-attention to the patch's own bytes)                 k vectors a patch
        -> latent transformer                                                                     one state a patch
        -> local decoder  (cross-attention to the newest complete patch, windowed layers)         one state a byte
        -> logits of the next byte, or of the document's end

A byte belongs to one patch, so both cross-attentions are sums over segments and gathers: linear in bytes, no masks of bytes
by patches. All sizes in a row are static, nothing is read back from the device.

What this model computes is what the released weights compute (`convert_hf.py` holds it to that), at two places other than
the paper's text: n-gram embeddings are summed without dividing by their number plus one (section 3.2.1), and each
cross-attention's residual counts twice (2 x + attention, section 3.2.2).
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from blt.attention import AttentionPlan
from blt.checks import check, check_positive
from blt.ids import BOUNDARY, documents_of
from blt.kernels import GatherAttention, SegmentAttention, apply_function
from blt.layers import Block, RMSNorm, default_heads, init_weights, run_block
from blt.segments import (
    PatchMap,
    check_patch_lengths,  # noqa: F401, the contract of this model's second argument
)

HASH_PRIME = 1_000_000_007  # base of the rolling polynomial hash
DENSE_HASH_ROWS = 65536  # tables of more rows get sparse gradients and `optimizers.RowWiseAdam`
HASH_BYTE_OFFSET, HASH_BOUNDARY, HASH_NOTHING = 4, 1, 0  # ids as the released hash numbers them


@dataclass
class BLTConfig:
    # local encoder
    encoder_layers: int = 1  # windowed transformer layers before the pooling
    encoder_dim: int = 256  # width of the byte states
    encoder_heads: int | None = None  # attention heads; None: heads of about 64 channels
    encoder_ffn_dim: int | None = None  # hidden width of the feed-forward; None: 8/3 of the width, rounded up to 256
    ngram_sizes: list[int] = field(default_factory=lambda: [3, 4, 5, 6, 7, 8])  # bytes in the hashed n-grams
    hash_rows: int = 16384  # rows of each n-gram size's table; above 65,536 only the rows that occur are updated
    pooling: str = "max"  # how a patch's bytes start its query: max or mean
    cross_attn_k: int = 2  # vectors of encoder_dim that make up a patch
    cross_attn_all_layers_encoder: bool = False  # cross-attention after every encoder layer, not the last only
    # latent transformer
    global_layers: int = 8  # layers over patches
    global_dim: int = 512  # width
    global_heads: int | None = None  # attention heads; None: heads of about 64 channels
    global_ffn_dim: int | None = None  # hidden width of the feed-forward; None: 8/3 of the width, rounded up to 256
    # local decoder
    decoder_layers: int = 4  # windowed transformer layers after the latent transformer
    decoder_dim: int = 256  # width
    decoder_heads: int | None = None  # attention heads; None: heads of about 64 channels
    decoder_ffn_dim: int | None = None  # hidden width of the feed-forward; None: 8/3 of the width, rounded up to 256
    cross_attn_all_layers_decoder: bool = True  # cross-attention before every decoder layer, not the first only
    # all
    window: int = 512  # bytes that a byte attends to in the local layers, itself included
    rope_theta: float = 500000.0  # base of the rotary embedding's wavelengths
    norm_eps: float = 1e-5  # RMSNorm's epsilon
    qk_norm: bool = False  # RMSNorm of queries and keys in self-attention
    dropout: float = 0.0  # dropout rate
    recompute: bool = (
        False  # keep only each layer's input for the backward pass: about half the memory, a third more compute
    )

    def __post_init__(self):
        check_positive(
            self, "encoder_layers", "encoder_dim", "global_layers", "global_dim", "decoder_layers", "decoder_dim"
        )
        check_positive(self, "encoder_ffn_dim", "global_ffn_dim", "decoder_ffn_dim")
        check_positive(self, "hash_rows", "cross_attn_k", "window", "rope_theta", "norm_eps")
        check(self, "pooling", self.pooling in ("max", "mean"), "max or mean")
        check(self, "dropout", 0 <= self.dropout < 1, "from 0 to below 1")
        good_sizes = all(isinstance(n, int) and n >= 2 for n in self.ngram_sizes) and len(set(self.ngram_sizes)) == len(
            self.ngram_sizes
        )
        check(self, "ngram_sizes", good_sizes, "different whole numbers, 2 or more each (or empty)")
        for part in ("encoder", "global", "decoder"):
            heads, dim = self.heads(part), getattr(self, f"{part}_dim")
            check(
                self,
                f"{part}_dim",
                heads > 0 and dim % (2 * heads) == 0,
                f"a multiple of 2 * {part}_heads = {2 * heads}",
            )

    def heads(self, part):
        """Attention heads of 'encoder', 'global' or 'decoder'."""
        return getattr(self, f"{part}_heads") or default_heads(getattr(self, f"{part}_dim"))


def hash_ngrams(ids_BT, documents_BT, sizes, rows):
    """Row of each n-gram size's table for the n-gram that ends at each id: int64 [B, T, number of sizes] (section 3.2.1).

    hash = (sum over i of id[t-n+1+i] * prime ** i, in wrapping 64-bit arithmetic) mod rows: the oldest byte has prime ** 0. Ids are
    numbered as in the released code (byte b as b + 4, the boundary as 1) and are 0 before the document's boundary.
    """
    numbered = torch.where(ids_BT == BOUNDARY, HASH_BOUNDARY, ids_BT + HASH_BYTE_OFFSET)
    total, hash_of_size = torch.zeros_like(ids_BT), {}
    for back in range(max(sizes)):  # Horner's rule: an older id more, all others times the prime
        ids = F.pad(numbered, (back, 0), value=HASH_NOTHING)[:, : ids_BT.shape[1]]
        documents = F.pad(documents_BT, (back, 0), value=-1)[:, : ids_BT.shape[1]]
        total = total * HASH_PRIME + ids.masked_fill(documents != documents_BT, HASH_NOTHING)
        if back + 1 in sizes:
            hash_of_size[back + 1] = total.remainder(rows)
    return torch.stack([hash_of_size[n] for n in sizes], dim=-1)


class HashEmbedding(nn.Module):
    """Sum of an embedding per n-gram size, all sizes' tables in one weight [sizes * rows, D], read in one fused lookup.

    Large tables have sparse gradients: a step then costs what the bytes of the batch cost, not what the tables do.
    """

    def __init__(self, sizes, rows, dim):
        super().__init__()
        self.sizes, self.rows = tuple(sizes), rows
        self.tables = nn.EmbeddingBag(len(self.sizes) * rows, dim, mode="sum", sparse=rows > DENSE_HASH_ROWS)
        self.register_buffer("first_row", None, persistent=False)
        self.number_rows()

    def number_rows(self):
        """Set the place of each size's first row in the common weight; on the weight's device."""
        self.first_row = torch.arange(len(self.sizes), device=self.tables.weight.device) * self.rows

    def forward(self, ids_BT, documents_BT):
        indices = hash_ngrams(ids_BT, documents_BT, self.sizes, self.rows) + self.first_row
        return self.tables(indices.flatten(0, 1)).unflatten(0, ids_BT.shape)


def embed_ngrams(embedding, ids_BT, documents_BT):
    return embedding(ids_BT, documents_BT)


# torch.compile does not know sparse gradients. BLTModel.forward calls this itself: each caller between would be cut in two as well.
embed_ngrams_uncompiled = torch.compiler.disable(embed_ngrams)


class CrossAttention(nn.Module):
    """Projections and norms of both cross-attentions (section 3.2.2): no positions, no biases, norms before both sides."""

    def __init__(self, dim, n_heads, norm_eps):
        super().__init__()
        self.n_heads = n_heads
        self.query_norm, self.key_norm = RMSNorm(dim, norm_eps), RMSNorm(dim, norm_eps)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def project(self, queries, keys):
        """Normalised projections, heads split off: [..., D] -> [..., H, K] for q, k and v."""
        keys = self.key_norm(keys)
        q, k, v = self.wq(self.query_norm(queries)), self.wk(keys), self.wv(keys)
        return [x.unflatten(-1, (self.n_heads, -1)) for x in (q, k, v)]


class EncoderCrossAttention(CrossAttention):
    """Each patch's k vectors attend to the patch's own bytes: a softmax over segments."""

    def forward(self, patches_BPkD, bytes_BTD, segments):
        q, key, value = self.project(patches_BPkD, bytes_BTD)
        # Every byte meets the k queries of its own patch; a left-out byte those of a row of zeros.
        q_MkHK = F.pad(q, (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
        attended_MkHK = apply_function(SegmentAttention, q_MkHK, key.flatten(0, 1), value.flatten(0, 1), segments)
        return 2 * patches_BPkD + self.wo(segments.drop_left_out(attended_MkHK).flatten(3))


class DecoderCrossAttention(CrossAttention):
    """Each byte attends to the k vectors of the newest complete patch: a gather and a softmax over k."""

    def forward(self, bytes_BTD, patches_BPkD, read_N):
        q, key, value = (x.flatten(0, 1) for x in self.project(bytes_BTD, patches_BPkD))
        attended_NHK = apply_function(GatherAttention, q, key, value, read_N)
        return 2 * bytes_BTD + self.wo(attended_NHK.flatten(1).unflatten(0, bytes_BTD.shape[:2]))


class LocalEncoder(nn.Module):
    """Bytes to byte states and patch vectors (section 3.2)."""

    def __init__(self, config):
        super().__init__()
        D, k, heads = config.encoder_dim, config.cross_attn_k, config.heads("encoder")
        self.config = config
        self.byte_embedding = nn.Embedding(BOUNDARY + 1, D)
        self.hash_embedding = HashEmbedding(config.ngram_sizes, config.hash_rows, D) if config.ngram_sizes else None
        self.blocks = nn.ModuleList(
            Block(D, heads, config.norm_eps, config.qk_norm, config.dropout, config.encoder_ffn_dim)
            for _ in range(config.encoder_layers)
        )
        self.patch_query = nn.Linear(D, k * D, bias=False)
        n_cross = config.encoder_layers if config.cross_attn_all_layers_encoder else 1
        self.cross_attentions = nn.ModuleList(EncoderCrossAttention(D, heads, config.norm_eps) for _ in range(n_cross))

    def forward(self, ids_BT, ngrams_BTD, plan, segments):
        """ngrams_BTD: the ids' n-gram hash embeddings, or None. Returns byte states [B, T, D] and patch vectors [B, P, k, D]."""
        states = self.byte_states(ids_BT, ngrams_BTD, plan)
        return states[-1], self.patch_vectors(states, segments)

    def byte_states(self, ids_BT, ngrams_BTD, plan, pasts=None):
        """Byte states [B, T, D] after each layer that a cross-attention reads; the last is the encoder's output."""
        x_BTD = self.byte_embedding(ids_BT)
        if ngrams_BTD is not None:
            x_BTD = x_BTD + ngrams_BTD
        x_BTD = F.dropout(x_BTD, self.config.dropout, self.training)
        states = []
        for layer, block in enumerate(self.blocks):
            x_BTD = run_block(block, x_BTD, plan, self.config.recompute, pasts and pasts[layer])
            states.append(x_BTD)
        return states[len(self.blocks) - len(self.cross_attentions) :]

    def patch_vectors(self, states, segments):
        """The k vectors of each patch [B, P, k, D] from the `byte_states` of its bytes."""
        patches_BPkD = self.patch_query(self._pool(states[0], segments)).unflatten(-1, (self.config.cross_attn_k, -1))
        for cross_attention, x_BTD in zip(self.cross_attentions, states):
            patches_BPkD = cross_attention(patches_BPkD, x_BTD, segments)
        return patches_BPkD

    def _pool(self, x_BTD, segments):
        x_ND = x_BTD.flatten(0, 1)
        if self.config.pooling == "max":
            return segments.drop_left_out(segments.max(x_ND))
        count = segments.sum(x_ND.new_ones(x_ND.shape[0], 1)).clamp(min=1)
        return segments.drop_left_out(segments.sum(x_ND) / count)


class LatentTransformer(nn.Module):
    """Causal transformer over patches (section 3.1)."""

    def __init__(self, config):
        super().__init__()
        G, patch_dim = config.global_dim, config.cross_attn_k * config.encoder_dim
        self.recompute = config.recompute
        self.widen = nn.Linear(patch_dim, G, bias=False) if patch_dim != G else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(G, config.heads("global"), config.norm_eps, config.qk_norm, config.dropout, config.global_ffn_dim)
            for _ in range(config.global_layers)
        )

    def forward(self, patches_BPkD, plan, pasts=None):
        """Returns latent states [B, P, G]."""
        x_BPG = self.dropout(self.widen(patches_BPkD.flatten(2)))
        for layer, block in enumerate(self.blocks):
            x_BPG = run_block(block, x_BPG, plan, self.recompute, pasts and pasts[layer])
        return x_BPG


class LocalDecoder(nn.Module):
    """Byte states and latent states to the states that predict the next byte (section 3.3)."""

    def __init__(self, config):
        super().__init__()
        D, k, heads = config.decoder_dim, config.cross_attn_k, config.heads("decoder")
        self.k, self.dropout, self.recompute = k, nn.Dropout(config.dropout), config.recompute
        self.from_encoder = nn.Linear(config.encoder_dim, D, bias=False) if config.encoder_dim != D else nn.Identity()
        self.patch_vectors = nn.Linear(config.global_dim, k * D, bias=False)
        n_cross = config.decoder_layers if config.cross_attn_all_layers_decoder else 1
        self.cross_attentions = nn.ModuleList(DecoderCrossAttention(D, heads, config.norm_eps) for _ in range(n_cross))
        self.blocks = nn.ModuleList(
            Block(D, heads, config.norm_eps, config.qk_norm, config.dropout, config.decoder_ffn_dim)
            for _ in range(config.decoder_layers)
        )
        self.norm = RMSNorm(D, config.norm_eps)

    def forward(self, bytes_BTD, latents_BPG, plan, read_N, pasts=None):
        """read_N: the patch that each byte reads, `PatchMap.read`. Returns states [B, T, D], normalised for the head."""
        patches_BPkD = self.patch_vectors(latents_BPG).unflatten(-1, (self.k, -1))
        x_BTD = self.dropout(self.from_encoder(bytes_BTD))
        for layer, block in enumerate(self.blocks):
            if layer < len(self.cross_attentions):
                x_BTD = self.cross_attentions[layer](x_BTD, patches_BPkD, read_N)
            x_BTD = run_block(block, x_BTD, plan, self.recompute, pasts and pasts[layer])
        return self.norm(x_BTD)


class BLTModel(nn.Module):
    """The Byte Latent Transformer.

    A row of T + 1 ids s has inputs s[:T] and targets s[1:]; patch_lengths cover all T + 1 ids, zeros on the right, the first
    patch being the boundary or a single byte. The logits at t are for id t + 1 and use the newest patch that was complete
    at t. Classes 0..255 are bytes, 256 is the document's end.
    """

    n_classes = BOUNDARY + 1

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = LocalEncoder(config)
        self.latent = LatentTransformer(config)
        self.decoder = LocalDecoder(config)
        self.head = nn.Linear(config.decoder_dim, self.n_classes, bias=False)
        init_weights(self)

    def forward(self, ids_BT, patch_lengths_BP):
        """ids_BT: int64 in 0..256; patch_lengths_BP: int64, each row's sum T + 1. Returns logits [B, T, 257].

        Checks shapes only; `check_patch_lengths` checks values (it would stall a GPU here).
        """
        if ids_BT.dim() != 2 or patch_lengths_BP.dim() != 2 or ids_BT.shape[0] != patch_lengths_BP.shape[0]:
            raise ValueError(
                f"ids must be [B, T] and patch lengths [B, P], not {list(ids_BT.shape)} and {list(patch_lengths_BP.shape)}"
            )
        config, hash_embedding = self.config, self.encoder.hash_embedding
        documents_BT = documents_of(ids_BT, BOUNDARY)
        ngrams_BTD = None
        if hash_embedding is not None:
            embed = embed_ngrams_uncompiled if hash_embedding.tables.sparse else embed_ngrams
            ngrams_BTD = embed(hash_embedding, ids_BT, documents_BT)
        patch_map = PatchMap(patch_lengths_BP, documents_BT)
        head_dims = {
            part: getattr(config, f"{part}_dim") // config.heads(part) for part in ("encoder", "global", "decoder")
        }
        plan = AttentionPlan(documents_BT, head_dims["encoder"], config.rope_theta, config.window)
        bytes_BTD, patches_BPkD = self.encoder(ids_BT, ngrams_BTD, plan, patch_map)
        latents_BPG = self.latent(
            patches_BPkD, AttentionPlan(patch_map.documents_BP, head_dims["global"], config.rope_theta)
        )
        if head_dims["decoder"] != head_dims["encoder"]:
            plan = AttentionPlan(documents_BT, head_dims["decoder"], config.rope_theta, config.window)
        return self.head(self.decoder(bytes_BTD, latents_BPG, plan, patch_map.read))

    def parameters_by_part(self):
        """{"hash embedding", "encoder", "latent", "decoder": number of parameters}; the parts sum to the whole."""
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        hashes = count(self.encoder.hash_embedding) if self.encoder.hash_embedding is not None else 0
        return {
            "hash embedding": hashes,
            "encoder": count(self.encoder) - hashes,
            "latent": count(self.latent),
            "decoder": count(self.decoder) + count(self.head),
        }


def uninitialized(config, device="cpu", dtype=torch.float32):
    """A `BLTModel` whose weights are about to be read: nothing is drawn at random (a minute for 4.6 billion parameters, twice their memory in bf16).

    Load all weights before use; until then they are whatever was in memory.
    """
    with torch.device("meta"):
        model = BLTModel(config)
    model = model.to(dtype).to_empty(device=device)
    for name, _ in model.named_buffers():
        assert name == "encoder.hash_embedding.first_row", f"{name} would stay unset"
    if model.encoder.hash_embedding is not None:
        model.encoder.hash_embedding.number_rows()
    return model
