"""The Byte Latent Transformer (arXiv 2412.09871, section 3).

Bytes go in, patches go through the large transformer, bytes come out:

    ids -> local encoder       byte and n-gram hash embeddings, windowed layers     a state per byte
        -> patch vectors       pooled, then cross-attention to the patch's bytes    k vectors per patch
        -> latent transformer                                                       a state per patch
        -> local decoder       cross-attention to the newest complete patch,
                               windowed layers                                      a state per byte
        -> logits              of the next byte, or of the document's end

A byte belongs to one patch. So the encoder's cross-attention is a softmax over segments, and the
decoder's a gather: their cost is linear in bytes, and there is no mask of bytes by patches. The sizes
of all tensors follow from the arguments' shapes, and no value is read back from a GPU.

The model computes what the released weights compute (`convert_hf.py` holds it to that). It differs
from the paper's text in two points: n-gram embeddings are summed without dividing by their number
plus one (section 3.2.1), and the residual of each cross-attention counts twice, 2 x + attention
(section 3.2.2).
"""

from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from blt.attention import AttentionPlan
from blt.checks import check, check_positive, check_shares
from blt.ids import BOUNDARY, documents_of
from blt.layers import (
    Block,
    RMSNorm,
    as_stream,
    default_heads,
    embed,
    init_weights,
    logits_of,
    products_of,
    run_block,
)

# HashEmbedding's other names are here for others to import.
from blt.ngrams import (  # noqa: F401
    DENSE_HASH_ROWS,
    HashEmbedding,
    TableConfig,
    check_tables,
    hash_ngrams,
    hash_spans,
)

# check_patch_lengths is here for others to import: it checks this model's second argument.
from blt.segments import PatchMap, attend_to_patches, check_patch_lengths  # noqa: F401


@dataclass
class BLTConfig(TableConfig):
    """The sizes of a `BLTModel`. Local layers work on bytes, latent ("global") layers on patches."""

    # local encoder
    encoder_layers: int = 1  # windowed transformer layers before the pooling
    encoder_dim: int = 256  # width of the byte states
    encoder_heads: int | None = None  # attention heads; None: heads of about 64 channels
    encoder_ffn_dim: int | None = None  # hidden width of the feed-forward; None: 8/3 of the width, rounded up to 256
    ngram_sizes: list[int] = field(default_factory=lambda: [3, 4, 5, 6, 7, 8])  # bytes in the hashed n-grams
    hash_rows: int = 16384  # rows of each n-gram size's table; above 32,768 only the rows that occur are updated
    patch_ngrams: list[int] = field(default_factory=list)  # n-grams that begin this many patches before a byte's own
    ngram_dropout: float = 0.0  # share of the n-grams that training leaves out, each byte's of each size by chance
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
    gate_ngrams: list[int] = field(default_factory=list)  # n-grams that scale what cross-attention reads
    # all
    window: int = 512  # bytes that a byte attends to in the local layers, itself included
    rope_theta: float = 500000.0  # base of the rotary embedding's wavelengths
    norm_eps: float = 1e-5  # RMSNorm's epsilon
    qk_norm: bool = False  # RMSNorm of queries and keys in self-attention
    relu2: bool = False  # squared ReLU instead of SwiGLU: 1.5 times as wide, so of equal FLOPs
    logit_softcap: float = 0.0  # logits become cap * tanh(logits / cap); 0: as they are
    dropout: float = 0.0  # dropout rate
    recompute: bool = False  # keep only layer inputs for the backward pass: about half the memory, a third more compute

    # Fields that the records of earlier models lack. Their defaults are what those models were.
    ADDED_FIELDS = ("patch_ngrams", "gate_ngrams", "ngram_dropout", "relu2", "logit_softcap")

    def __post_init__(self):
        check_positive(self, "encoder_layers", "encoder_dim", "encoder_heads", "encoder_ffn_dim")
        check_positive(self, "global_layers", "global_dim", "global_heads", "global_ffn_dim")
        check_positive(self, "decoder_layers", "decoder_dim", "decoder_heads", "decoder_ffn_dim")
        check_positive(self, "cross_attn_k", "window", "rope_theta", "norm_eps")
        check_tables(self)
        check(self, "pooling", self.pooling in ("max", "mean"), "max or mean")
        check_shares(self, "dropout")
        check(self, "logit_softcap", self.logit_softcap >= 0, "0 (no cap) or more")
        for part in ("encoder", "global", "decoder"):
            n_heads = self.heads(part)
            # An even number of channels a head, because the rotary embedding rotates pairs of them.
            is_good = self.dim(part) % (2 * n_heads) == 0
            check(self, f"{part}_dim", is_good, f"a multiple of 2 * {part}_heads = {2 * n_heads}")

    @property
    def table_numbers(self):
        """Numbers in all hash tables together."""
        width = self.n_embedding_tables * self.encoder_dim + len(self.gate_ngrams) * self.decoder_dim
        return self.hash_rows * width

    def dim(self, part):
        """The width of 'encoder', 'global' or 'decoder'."""
        return getattr(self, f"{part}_dim")

    def heads(self, part):
        """The number of attention heads of 'encoder', 'global' or 'decoder'."""
        n_heads = getattr(self, f"{part}_heads")
        return default_heads(self.dim(part)) if n_heads is None else n_heads

    def head_dim(self, part):
        """The channels of a head of 'encoder', 'global' or 'decoder'."""
        return self.dim(part) // self.heads(part)


