"""FLOPs: what a model's mathematics costs per byte, by part, and what a device can do in a second.

    blt_flops(config, bytes_per_patch, row_bytes)    forward FLOPs per byte of a BLT
    transformer_flops(dim, n_layers, ...)            of the entropy model or a flat byte transformer
    training_memory(...), update_traffic(...)        what several processes hold and tell each other
    peak_flops(device, precision)                    FLOP/s by data sheet, or else measured

Only `measured_peak` computes on a device; the rest is arithmetic. bench.py divides the two: MFU, the
model FLOPs utilisation.

What counts: matrix products, at 2 FLOPs per multiply-add, of real bytes and patches. Embedding
lookups (bytes and n-grams) are 0 FLOPs, as in the paper. Norms, rotary embedding, softmax,
activations and pooling are left out, also as in the paper. Attention counts what causal masks and
windows leave, not what a blocked mask computes and discards. It ends with each document: give the
lengths of the documents' parts in rows (`TrainingRows.document_parts`) as row_bytes. One number means
rows of one document each. Padding counts 0. Training is 3 times the forward pass: for each product of
the forward pass, the backward pass has two.
"""

import re
import time

import numpy as np
import torch

from blt.device import synchronize
from blt.layers import feed_forward_width

# FLOPs of a training step over those of its forward pass (paper, section 4.5: the backward pass costs
# two forward passes).
TRAINING = 3


def block_flops(dim, ffn_dim=None):
    """FLOPs per position of one `layers.Block` without its attention scores and values.

    These are the 4 projections of the attention and the 3 matrices of the SwiGLU. A squared ReLU has 2 of
    one and a half times the width: as many.
    """
    ffn_dim = feed_forward_width(dim) if ffn_dim is None else ffn_dim
    return 2.0 * (4 * dim * dim + 3 * dim * ffn_dim)


def attention_flops(dim, positions):
    """FLOPs per query of scores and values over this many positions: 2 * 2 * dim * positions."""
    return 4.0 * dim * positions


def mean_positions(lengths, window=None):
    """Positions that one position attends to, itself included, averaged over all positions.

    lengths: of a row, or of several (an array), each with attention of its own. Position t of a row
    attends to min(t + 1, window). Length 4 and window 2 give (1 + 2 + 2 + 2) / 4; without a window a
    row's mean is (length + 1) / 2. Lengths need not be whole: they can be mean numbers of patches.
    """
    lengths = np.atleast_1d(np.asarray(lengths, dtype=np.float64))
    within = lengths if window is None else np.minimum(lengths, window)
    # The first `window` positions see 1, 2, ..., window positions; each later one sees a full window.
    pairs = within * (within + 1) / 2 + (lengths - within) * within
    return float(pairs.sum() / lengths.sum())


def blt_flops(config, bytes_per_patch, row_bytes):
    """Forward FLOPs per byte of a BLT: {part: FLOPs}. The parts add up to the whole.

    config: `BLTConfig`. bytes_per_patch: mean patch size s. row_bytes: bytes in a row, T, or in each of
    many; a row has P = T / s patches. A training step costs TRAINING times this.

    With block(d) = block_flops(d), n = mean_positions(T, window), m = mean_positions(P), encoder width
    D, decoder width D', latent width G and k vectors a patch:

        embeddings                0: lookups
        encoder                   encoder_layers * block(D)
        encoder attention         encoder_layers * 4 D n
        encoder cross-attention   2 D kD / s                  first query of a patch, from its bytes
                                  and for each of its layers:
                                    4 D^2                     keys and values of bytes
                                    4 k D^2 / s               queries and outputs of patches
                                    4 k D                     scores and values
        latent transformer        2 kD G / s                  input projection, if kD is not G
                                  global_layers * block(G) / s
        latent attention          global_layers * 4 G m / s
        decoder                   2 D D'                      input projection, if D' is not D
                                  decoder_layers * block(D')
        decoder attention         decoder_layers * 4 D' n
        decoder cross-attention   2 G kD' / s                 patch vectors from latent outputs
                                  and for each of its layers 4 D'^2 + 4 k D'^2 / s + 4 k D'
        head                      2 D' * 257

    This is the equation of the paper's section 4.5 (FLOPs per byte = latent / s + encoder + decoder +
    both cross-attentions), with the terms of its appendix for projections and attention. Differences:

    - The feed-forward is the SwiGLU that is computed, three matrices of `feed_forward_width`; the
      paper counts two of width 4 d.
    - A window costs the mean of min(t + 1, window) positions; the paper takes (window + 1) / 2.
    - The scores of the cross-attentions count in full; the paper halves them, though none of their
      queries has a key that it may not see.
    - The projections between the widths and the one of the first query count; the paper leaves them out.
    - The head has 257 classes.
    """
    D = config.encoder_dim
    D_decoder = config.decoder_dim
    G = config.global_dim
    k = config.cross_attn_k
    s = bytes_per_patch
    P = np.asarray(row_bytes) / bytes_per_patch

    # One block each, without attention scores and values.
    encoder_block = block_flops(D, config.encoder_ffn_dim)
    latent_block = block_flops(G, config.global_ffn_dim)
    decoder_block = block_flops(D_decoder, config.decoder_ffn_dim)
    # A projection exists only where the widths differ.
    latent_projection = 2.0 * k * D * G if k * D != G else 0.0
    decoder_projection = 2.0 * D * D_decoder if D != D_decoder else 0.0
    n_encoder_cross = config.encoder_layers if config.cross_attn_all_layers_encoder else 1
    n_decoder_cross = config.decoder_layers if config.cross_attn_all_layers_decoder else 1
    byte_positions = mean_positions(row_bytes, config.window)
    patch_positions = mean_positions(P)

    return {
        "embeddings": 0.0,
        "encoder": config.encoder_layers * encoder_block,
        "encoder attention": config.encoder_layers * attention_flops(D, byte_positions),
        "encoder cross-attention": 2.0 * k * D * D / s + n_encoder_cross * _cross_attention_flops(D, k, s),
        "latent transformer": (latent_projection + config.global_layers * latent_block) / s,
        "latent attention": config.global_layers * attention_flops(G, patch_positions) / s,
        "decoder": decoder_projection + config.decoder_layers * decoder_block,
        "decoder attention": config.decoder_layers * attention_flops(D_decoder, byte_positions),
        "decoder cross-attention": (
            2.0 * k * G * D_decoder / s + n_decoder_cross * _cross_attention_flops(D_decoder, k, s)
        ),
        "head": 2.0 * D_decoder * 257,
    }


