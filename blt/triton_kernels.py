"""Pooling and both cross-attentions as Triton kernels, for CUDA.

    MaxOrMean             the maximum or mean of each patch's bytes
    AttentionToBytes      encoder cross-attention: the k queries of a patch attend to the patch's bytes
    AttentionToPatches    decoder cross-attention: a byte attends to the k vectors of one patch

They compute what `kernels.SegmentAttention` and `kernels.GatherAttention` compute, where the formulas are, and what
`segments.Segments` pools. The bytes of a patch are consecutive, so a kernel gives each patch (and head) to one program,
which goes along the bytes. Each number is written by one program: there is no atomic addition, so equal inputs
give equal outputs to the last bit. Sums are in fp32. Inputs are read once (by the backward pass of the
maximum, twice) and outputs written once; nothing else of the length of the text goes through memory.

With TRITON_INTERPRET=1 in the environment the kernels run on a CPU, slowly, which is how tests compare them.

Axes: N all bytes of the batch, M all patches of the batch, k vectors of a patch, H heads, K channels of a head. Tiles
have powers of 2 as sizes; a k or K that is no power of 2 is padded with zeros.

begins: int32 [M + 1], the first byte of each patch, and N.
first: int32 [M], the first byte that is pooled into the patch: those before it, of an older document, are left out.
"""

import torch
import triton
import triton.language as tl

# Most patches are shorter than this many bytes, which a program reads at once.
BYTES_AT_ONCE = 8
# A warp holds this many numbers of a tile [bytes, k, K]: 64 in each of its 32 threads, as registers allow.
NUMBERS_OF_A_WARP = 2048