class CrossAttention(nn.Module):
    """What both cross-attentions share (section 3.2.2): two norms, then four projections.

    One norm is of the states that attend, the other of the states that they attend to, from which keys
    and values are made. There are no position embeddings and no biases, and both have the same width.
    """

    def __init__(self, dim, n_heads, norm_eps):
        super().__init__()
        self.n_heads = n_heads
        self.query_norm = RMSNorm(dim, norm_eps)
        self.key_norm = RMSNorm(dim, norm_eps)
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, dim, bias=False)
        self.wv = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def project(self, queries, keys):
        """q of the queries, k and v of the keys, each split into heads: [..., D] -> [..., H, K]."""
        keys = self.key_norm(keys)
        q = self.wq(self.query_norm(queries))
        k, v = products_of(keys, self.wk, self.wv)
        return [x.unflatten(-1, (self.n_heads, -1)) for x in (q, k, v)]


class EncoderCrossAttention(CrossAttention):
    """Each patch's k vectors attend to the patch's own bytes (section 3.2.2)."""

    def forward(self, patches_BPkD, bytes_BTD, segments):
        """Returns the patches' new vectors [B, P, k, D]. segments: the bytes of each patch."""
        attended_BPkHK = segments.attend(*self.project(patches_BPkD, bytes_BTD))
        # The residual counts twice, as in the released weights.
        return 2 * patches_BPkD + self.wo(attended_BPkHK.flatten(3))


class DecoderCrossAttention(CrossAttention):
    """Each byte attends to the k vectors of the newest complete patch (section 3.3)."""

    def forward(self, bytes_BTD, patches_BPkD, read_N, gates_BTD=None):
        """Returns the new byte states [B, T, D]. read_N: the patch of each byte, `PatchMap.read`.

        gates_BTD: what each byte reads is multiplied by 1 + gates; None: as it is.
        """
        attended_BTHK = attend_to_patches(*self.project(bytes_BTD, patches_BPkD), read_N)
        read_BTD = self.wo(attended_BTHK.flatten(2))
        if gates_BTD is not None:
            # Multiplied in fp32: bf16 has no number between 1 and 1.0078.
            read_BTD = as_stream(read_BTD * (1 + gates_BTD))
        return 2 * bytes_BTD + read_BTD


class LocalEncoder(nn.Module):
    """From bytes to byte states and patch vectors (section 3.2)."""

    def __init__(self, config):
        super().__init__()
        D = config.encoder_dim
        n_heads = config.heads("encoder")
        self.config = config
        self.byte_embedding = nn.Embedding(BOUNDARY + 1, D)
        self.hash_embedding = None
        if config.n_embedding_tables:
            self.hash_embedding = HashEmbedding(
                config.ngram_sizes,
                config.hash_rows,
                D,
                dropout=config.ngram_dropout,
                n_spans=len(config.patch_ngrams),
            )
        self.blocks = nn.ModuleList(
            Block(D, n_heads, config.norm_eps, config.qk_norm, config.dropout, config.encoder_ffn_dim, config.relu2)
            for _ in range(config.encoder_layers)
        )
        self.patch_query = nn.Linear(D, config.cross_attn_k * D, bias=False)
        # Cross-attention follows every layer, or the last one only.
        n_cross = config.encoder_layers if config.cross_attn_all_layers_encoder else 1
        self.cross_attentions = nn.ModuleList(
            EncoderCrossAttention(D, n_heads, config.norm_eps) for _ in range(n_cross)
        )

    def forward(self, ids_BT, ngrams_BTD, plan, segments):
        """Returns byte states [B, T, D] and patch vectors [B, P, k, D].

        ngrams_BTD: the `HashEmbedding` of the ids, or None.
        """
        states = self.byte_states(ids_BT, ngrams_BTD, plan)
        return states[-1], self.patch_vectors(states, segments)

    def byte_states(self, ids_BT, ngrams_BTD, plan, pasts=None):
        """Byte states [B, T, D] after each layer that a cross-attention reads, the last layer last.

        pasts: for each layer, what `plan.attend` takes as its past.
        """
        x_BTD = embed(self.byte_embedding, ids_BT)
        if ngrams_BTD is not None:
            x_BTD = x_BTD + ngrams_BTD
        x_BTD = F.dropout(as_stream(x_BTD), self.config.dropout, self.training)
        states = []
        for layer, block in enumerate(self.blocks):
            past = None if pasts is None else pasts[layer]
            x_BTD = run_block(block, x_BTD, plan, self.config.recompute, past)
            states.append(x_BTD)
        return states[-len(self.cross_attentions) :]

    def patch_vectors(self, states, segments):
        """The k vectors [B, P, k, D] of each patch, from the `byte_states` of its bytes.

        The bytes are pooled into k queries, and each cross-attention refines these.
        """
        queries_BPD = self.patch_query(segments.max_or_mean(states[0], self.config.pooling))
        patches_BPkD = queries_BPD.unflatten(-1, (self.config.cross_attn_k, -1))
        for cross_attention, x_BTD in zip(self.cross_attentions, states):
            patches_BPkD = cross_attention(patches_BPkD, x_BTD, segments)
        return patches_BPkD