def _cross_attention_flops(dim, k, bytes_per_patch):
    """FLOPs per byte of one cross-attention between bytes and the k vectors of each patch."""
    of_bytes = 4.0 * dim * dim
    of_patches = 4.0 * k * dim * dim / bytes_per_patch
    # Whichever side asks, each byte meets the k vectors of exactly one patch.
    return of_bytes + of_patches + attention_flops(dim, k)


def transformer_flops(dim, n_layers, n_classes, row_bytes, window=None):
    """Forward FLOPs per position of a plain transformer of `layers.Block`s: {part: FLOPs}.

    For the entropy model and the flat byte transformer. With c an `EntropyConfig`, the entropy
    model has transformer_flops(c.d_model, c.n_layers, c.vocab_size, document_bytes, c.max_seq_len).
    """
    positions = mean_positions(row_bytes, window)
    return {
        "embeddings": 0.0,
        "layers": n_layers * block_flops(dim),
        "attention": n_layers * attention_flops(dim, positions),
        "head": 2.0 * dim * n_classes,
    }


def flat_shape_of_equal_flops(flops_per_byte, row_bytes, window, n_classes=257):
    """(dim, n_layers) of the flat byte transformer whose forward FLOPs per byte are nearest to these.

    Widths are multiples of 64 (below 256: of 16). Usual shapes have 32 to 128 channels of width per
    layer. If the nearest of them is off by more than 5%, which happens for very small models, all
    shapes of up to 64 layers are candidates. Raises ValueError unless flops_per_byte is above 0.
    """
    if flops_per_byte <= 0:
        raise ValueError(f"flops_per_byte is {flops_per_byte}; it must be above 0")

    def relative_error(shape):
        dim, n_layers = shape
        parts = transformer_flops(dim, n_layers, n_classes, row_bytes, window)
        return abs(sum(parts.values()) / flops_per_byte - 1)

    widths = [*range(16, 256, 16), *range(256, 8193, 64)]
    shapes = [(dim, n_layers) for dim in widths for n_layers in range(1, 65)]
    # A model of usual shape is the fairer comparison; among all shapes some are thin and very deep.
    usual_shapes = [shape for shape in shapes if 32 <= shape[0] / shape[1] <= 128]
    nearest_usual = min(usual_shapes, key=relative_error)
    if relative_error(nearest_usual) <= 0.05:
        return nearest_usual
    return min(shapes, key=relative_error)


# Several processes (docs/scale.md)


def training_memory(matrices, tables, n_shards=1):
    """Bytes that a process holds of a model in training, activations apart: weights, gradients, optimizer states.

    matrices: numbers in them: 4 bytes each for the weight, its gradient and Muon's momentum. tables: numbers in hash
    tables, which have no momentum. Embeddings and norms are few and count as matrices.
    n_shards: processes that share the model out (`sharding`); 1: each holds the whole.
    """
    return (12 * matrices + 8 * tables) / n_shards


