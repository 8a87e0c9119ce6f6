"""FLOPs: what a model's mathematics costs per byte, by part, and what a device can do in a second.

    blt_flops(config, bytes_per_patch, row_bytes)                     forward FLOPs per byte of a BLT, by part
    transformer_flops(dim, n_layers, n_classes, row_bytes, window)    the same of the entropy model or a flat byte transformer
    peak_flops(device, precision)                                     FLOP/s by data sheet, or else measured

Pure functions; only `measured_peak` computes on a device. bench.py divides the two: MFU, model FLOPs utilisation.

What counts: matrix products, 2 FLOPs a multiply-add, of real bytes and patches. Lookups (byte and n-gram embeddings) are 0 FLOPs,
as in the paper; norms, rotary embedding, softmax, activations and pooling are left out (there too). Attention counts the places that
the mathematics needs, not those that a blocked mask computes and throws away; padding counts nothing. Training is 3 times the
forward pass: a backward pass has two products for each of the forward's.
"""

import re
import time

import torch

from blt.device import synchronize
from blt.layers import feed_forward_width

TRAINING = 3  # a training step's FLOPs by those of its forward pass (paper, section 4.5: a backward pass costs two forward passes)


def block_flops(dim, ffn_dim=None):
    """FLOPs per position of one `layers.Block` without scores and values: 4 projections and the 3 matrices of the SwiGLU."""
    return 2.0 * (4 * dim * dim + 3 * dim * (ffn_dim or feed_forward_width(dim)))


def attention_flops(dim, places):
    """FLOPs per query of scores and of values over so many places: 2 * 2 * dim * places."""
    return 4.0 * dim * places


def mean_places(length, window=None):
    """Places that a position of a row of `length` attends to on average, itself included: the mean of min(t + 1, window).

    Without a window (length + 1) / 2. Example: length 4, window 2 gives (1 + 2 + 2 + 2) / 4. A fractional length is fine.
    """
    if window is None or length <= window:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def blt_flops(config, bytes_per_patch, row_bytes):
    """Forward FLOPs per byte of a BLT by part: {part: FLOPs}; the parts sum to the whole. Training: TRAINING times as many.

    config: `BLTConfig`. bytes_per_patch: mean, s. row_bytes: bytes in a row, T; a row has P = T / s patches. With block(d) as
    `block_flops` and n = mean_places(T, window), for encoder width D, decoder width D', latent width G, k vectors a patch:

        embeddings                0: lookups
        encoder                   encoder_layers * block(D)
        encoder attention         encoder_layers * 4 D n
        encoder cross-attention   2 D kD / s (the patch's query from its pooled bytes), and for each of its layers
                                  4 D^2 (keys and values of bytes) + 4 k D^2 / s (queries and output of patches) + 4 k D
        latent transformer        (2 kD G, if kD is not G + global_layers * block(G)) / s
        latent attention          global_layers * 4 G (P + 1) / 2 / s
        decoder                   2 D D', if they differ, + decoder_layers * block(D')
        decoder attention         decoder_layers * 4 D' n
        decoder cross-attention   2 G kD' / s, and for each of its layers 4 D'^2 + 4 k D'^2 / s + 4 k D'
        head                      2 D' * 257

    This is the paper's equation in section 4.5, FLOPs per byte = latent / s + encoder + decoder + both cross-attentions, with its
    appendix's terms for projections and attention. Differences: the feed-forward is the SwiGLU that is computed (three matrices of
    `feed_forward_width`), not two of width 4 d; a window costs the mean of min(t + 1, window) places, where the paper halves it to
    (window + 1) / 2; it also halves the cross-attentions' scores, though no query of theirs has keys it may not see; the projections
    between the widths and the query's, which the paper leaves out, are counted; the head has 257 classes.
    """
    c, s, P = config, bytes_per_patch, row_bytes / bytes_per_patch
    D, D2, G, k = c.encoder_dim, c.decoder_dim, c.global_dim, c.cross_attn_k
    n = mean_places(row_bytes, c.window)
    n_encoder_cross = c.encoder_layers if c.cross_attn_all_layers_encoder else 1
    n_decoder_cross = c.decoder_layers if c.cross_attn_all_layers_decoder else 1

    def cross_attention(
        d,
    ):  # bytes on one side, k vectors a patch on the other: each byte meets the k vectors of one patch
        return 4.0 * d * d + 4.0 * k * d * d / s + attention_flops(d, k)

    return {
        "embeddings": 0.0,
        "encoder": c.encoder_layers * block_flops(D, c.encoder_ffn_dim),
        "encoder attention": c.encoder_layers * attention_flops(D, n),
        "encoder cross-attention": 2.0 * k * D * D / s + n_encoder_cross * cross_attention(D),
        "latent transformer": (
            (2.0 * k * D * G if k * D != G else 0.0) + c.global_layers * block_flops(G, c.global_ffn_dim)
        )
        / s,
        "latent attention": c.global_layers * attention_flops(G, mean_places(P)) / s,
        "decoder": (2.0 * D * D2 if D != D2 else 0.0) + c.decoder_layers * block_flops(D2, c.decoder_ffn_dim),
        "decoder attention": c.decoder_layers * attention_flops(D2, n),
        "decoder cross-attention": 2.0 * k * G * D2 / s + n_decoder_cross * cross_attention(D2),
        "head": 2.0 * D2 * 257,
    }