class LatentTransformer(nn.Module):
    """The large causal transformer over patches (section 3.1): most of the compute, once a patch."""

    def __init__(self, config):
        super().__init__()
        G = config.global_dim
        n_heads = config.heads("global")
        patch_dim = config.cross_attn_k * config.encoder_dim
        self.recompute = config.recompute
        self.widen = nn.Linear(patch_dim, G, bias=False) if patch_dim != G else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(G, n_heads, config.norm_eps, config.qk_norm, config.dropout, config.global_ffn_dim, config.relu2)
            for _ in range(config.global_layers)
        )

    def forward(self, patches_BPkD, plan, pasts=None):
        """Returns latent states [B, P, G]."""
        # A patch's k vectors, side by side, are its input. As in the released code there is no norm
        # after the last layer.
        x_BPG = self.dropout(self.widen(patches_BPkD.flatten(2)))
        for layer, block in enumerate(self.blocks):
            past = None if pasts is None else pasts[layer]
            x_BPG = run_block(block, x_BPG, plan, self.recompute, past)
        return x_BPG


class LocalDecoder(nn.Module):
    """From byte states and latent states to the states that predict the next byte (section 3.3)."""

    def __init__(self, config):
        super().__init__()
        D = config.decoder_dim
        n_heads = config.heads("decoder")
        self.k = config.cross_attn_k
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = config.recompute
        self.from_encoder = nn.Identity()
        if config.encoder_dim != D:
            self.from_encoder = nn.Linear(config.encoder_dim, D, bias=False)
        self.patch_vectors = nn.Linear(config.global_dim, self.k * D, bias=False)
        self.gate_embedding = None
        if config.gate_ngrams:
            tables = (config.gate_ngrams, config.hash_rows, D)
            self.gate_embedding = HashEmbedding(*tables, dropout=config.ngram_dropout)
        # Cross-attention comes before every layer, or before the first one only.
        n_cross = config.decoder_layers if config.cross_attn_all_layers_decoder else 1
        self.cross_attentions = nn.ModuleList(
            DecoderCrossAttention(D, n_heads, config.norm_eps) for _ in range(n_cross)
        )
        self.blocks = nn.ModuleList(
            Block(D, n_heads, config.norm_eps, config.qk_norm, config.dropout, config.decoder_ffn_dim, config.relu2)
            for _ in range(config.decoder_layers)
        )
        self.norm = RMSNorm(D, config.norm_eps)

    def forward(self, bytes_BTD, latents_BPG, plan, read_N, gates_BTD=None, pasts=None):
        """Returns states [B, T, D], normalised for the head.

        bytes_BTD: the encoder's byte states. read_N: the patch that each byte reads, `PatchMap.read`.
        gates_BTD: the `HashEmbedding` of the ids' gate n-grams, or None.
        """
        patches_BPkD = self.patch_vectors(latents_BPG).unflatten(-1, (self.k, -1))
        x_BTD = self.dropout(self.from_encoder(bytes_BTD))
        for layer, block in enumerate(self.blocks):
            if layer < len(self.cross_attentions):
                x_BTD = self.cross_attentions[layer](x_BTD, patches_BPkD, read_N, gates_BTD)
            past = None if pasts is None else pasts[layer]
            x_BTD = run_block(block, x_BTD, plan, self.recompute, past)
        return self.norm(x_BTD)