def update_traffic(matrices, tables, n, is_sharded=False, passes=1):
    """Bytes that one of n processes sends in an update; it receives as many. Numbers are fp32.

    Whole models: an all-reduce of all gradients, and a gather of Muon's updates in bf16. Sharded ones: in each pass
    two gathers of all weights and a reduce-scatter of all gradients; in each update a gather of what Muon makes
    orthogonal, and one of its updates.
    """
    weights = 4 * (matrices + tables)
    sent = passes * 3 * weights + 4 * matrices if is_sharded else 2 * weights
    return (sent + 2 * matrices) * (n - 1) / n


# Dense peaks in FLOP/s by the vendor's data sheet: tensor cores without sparsity; on GeForce cards
# with fp32 accumulation. The keys are patterns of names as torch.cuda.get_device_name gives them. A
# pattern must match the whole name: laptop, D, NVL and MIG variants are slower, and are measured
# instead. fp32 is the peak of the plain cores; tf32 is what fp32 products reach where torch may use
# TF32.
PEAK_FLOPS = {
    r"Tesla T4": ("NVIDIA T4 data sheet", {"fp16": 65e12, "fp32": 8.1e12}),
    r"NVIDIA A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": (
        "NVIDIA A100 data sheet",
        {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    ),
    r"NVIDIA GeForce RTX 4090": (
        "NVIDIA Ada architecture paper",
        {"bf16": 165.2e12, "fp16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
    ),
    r"NVIDIA GeForce RTX 5090": (
        "NVIDIA RTX Blackwell architecture paper",
        {"bf16": 209.5e12, "fp16": 209.5e12, "tf32": 104.8e12, "fp32": 104.8e12},
    ),
    r"NVIDIA H100 80GB HBM3": (
        "NVIDIA Hopper architecture paper",
        {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    ),
    r"NVIDIA H100 PCIe": (
        "NVIDIA Hopper architecture paper",
        {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51.2e12},
    ),
    r"NVIDIA H200": (
        "NVIDIA Hopper architecture paper, of which the H200 has the same cores",
        {"bf16": 989.4e12, "fp16": 989.4e12, "tf32": 494.7e12, "fp32": 66.9e12},
    ),
    r"NVIDIA B200": ("NVIDIA HGX B200 data sheet", {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1100e12}),
}
# Products to measure, as (rows, inner, columns). A GPU is full only with large ones; on a CPU those
# would take seconds each.
SMALL_PRODUCTS = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (8192, 512, 2048)]
LARGE_PRODUCTS = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096), (16384, 2048, 8192)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def listed_peak(name, precision):
    """(FLOP/s, source) of a card in PEAK_FLOPS at a precision; None if the table has no such entry."""
    # A card may lack a precision: a T4 multiplies no bf16.
    for pattern, (source, peaks) in PEAK_FLOPS.items():
        if re.fullmatch(pattern, name) and precision in peaks:
            return peaks[precision], source
    return None


def peak_flops(device, precision):
    """Peak of a device as (FLOP/s, source): the data sheet's for a listed card, else `measured_peak`.

    precision: bf16, fp16 or fp32. With torch.backends.cuda.matmul.allow_tf32, fp32 means the tf32
    peak.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # TF32 needs Ampere (8.0) or later; older cards ignore the switch.
        is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        uses_tf32 = precision == "fp32" and is_ampere and torch.backends.cuda.matmul.allow_tf32
        listed = listed_peak(name, "tf32" if uses_tf32 else precision)
        if listed is not None:
            return listed
    return measured_peak(device, precision), "the fastest matrix product measured here"


def measured_peak(device, precision, shapes=None, seconds=0.3):
    """FLOP/s of the fastest of several matrix products on this device: a stand-in for a data sheet.

    shapes: (rows, inner, columns) of the products; None takes the list for this kind of device.
    Each product runs once to warm up, then repeatedly for `seconds`; the best single run counts.
    So a busy machine does not lower the peak, which would raise the MFU, as long as one run is
    undisturbed.
    """
    if shapes is None:
        shapes = LARGE_PRODUCTS if device.type == "cuda" else SMALL_PRODUCTS
    best = 0.0
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device, dtype=DTYPES[precision])
        # Transposed, as nn.Linear keeps its weight.
        b = torch.randn(columns, inner, device=device, dtype=DTYPES[precision]).T
        out = a @ b
        synchronize(device)
        flops = 2.0 * rows * inner * columns
        begin = time.perf_counter()
        tick = begin
        while tick - begin < seconds:
            torch.mm(a, b, out=out)
            synchronize(device)
            tock = time.perf_counter()
            best = max(best, flops / (tock - tick))
            tick = tock
    return best