def sizes_of(k, H, K):
    """The constants of an attention's kernels: sizes, scale, tiles, and the warps of a program."""
    k_filled = triton.next_power_of_2(k)
    K_filled = triton.next_power_of_2(K)
    # Two warps at most, unless two bytes alone need more.
    n_bytes = max(2, min(BYTES_AT_ONCE, 2 * NUMBERS_OF_A_WARP // (k_filled * K_filled)))
    warps = max(1, min(8, n_bytes * k_filled * K_filled // NUMBERS_OF_A_WARP))
    # The scale too: up to torch 2.11 a compiled model passes other Python numbers as fp64.
    sizes = dict(k=k, H=H, K=K, scale=K**-0.5)
    return dict(**sizes, BYTES=n_bytes, k_FILLED=k_filled, K_FILLED=K_filled, num_warps=warps)


def as_rows(x):
    """x [N, ...] as [N, D] with neighbouring channels, copied only where they are not neighbours."""
    rows = x.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


# ---------------------------------------------------------------------- pooling


def pooling_launch(M, D):
    """(channels of a program, grid): one program for each patch and each group of channels."""
    width = min(triton.next_power_of_2(D), 512)
    return width, (M, triton.cdiv(D, width))


class MaxOrMean(torch.autograd.Function):
    """The maximum or mean of each patch's bytes, x_ND -> [M, D]; 0 for a patch without bytes.

    Bytes that share a maximum share its gradient equally, as in torch. A NaN is left out of a maximum,
    unlike in torch; it still reaches the loss through the byte's own state.
    """

    @staticmethod
    def forward(ctx, x_ND, begins, first, is_max):
        x_ND = x_ND.contiguous()
        D = x_ND.shape[1]
        out_MD = x_ND.new_empty(first.shape[0], D)
        width, grid = pooling_launch(first.shape[0], D)
        _pool[grid](x_ND, out_MD, begins, first, D, IS_MAX=is_max, BYTES=BYTES_AT_ONCE, WIDTH=width, num_warps=2)
        ctx.save_for_backward(x_ND, out_MD, begins, first)
        ctx.is_max = is_max
        return out_MD

    @staticmethod
    def backward(ctx, d_out_MD):
        x_ND, out_MD, begins, first = ctx.saved_tensors
        D = x_ND.shape[1]
        d_x_ND = torch.empty_like(x_ND)
        width, grid = pooling_launch(first.shape[0], D)
        tensors = (x_ND, out_MD, d_out_MD.contiguous(), d_x_ND, begins, first)
        _pool_backward[grid](*tensors, D, IS_MAX=ctx.is_max, BYTES=BYTES_AT_ONCE, WIDTH=width, num_warps=2)
        return d_x_ND, None, None, None


@triton.jit
def _pool(x, out, begins, first, D, IS_MAX: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr):
    """x [N, D] -> out [M, D]: WIDTH channels of one patch."""
    m = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first_pooled = tl.load(first + m)
    end = tl.load(begins + m + 1)
    empty = float("-inf") if IS_MAX else 0.0
    pooled = tl.full((WIDTH,), empty, tl.float32)
    for start in range(first_pooled, end, BYTES):
        n = start + tl.arange(0, BYTES)
        is_inside = (n < end)[:, None] & (channel < D)[None, :]
        tile = tl.load(x + n.to(tl.int64)[:, None] * D + channel[None, :], is_inside, other=empty).to(tl.float32)
        if IS_MAX:
            pooled = tl.maximum(pooled, tl.max(tile, 0))
        else:
            pooled += tl.sum(tile, 0)
    if not IS_MAX:
        pooled = pooled / tl.maximum(end - first_pooled, 1)
    # A patch without bytes.
    pooled = tl.where(first_pooled < end, pooled, 0.0)
    tl.store(out + m * D + channel, pooled.to(out.dtype.element_ty), channel < D)


@triton.jit
def _pool_backward(
    x, out, d_out, d_x, begins, first, D, IS_MAX: tl.constexpr, BYTES: tl.constexpr, WIDTH: tl.constexpr
):
    """d_x [N, D], for WIDTH channels of one patch's bytes; 0 for its left-out ones."""
    m = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin = tl.load(begins + m)
    first_pooled = tl.load(first + m)
    end = tl.load(begins + m + 1)
    pooled = tl.load(out + m * D + channel, channel < D, other=0.0).to(tl.float32)
    share = tl.load(d_out + m * D + channel, channel < D, other=0.0).to(tl.float32)
    if IS_MAX:
        # How many bytes have the maximum of each channel.
        sharers = tl.zeros((WIDTH,), tl.float32)
        for start in range(first_pooled, end, BYTES):
            n = start + tl.arange(0, BYTES)
            is_inside = (n < end)[:, None] & (channel < D)[None, :]
            tile = tl.load(x + n.to(tl.int64)[:, None] * D + channel[None, :], is_inside, other=0.0).to(tl.float32)
            sharers += tl.sum(((tile == pooled[None, :]) & is_inside).to(tl.float32), 0)
        share = share / tl.maximum(sharers, 1.0)
    else:
        share = share / tl.maximum(end - first_pooled, 1)
    # From the left-out bytes on, whose gradient is 0: every byte is in one patch, so all of d_x is written.
    for start in range(begin, end, BYTES):
        n = start + tl.arange(0, BYTES)
        is_inside = (n < end)[:, None] & (channel < D)[None, :]
        offsets = n.to(tl.int64)[:, None] * D + channel[None, :]
        has_share = (n >= first_pooled)[:, None] & is_inside
        if IS_MAX:
            tile = tl.load(x + offsets, is_inside, other=0.0).to(tl.float32)
            has_share = has_share & (tile == pooled[None, :])
        d_tile = tl.where(has_share, share[None, :], 0.0)
        tl.store(d_x + offsets, d_tile.to(d_x.dtype.element_ty), is_inside)


# ---------------------------------------------------------------------- encoder cross-attention


class AttentionToBytes(torch.autograd.Function):
    """What `kernels.SegmentAttention` computes: q_MkHK of patches, key_NHK and value_NHK of bytes -> [M, k, H, K].

    Keeps the logarithm of each softmax's sum, fp32 [M, k, H], and computes the weights again.
    """

    @staticmethod
    def forward(ctx, q_MkHK, key_NHK, value_NHK, begins, first):
        M, k, H, K = q_MkHK.shape
        q_MkHK = q_MkHK.contiguous()
        key_ND = as_rows(key_NHK)
        value_ND = as_rows(value_NHK)
        out_MkHK = torch.empty_like(q_MkHK, dtype=value_NHK.dtype)
        log_sum_MkH = q_MkHK.new_empty(M, k, H, dtype=torch.float32)
        tensors = (q_MkHK, key_ND, value_ND, out_MkHK, log_sum_MkH, begins, first)
        strides = (key_ND.stride(0), value_ND.stride(0))
        _attend_to_bytes[(M, H)](*tensors, *strides, **sizes_of(k, H, K))
        ctx.save_for_backward(*tensors)
        return out_MkHK

    @staticmethod
    def backward(ctx, d_out_MkHK):
        q_MkHK, key_ND, value_ND, out_MkHK, log_sum_MkH, begins, first = ctx.saved_tensors
        M, k, H, K = q_MkHK.shape
        d_q_MkHK = torch.empty_like(q_MkHK)
        d_key_NHK = key_ND.new_empty(key_ND.shape[0], H, K)
        d_value_NHK = value_ND.new_empty(key_ND.shape[0], H, K)
        given = (q_MkHK, key_ND, value_ND, out_MkHK, log_sum_MkH, d_out_MkHK.contiguous())
        wanted = (d_q_MkHK, d_key_NHK, d_value_NHK)
        strides = (key_ND.stride(0), value_ND.stride(0))
        _attend_to_bytes_backward[(M, H)](*given, *wanted, begins, first, *strides, **sizes_of(k, H, K))
        return d_q_MkHK, d_key_NHK, d_value_NHK, None, None


@triton.jit
def _attend_to_bytes(
    q, key, value, out, log_sum, begins, first, key_stride, value_stride,
    k: tl.constexpr, H: tl.constexpr, K: tl.constexpr, scale: tl.constexpr,
    BYTES: tl.constexpr, k_FILLED: tl.constexpr, K_FILLED: tl.constexpr,
):  # fmt: skip
    """The k queries of one patch and head. The softmax is rescaled as its highest score rises."""
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    i = tl.arange(0, k_FILLED)
    channel = tl.arange(0, K_FILLED)
    first_pooled = tl.load(first + m)
    end = tl.load(begins + m + 1)
    vector_offsets = ((m * k + i) * H + h)[:, None] * K + channel[None, :]
    is_vector = (i < k)[:, None] & (channel < K)[None, :]
    q_tile = tl.load(q + vector_offsets, is_vector, other=0.0).to(tl.float32) * scale
    highest = tl.full((k_FILLED,), float("-inf"), tl.float32)
    total = tl.zeros((k_FILLED,), tl.float32)
    attended = tl.zeros((k_FILLED, K_FILLED), tl.float32)
    for start in range(first_pooled, end, BYTES):
        n = start + tl.arange(0, BYTES)
        is_inside = (n < end)[:, None] & (channel < K)[None, :]
        row = n.to(tl.int64)[:, None]
        columns = h * K + channel[None, :]
        key_tile = tl.load(key + row * key_stride + columns, is_inside, other=0.0).to(tl.float32)
        value_tile = tl.load(value + row * value_stride + columns, is_inside, other=0.0).to(tl.float32)
        scores = tl.sum(q_tile[None, :, :] * key_tile[:, None, :], 2)
        scores = tl.where((n < end)[:, None], scores, float("-inf"))
        # What was added up under a lower score shrinks.
        now_highest = tl.maximum(highest, tl.max(scores, 0))
        weights = tl.exp(scores - now_highest[None, :])
        shrink = tl.exp(highest - now_highest)
        total = total * shrink + tl.sum(weights, 0)
        attended = attended * shrink[:, None] + tl.sum(weights[:, :, None] * value_tile[:, None, :], 0)
        highest = now_highest
    # A patch without bytes has no weights, and is attended to by nothing.
    has_bytes = first_pooled < end
    total = tl.where(has_bytes, total, 1.0)
    highest = tl.where(has_bytes, highest, 0.0)
    tl.store(out + vector_offsets, (attended / total[:, None]).to(out.dtype.element_ty), is_vector)
    tl.store(log_sum + (m * k + i) * H + h, highest + tl.log(total), i < k)


@triton.jit
def _attend_to_bytes_backward(
    q, key, value, out, log_sum, d_out, d_q, d_key, d_value, begins, first, key_stride, value_stride,
    k: tl.constexpr, H: tl.constexpr, K: tl.constexpr, scale: tl.constexpr,
    BYTES: tl.constexpr, k_FILLED: tl.constexpr, K_FILLED: tl.constexpr,
):  # fmt: skip
    """The gradients of one patch and head: of its queries, and of its bytes' keys and values."""
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    i = tl.arange(0, k_FILLED)
    channel = tl.arange(0, K_FILLED)
    begin = tl.load(begins + m)
    first_pooled = tl.load(first + m)
    end = tl.load(begins + m + 1)
    vector_offsets = ((m * k + i) * H + h)[:, None] * K + channel[None, :]
    is_vector = (i < k)[:, None] & (channel < K)[None, :]
    q_tile = tl.load(q + vector_offsets, is_vector, other=0.0).to(tl.float32) * scale
    d_out_tile = tl.load(d_out + vector_offsets, is_vector, other=0.0).to(tl.float32)
    # The sum over keys of weight * d_weight in the softmax's backward pass is out . d_out.
    mean = tl.sum(tl.load(out + vector_offsets, is_vector, other=0.0).to(tl.float32) * d_out_tile, 1)
    log_total = tl.load(log_sum + (m * k + i) * H + h, i < k, other=0.0)
    d_q_tile = tl.zeros((k_FILLED, K_FILLED), tl.float32)
    for start in range(begin, end, BYTES):
        n = start + tl.arange(0, BYTES)
        is_inside = (n < end)[:, None] & (channel < K)[None, :]
        is_pooled = (n >= first_pooled) & (n < end)
        row = n.to(tl.int64)[:, None]
        columns = h * K + channel[None, :]
        key_tile = tl.load(key + row * key_stride + columns, is_inside, other=0.0).to(tl.float32)
        value_tile = tl.load(value + row * value_stride + columns, is_inside, other=0.0).to(tl.float32)
        scores = tl.sum(q_tile[None, :, :] * key_tile[:, None, :], 2)
        # Left-out bytes have the weight 0, and with it no gradient.
        scores = tl.where(is_pooled[:, None] & (i < k)[None, :], scores, float("-inf"))
        weights = tl.exp(scores - log_total[None, :])
        d_weights = tl.sum(d_out_tile[None, :, :] * value_tile[:, None, :], 2)
        d_scores = weights * (d_weights - mean[None, :])
        # q_tile holds the scale already.
        d_key_tile = tl.sum(d_scores[:, :, None] * q_tile[None, :, :], 1)
        d_value_tile = tl.sum(weights[:, :, None] * d_out_tile[None, :, :], 1)
        d_q_tile += tl.sum(d_scores[:, :, None] * key_tile[:, None, :], 0)
        offsets = row * (H * K) + columns
        tl.store(d_key + offsets, d_key_tile.to(d_key.dtype.element_ty), is_inside)
        tl.store(d_value + offsets, d_value_tile.to(d_value.dtype.element_ty), is_inside)
    tl.store(d_q + vector_offsets, (d_q_tile * scale).to(d_q.dtype.element_ty), is_vector)


# ---------------------------------------------------------------------- decoder cross-attention


class AttentionToPatches(torch.autograd.Function):
    """What `kernels.GatherAttention` computes: q_NHK of the bytes, key_MkHK and value_MkHK of the patches -> [N, H, K].

    begins: the first byte that reads each patch, and N: the bytes that read a patch are consecutive too.
    Keeps its inputs alone.
    """

    @staticmethod
    def forward(ctx, q_NHK, key_MkHK, value_MkHK, begins):
        M, k, H, K = key_MkHK.shape
        q_ND = as_rows(q_NHK)
        # One row a vector: keys and values of one product lie side by side, and need not be copied.
        key_RD = as_rows(key_MkHK.flatten(0, 1))
        value_RD = as_rows(value_MkHK.flatten(0, 1))
        out_NHK = q_NHK.new_empty(q_NHK.shape)
        tensors = (q_ND, key_RD, value_RD, out_NHK, begins)
        strides = (q_ND.stride(0), key_RD.stride(0), value_RD.stride(0))
        _attend_to_patches[(M, H)](*tensors, *strides, **sizes_of(k, H, K))
        ctx.save_for_backward(q_ND, key_RD, value_RD, begins)
        ctx.sizes = (M, k, H, K)
        return out_NHK

    @staticmethod
    def backward(ctx, d_out_NHK):
        q_ND, key_RD, value_RD, begins = ctx.saved_tensors
        M, k, H, K = ctx.sizes
        d_q_NHK = q_ND.new_empty(q_ND.shape[0], H, K)
        d_key_MkHK = key_RD.new_empty(M, k, H, K)
        d_value_MkHK = value_RD.new_empty(M, k, H, K)
        tensors = (q_ND, key_RD, value_RD, d_out_NHK.contiguous(), d_q_NHK, d_key_MkHK, d_value_MkHK, begins)
        strides = (q_ND.stride(0), key_RD.stride(0), value_RD.stride(0))
        _attend_to_patches_backward[(M, H)](*tensors, *strides, **sizes_of(k, H, K))
        return d_q_NHK, d_key_MkHK, d_value_MkHK, None


@triton.jit
def _attend_to_patches(
    q, key, value, out, begins, q_stride, key_stride, value_stride,
    k: tl.constexpr, H: tl.constexpr, K: tl.constexpr, scale: tl.constexpr,
    BYTES: tl.constexpr, k_FILLED: tl.constexpr, K_FILLED: tl.constexpr,
):  # fmt: skip
    """All bytes that read one patch, for one head."""
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    i = tl.arange(0, k_FILLED)
    channel = tl.arange(0, K_FILLED)
    begin = tl.load(begins + m)
    end = tl.load(begins + m + 1)
    is_vector = (i < k)[:, None] & (channel < K)[None, :]
    number = (m * k + i)[:, None]
    columns = h * K + channel[None, :]
    key_tile = tl.load(key + number * key_stride + columns, is_vector, other=0.0).to(tl.float32) * scale
    value_tile = tl.load(value + number * value_stride + columns, is_vector, other=0.0).to(tl.float32)
    for start in range(begin, end, BYTES):
        n = start + tl.arange(0, BYTES)
        is_inside = (n < end)[:, None] & (channel < K)[None, :]
        row = n.to(tl.int64)[:, None]
        q_tile = tl.load(q + row * q_stride + columns, is_inside, other=0.0).to(tl.float32)
        scores = tl.sum(q_tile[:, None, :] * key_tile[None, :, :], 2)
        scores = tl.where((i < k)[None, :], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        attended = tl.sum(weights[:, :, None] * value_tile[None, :, :], 1)
        tl.store(out + row * (H * K) + columns, attended.to(out.dtype.element_ty), is_inside)


@triton.jit
def _attend_to_patches_backward(
    q, key, value, d_out, d_q, d_key, d_value, begins, q_stride, key_stride, value_stride,
    k: tl.constexpr, H: tl.constexpr, K: tl.constexpr, scale: tl.constexpr,
    BYTES: tl.constexpr, k_FILLED: tl.constexpr, K_FILLED: tl.constexpr,
):  # fmt: skip
    """The gradients of one patch and head: of its keys and values, and of the queries of all bytes that read it."""
    m = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    i = tl.arange(0, k_FILLED)
    channel = tl.arange(0, K_FILLED)
    begin = tl.load(begins + m)
    end = tl.load(begins + m + 1)
    is_vector = (i < k)[:, None] & (channel < K)[None, :]
    number = (m * k + i)[:, None]
    columns = h * K + channel[None, :]
    key_tile = tl.load(key + number * key_stride + columns, is_vector, other=0.0).to(tl.float32) * scale
    value_tile = tl.load(value + number * value_stride + columns, is_vector, other=0.0).to(tl.float32)
    d_key_tile = tl.zeros((k_FILLED, K_FILLED), tl.float32)
    d_value_tile = tl.zeros((k_FILLED, K_FILLED), tl.float32)
    for start in range(begin, end, BYTES):
        n = start + tl.arange(0, BYTES)
        is_inside = (n < end)[:, None] & (channel < K)[None, :]
        row = n.to(tl.int64)[:, None]
        # Beyond the last byte queries and gradients are zeros, which add nothing.
        q_tile = tl.load(q + row * q_stride + columns, is_inside, other=0.0).to(tl.float32)
        d_out_tile = tl.load(d_out + row * (H * K) + columns, is_inside, other=0.0).to(tl.float32)
        scores = tl.sum(q_tile[:, None, :] * key_tile[None, :, :], 2)
        scores = tl.where((i < k)[None, :], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        weights = weights / tl.sum(weights, 1)[:, None]
        d_weights = tl.sum(d_out_tile[:, None, :] * value_tile[None, :, :], 2)
        mean = tl.sum(weights * d_weights, 1)
        d_scores = weights * (d_weights - mean[:, None])
        # key_tile holds the scale already.
        d_q_tile = tl.sum(d_scores[:, :, None] * key_tile[None, :, :], 1)
        tl.store(d_q + row * (H * K) + columns, d_q_tile.to(d_q.dtype.element_ty), is_inside)
        d_key_tile += tl.sum(d_scores[:, :, None] * q_tile[:, None, :], 0)
        d_value_tile += tl.sum(weights[:, :, None] * d_out_tile[:, None, :], 0)
    offsets = number * (H * K) + columns
    tl.store(d_key + offsets, (d_key_tile * scale).to(d_key.dtype.element_ty), is_vector)
    tl.store(d_value + offsets, d_value_tile.to(d_value.dtype.element_ty), is_vector)
