"""Optimizers: Muon for the layers' matrices, a row-wise Adam for hash tables, AdamW for the rest.

`make_optimizers` puts every parameter into exactly one of them.
"""

import math

import torch
import torch.nn as nn
from torch.nn.utils import get_total_norm

MUON_STACK = 1 << 26  # numbers orthogonalised together, at most


def make_optimizers(model, config):
    """[Muon, AdamW] or, with hash tables, [Muon, AdamW, RowWiseAdam]. config: lr, adam_lr and weight_decay as in `RunConfig`.

    Muon's step is scaled to the RMS of an AdamW step (adjust_lr_fn="match_rms_adamw"), so all rates are of one kind. The output
    head is left to AdamW, as in the published Muon.
    """
    linear = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not model.head
    }
    hashed = {id(module.weight) for module in model.modules() if isinstance(module, nn.EmbeddingBag)}
    matrices = [p for p in model.parameters() if id(p) in linear]
    tables = [p for p in model.parameters() if id(p) in hashed]
    others = [p for p in model.parameters() if id(p) not in linear | hashed]
    optimizers = [
        GroupedMuon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            others,
            lr=config.adam_lr,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.0,
            fused=others[0].device.type in ("cuda", "cpu"),
        ),
    ]
    return optimizers + ([RowWiseAdam(tables, lr=config.adam_lr)] if tables else [])


class GroupedMuon(torch.optim.Muon):
    """torch.optim.Muon with all matrices of one shape orthogonalised together: the same updates, far fewer kernel launches.

    A 300M-class model has some 200 matrices of 6 shapes; one by one they cost 20,000 launches an update. Options, state and
    checkpoints are the parent's.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.device), []).append(p)
            for (shape, _), params in by_shape.items():
                together = max(1, MUON_STACK // shape.numel())
                for first in range(0, len(params), together):
                    self._update(params[first : first + together], group)

    def _update(self, params, group):
        gradients = [p.grad for p in params]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        updates = orthogonalize(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = params[0].shape
        wide = (
            0.2 * math.sqrt(max(rows, columns))
            if group["adjust_lr_fn"] == "match_rms_adamw"
            else math.sqrt(max(1, rows / columns))
        )
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates.to(params[0].dtype).unbind(0)), alpha=-group["lr"] * wide)


def orthogonalize(x_NRC, coefficients, steps, eps):
    """Push all singular values of each matrix towards 1 by Newton-Schulz steps x <- (a + b x x' + c (x x')^2) x, in bf16."""
    a, b, c = coefficients
    x = x_NRC.bfloat16()
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class RowWiseAdam(torch.optim.Optimizer):
    """Adam for lookup tables: only rows that were looked up change, and a row has one second moment.

    A row's step is its gradient over the root of the decayed mean of its squared RMS, bias-corrected by the row's own number of
    updates; there is no first moment and no weight decay. State: two numbers a row, against two a weight of AdamW; the losses are
    the same (LOG.md). Gradients are dense, or sparse and coalesced (`add_gradients` leaves them so), with the same updates.
    """

    def __init__(self, params, lr=1e-3, beta=0.95, eps=1e-8):
        super().__init__(params, dict(lr=lr, beta=beta, eps=eps))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["square"], state["count"] = (torch.zeros(p.shape[0], device=p.device) for _ in range(2))
                rows, values = (p.grad._indices()[0], p.grad._values()) if p.grad.is_sparse else (slice(None), p.grad)
                mean_square = torch.linalg.vector_norm(values, dim=1).square() / p.shape[1]
                is_used = mean_square > 0
                count = state["count"][rows] + is_used
                square = torch.where(
                    is_used, torch.lerp(mean_square, state["square"][rows], group["beta"]), state["square"][rows]
                )
                state["count"][rows], state["square"][rows] = count, square
                rms = (square / (1 - group["beta"] ** count.clamp(min=1))).sqrt()
                step = (-group["lr"] / (rms + group["eps"]))[:, None]
                if p.grad.is_sparse:
                    p.index_add_(0, rows, values * step)
                else:
                    p.addcmul_(values, step)


def backward(model, loss, scaler):
    """The backward pass: add the loss's gradients to those there are. Sparse ones are coalesced, so that they stay small."""
    scaler.scale(loss).backward()
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()


def clip_gradients(model, optimizers, scaler, max_norm):
    """Unscale and scale the whole gradient, sparse parts included, to at most this norm. Returns its norm before."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [p.grad._values() if p.grad.is_sparse else p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_optimizers(optimizers, scaler):
    """One update from the gradients: step, update the loss scale, clear."""
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def learning_rate_scale(step, config):
    """Factor of the peak learning rates at an update, 0 to 1."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
    return min(1.0, (config.steps - step) / max(1, config.cooldown * config.steps))