def transformer_flops(dim, n_layers, n_classes, row_bytes, window=None):
    """Forward FLOPs per position of a plain transformer of `layers.Block`s, by part: entropy model, flat byte transformer.

    The entropy model: transformer_flops(c.d_model, c.n_layers, c.vocab_size, document_bytes, c.max_seq_len).
    """
    return {
        "embeddings": 0.0,
        "layers": n_layers * block_flops(dim),
        "attention": n_layers * attention_flops(dim, mean_places(row_bytes, window)),
        "head": 2.0 * dim * n_classes,
    }


def flat_shape_of_equal_flops(flops_per_byte, row_bytes, window, n_classes=257):
    """(dim, n_layers) of the flat byte transformer whose forward FLOPs per byte are the nearest to these.

    Among widths that are multiples of 64 (of 16 below 256) and usual shapes, 32 to 128 channels of width a layer; where these
    miss by more than 5% (very small models), among all shapes of up to 64 layers.
    """
    if flops_per_byte <= 0:
        raise ValueError(f"flops_per_byte is {flops_per_byte}; it must be above 0")

    def miss(shape):
        return abs(sum(transformer_flops(*shape, n_classes, row_bytes, window).values()) / flops_per_byte - 1)

    shapes = [(dim, layers) for dim in [*range(16, 256, 16), *range(256, 8193, 64)] for layers in range(1, 65)]
    usual = min((shape for shape in shapes if 32 <= shape[0] / shape[1] <= 128), key=miss)
    return usual if miss(usual) <= 0.05 else min(shapes, key=miss)


# Dense peaks in FLOP/s by the vendor's data sheet (tensor cores without sparsity; GeForce: with fp32 accumulation), for the names
# that torch.cuda.get_device_name gives. A name must match whole: laptop, D, NVL and MIG variants are slower and get measured.
# fp32 is that of the plain cores, tf32 what fp32 products run at where torch may use it.
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
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def listed_peak(name, precision):
    """(FLOP/s, source) of a card in PEAK_FLOPS, by its name and the precision; None where the table has no such entry."""
    for pattern, (source, peaks) in PEAK_FLOPS.items():
        if re.fullmatch(pattern, name) and precision in peaks:
            return peaks[precision], source
    return None


def peak_flops(device, precision):
    """(FLOP/s, where the number is from): the data sheet's dense peak of a listed card, else `measured_peak`.

    precision: bf16, fp16 or fp32 (on CUDA the tf32 peak where torch.backends.cuda.matmul.allow_tf32 is on).
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        has_tf32 = torch.backends.cuda.matmul.allow_tf32 and torch.cuda.get_device_capability(device) >= (8, 0)
        listed = listed_peak(name, "tf32" if precision == "fp32" and has_tf32 else precision)
        if listed is not None:
            return listed
    return measured_peak(device, precision), "the fastest matrix product measured here"


def measured_peak(device, precision, shapes=None, seconds=0.3):
    """FLOP/s of the fastest of several matrix products, square and rectangular, on this device: a stand-in for a data sheet.

    Each shape (rows, inner, columns) runs once to warm up, then again and again for `seconds`; its best single run counts. So a
    busy machine cannot make the peak look low, and an MFU against it look high, as long as one run is left alone.
    """
    small = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024), (8192, 512, 2048)]
    large = [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096), (16384, 2048, 8192)]
    best = 0.0
    for rows, inner, columns in shapes or (large if device.type == "cuda" else small):
        a = torch.randn(rows, inner, device=device, dtype=DTYPES[precision])
        b = torch.randn(columns, inner, device=device, dtype=DTYPES[precision]).T  # as in nn.Linear
        out = a @ b
        synchronize(device)
        begin = tick = time.perf_counter()
        while tick - begin < seconds:
            torch.mm(a, b, out=out)
            synchronize(device)
            tock = time.perf_counter()
            best, tick = max(best, 2.0 * rows * inner * columns / (tock - tick)), tock
    return best
