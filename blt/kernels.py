"""Hand-written forward and backward passes: attention in bands, RMSNorm, gated feed-forward, attention within patches."""

import torch
import torch.nn.functional as F


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


def _rms_norm(x, weight, eps, dtype):
    if x.device.type != "cpu" or (
        not torch.is_grad_enabled() and x.numel() < 1 << 14
    ):  # for few numbers torch's is faster
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


class SegmentAttention(torch.autograd.Function):
    """Attention of each patch's k queries to the bytes that `patch_map.pool` puts into it; softmax and sums in fp32."""

    @staticmethod
    def forward(ctx, q_MkHK, key_NHK, value_NHK, patch_map):
        k, scale = q_MkHK.shape[1], key_NHK.shape[-1] ** -0.5
        q_NkHK = gather_rows(q_MkHK, patch_map.pool)
        scores_NkH = torch.stack([(q_NkHK[:, i] * key_NHK).sum(-1) for i in range(k)], dim=1).float() * scale
        highest = patch_map.max(scores_NkH.flatten(1))
        weights_NkH = (scores_NkH - gather_rows(highest, patch_map.pool).view_as(scores_NkH)).exp()
        total = patch_map.sum(weights_NkH.flatten(1)).clamp(min=1e-30)
        weights_NkH = weights_NkH / gather_rows(total, patch_map.pool).view_as(weights_NkH)
        value = value_NHK.float()
        attended = patch_map.sum(torch.stack([weights_NkH[:, i, :, None] * value for i in range(k)], dim=1).flatten(1))
        ctx.save_for_backward(q_MkHK, key_NHK, value_NHK, weights_NkH)
        ctx.patch_map = patch_map
        return attended.to(value_NHK.dtype).view_as(q_MkHK)

    @staticmethod
    def backward(ctx, d_MkHK):
        q_MkHK, key, value, weights_NkH = ctx.saved_tensors
        patch_map, k, scale = ctx.patch_map, q_MkHK.shape[1], key.shape[-1] ** -0.5
        d_NkHK, q_NkHK = gather_rows(d_MkHK, patch_map.pool), gather_rows(q_MkHK, patch_map.pool)
        d_value = sum(weights_NkH[:, i, :, None].to(value.dtype) * d_NkHK[:, i] for i in range(k))
        d_weights = torch.stack([(d_NkHK[:, i] * value).sum(-1) for i in range(k)], dim=1).float()
        mean = patch_map.sum((weights_NkH * d_weights).flatten(1))
        d_scores = weights_NkH * (d_weights - gather_rows(mean, patch_map.pool).view_as(d_weights)) * scale
        d_key = sum(d_scores[:, i, :, None].to(key.dtype) * q_NkHK[:, i] for i in range(k))
        key = key.float()
        d_q = patch_map.sum(torch.stack([d_scores[:, i, :, None] * key for i in range(k)], dim=1).flatten(1))
        return d_q.to(q_MkHK.dtype).view_as(q_MkHK), d_key, d_value, None


class GatherAttention(torch.autograd.Function):
    """Attention of each byte to the k vectors of patch read_N[byte]."""

    @staticmethod
    def forward(ctx, q_NHK, key_MkHK, value_MkHK, read_N):
        k, scale = key_MkHK.shape[1], q_NHK.shape[-1] ** -0.5
        key, value = gather_rows(key_MkHK, read_N), gather_rows(value_MkHK, read_N)
        scores_NkH = torch.stack([(q_NHK * key[:, i]).sum(-1) for i in range(k)], dim=1).float() * scale
        weights_NkH = scores_NkH.softmax(dim=1)
        ctx.save_for_backward(q_NHK, key_MkHK, value_MkHK, weights_NkH, read_N)
        return sum(weights_NkH[:, i, :, None].to(value.dtype) * value[:, i] for i in range(k))

    @staticmethod
    def backward(ctx, d_NHK):
        q, key_MkHK, value_MkHK, weights_NkH, read_N = ctx.saved_tensors
        k, scale = key_MkHK.shape[1], q.shape[-1] ** -0.5
        key, value = gather_rows(key_MkHK, read_N), gather_rows(value_MkHK, read_N)
        d_weights = torch.stack([(d_NHK * value[:, i]).sum(-1) for i in range(k)], dim=1).float()
        mean = (weights_NkH * d_weights).sum(1, keepdim=True)
        d_scores = (weights_NkH * (d_weights - mean) * scale).to(q.dtype)
        weights = weights_NkH.to(q.dtype)
        d_q = sum(d_scores[:, i, :, None] * key[:, i] for i in range(k))
        d_key, d_value = (
            torch.zeros_like(key_MkHK)
            .flatten(1)
            .index_add_(0, read_N, torch.stack([x[:, i, :, None] * rows for i in range(k)], dim=1).flatten(1))
            .view_as(key_MkHK)
            for x, rows in ((d_scores, q), (weights, d_NHK))
        )
        return d_q, d_key, d_value, None


def gather_rows(x, index):
    """x[index] along the first axis, read in whole rows."""
    return x.flatten(1).index_select(0, index).unflatten(1, x.shape[1:])