class BLTModel(nn.Module):
    """The Byte Latent Transformer.

    A row of T + 1 ids gives T inputs, ids 0..T-1, and T targets, ids 1..T. Patch lengths cover all
    T + 1 ids, with zeros on the right; the first patch is one id long. The logits at t are for id
    t + 1, and use the newest patch that is complete before it (`PatchMap`). Classes 0..255 are bytes,
    256 is the document's end.
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
        """Logits [B, T, 257].

        ids_BT: int64, the inputs, in 0..256. patch_lengths_BP: int64, each row's sum T + 1.
        Raises ValueError for other shapes. It does not look at values, which would make the CPU wait for
        a GPU: `check_patch_lengths` does, where rows are made.
        """
        if ids_BT.dim() != 2 or patch_lengths_BP.dim() != 2 or ids_BT.shape[0] != patch_lengths_BP.shape[0]:
            found = f"{list(ids_BT.shape)} and {list(patch_lengths_BP.shape)}"
            raise ValueError(f"ids must be [B, T] and patch lengths [B, P], not {found}")
        config = self.config
        documents_BT = documents_of(ids_BT, BOUNDARY)
        patch_map = PatchMap(patch_lengths_BP, documents_BT)
        ngrams_BTD = None
        hash_embedding = self.encoder.hash_embedding
        if hash_embedding is not None:
            spans_BTS = None
            if config.patch_ngrams:
                spans_BTS = hash_spans(ids_BT, patch_map.starts_before(config.patch_ngrams))
            ngrams_BTD = hash_embedding.embed(hash_embedding, ids_BT, documents_BT, spans_BTS)
        gates_BTD = None
        gate_embedding = self.decoder.gate_embedding
        if gate_embedding is not None:
            gates_BTD = gate_embedding.embed(gate_embedding, ids_BT, documents_BT)

        # Bytes attend to bytes of their document within the window, patches to all patches of their
        # document before them.
        byte_plan = AttentionPlan(documents_BT, config.head_dim("encoder"), config.rope_theta, config.window)
        bytes_BTD, patches_BPkD = self.encoder(ids_BT, ngrams_BTD, byte_plan, patch_map)
        patch_plan = AttentionPlan(patch_map.documents_BP, config.head_dim("global"), config.rope_theta)
        latents_BPG = self.latent(patches_BPkD, patch_plan)
        # The decoder attends as the encoder does. It shares the plan if its heads are as wide, and so
        # its rotary angles are the same.
        if config.head_dim("decoder") != config.head_dim("encoder"):
            byte_plan = AttentionPlan(documents_BT, config.head_dim("decoder"), config.rope_theta, config.window)
        return self.logits(self.decoder(bytes_BTD, latents_BPG, byte_plan, patch_map.read, gates_BTD))

    def logits(self, states_BTD):
        """Logits [B, T, 257] of the decoder's states."""
        return logits_of(self.head, states_BTD, self.config.logit_softcap)

    def parameters_by_part(self):
        """{"hash embedding", "encoder", "latent", "decoder": number of parameters}, the whole in all.

        The encoder and the decoder are counted without their hash tables, the decoder with the head.
        """
        n_hash, n_gates = (
            0 if tables is None else _number_of_parameters(tables)
            for tables in (self.encoder.hash_embedding, self.decoder.gate_embedding)
        )
        return {
            "hash embedding": n_hash + n_gates,
            "encoder": _number_of_parameters(self.encoder) - n_hash,
            "latent": _number_of_parameters(self.latent),
            "decoder": _number_of_parameters(self.decoder) - n_gates + _number_of_parameters(self.head),
        }


def _number_of_parameters(module):
    """How many numbers the module's parameters hold."""
    return sum(p.numel() for p in module.parameters())


def uninitialized(config, device="cpu", dtype=torch.float32):
    """A `BLTModel` without initial weights, for weights that are about to be loaded.

    Load all of them: until then they are whatever was in memory. To draw weights at random first would
    take a minute for 4.6 billion parameters, and with bf16 twice their memory.
    """
    # On the meta device tensors have shapes and no memory.
    with torch.device("meta"):
        model = BLTModel(config)
    model = model.to(dtype).to_empty(device=device)
    # Buffers are not loaded, since state dicts do not have them: they must be made here.
    for name, _ in model.named_buffers():
        assert name.endswith("_embedding.first_row"), f"{name} would stay unset"
    for tables in (model.encoder.hash_embedding, model.decoder.gate_embedding):
        if tables is not None:
            tables.number_rows()
    return model
