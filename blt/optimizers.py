"""Optimizers and what a training step does with them.

    backward(model, loss, scaler)                              add the loss's gradients
    clip_gradients(model, optimizers, scaler, max_norm)        limit the norm of all of them
    step_optimizers(optimizers, scaler, gradient_norm)         change the weights, clear the gradients

`make_optimizers` puts every parameter into exactly one of three: Muon for the matrices of layers, a
row-wise Adam for hash tables, AdamW for the rest (embeddings, output head, norms).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from blt.device import choose_precision
from blt.processes import gather, n_processes, process_number
from blt.sharding import all_rows, is_sharded, local, own_part, share_state

# Muon makes one tensor of at most this many numbers out of matrices of one shape.
MUON_STACK = 1 << 26


def make_optimizers(model, config):
    """[Muon, AdamW] or, with hash tables, [Muon, AdamW, RowWiseAdam].

    config: lr, adam_lr, table_lr, table_schedule, weight_decay and table_decay as in `RunConfig`. Muon's updates
    are scaled to the RMS of AdamW's, so both learning rates are of one kind.
    """
    linear_ids = set()
    table_ids = set()
    for module in model.modules():
        # AdamW takes the output head, as in the published Muon.
        if isinstance(module, nn.Linear) and module is not model.head:
            linear_ids.add(id(module.weight))
        elif isinstance(module, nn.EmbeddingBag):
            table_ids.add(id(module.weight))
    matrices = [p for p in model.parameters() if id(p) in linear_ids]
    tables = [p for p in model.parameters() if id(p) in table_ids]
    others = [p for p in model.parameters() if id(p) not in linear_ids | table_ids]
    # Embeddings, head and norms have no weight decay.
    muon = GroupedMuon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        others,
        lr=config.adam_lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.0,
        fused=others[0].device.type in ("cuda", "cpu"),
    )
    optimizers = [muon, adamw]
    if tables:
        row_wise = RowWiseAdam(tables, lr=config.adam_lr * config.table_lr, weight_decay=config.table_decay)
        # An n-gram that training meets for the first time near its end still needs a step of some size. So the
        # rate of the tables falls later than the others: by a power of the schedule below 1.
        row_wise.param_groups[0]["schedule_power"] = config.table_schedule
        optimizers.append(row_wise)
    if any(is_sharded(p) for p in model.parameters()):
        for optimizer in optimizers:
            share_state(optimizer)
    return optimizers


class GroupedMuon(torch.optim.Muon):
    """torch.optim.Muon with the same updates, for all matrices of one shape at once.

    Muon's update of a matrix is its momentum made orthogonal (`orthogonalize`). A model of 300 million
    parameters has some 200 matrices of 6 shapes. One by one they cost 20,000 kernel launches an
    update; stacked by shape, far fewer. Options, state and checkpoints are the parent's. Processes share the work.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape, p.device), []).append(p)
            for (shape, _), params in by_shape.items():
                # A bound on the stack bounds the memory of an update. Each process gets a matrix at least.
                n_together = max(n_processes(), MUON_STACK // shape.numel())
                for first in range(0, len(params), n_together):
                    self._update(params[first : first + n_together], group)

    def _update(self, params, group):
        """One update of matrices of one shape."""
        gradients = [local(p.grad) for p in params]
        # The name is the parent's, so that its checkpoints are ours.
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                momentum = torch.zeros_like(p.grad, memory_format=torch.preserve_format)
                self.state[p]["momentum_buffer"] = momentum
        momenta = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = momenta
        if group["nesterov"]:
            # Nesterov momentum blends the gradient with the momentum a second time.
            updates = torch._foreach_lerp(gradients, momenta, group["momentum"])
        rows, columns = params[0].shape
        options = (group["ns_coefficients"], group["ns_steps"], group["eps"])
        if is_sharded(params[0]):
            # A matrix is made orthogonal as a whole.
            updates_NRC = own_part(orthogonalize_together(all_rows(torch.stack(updates), rows), *options), 1)
        else:
            updates_NRC = orthogonalize_together(torch.stack(updates), *options)
        if group["adjust_lr_fn"] == "match_rms_adamw":
            # An orthogonal matrix has numbers of RMS 1 / sqrt(max(rows, columns)). Those of an AdamW
            # update have an RMS of about 0.2.
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1, rows / columns))
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        # Those of tall matrices are transposed. As they are, a GPU would add them one by one.
        steps = list(updates_NRC.to(params[0].dtype).contiguous().unbind(0))
        torch._foreach_add_(weights, steps, alpha=-group["lr"] * scale)


def products_dtype(device):
    """The dtype of `orthogonalize`: the fastest on this device, which for most CPUs is not bf16."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[choose_precision("auto", device)]


def orthogonalize_together(x_NRC, *options):
    """`orthogonalize`, with the matrices shared out among the processes, which all have the same."""
    if n_processes() == 1:
        return orthogonalize(x_NRC, *options)
    share = math.ceil(len(x_NRC) / n_processes())
    missing = share * n_processes() - len(x_NRC)
    first = process_number() * share
    own = F.pad(x_NRC, (0, 0, 0, 0, 0, missing))[first : first + share]
    return gather(orthogonalize(own, *options)).flatten(0, 1)[: len(x_NRC)]


def orthogonalize(x_NRC, coefficients, steps, eps, dtype=None):
    """Push all singular values of each matrix towards 1, by Newton-Schulz steps in `products_dtype`.

    A step is x <- (a + b g + c g g) x with the Gram matrix g = x x' and (a, b, c) = coefficients. It
    keeps the singular vectors of x, and takes each singular value s to a s + b s ** 3 + c s ** 5.
    """
    a, b, c = coefficients
    dtype = products_dtype(x_NRC.device) if dtype is None else dtype
    # fp16 holds no gradient: numbers of 1e-8 would be zeros. So its norm is taken before the cast, and
    # after it no number exceeds 1.
    x = x_NRC.float() if dtype == torch.float16 else x_NRC.to(dtype)
    # The Gram matrix is rows by rows: of a tall matrix that of its transpose is smaller.
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    # No singular value exceeds the norm of the matrix: dividing by it brings all of them into 0..1.
    x = (x / x.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]).to(dtype)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


class RowWiseAdam(torch.optim.Optimizer):
    """Adam for lookup tables: only rows that were looked up change, with one second moment a row.

    The n-th update of a row, from its gradient g:

        square <- beta * square + (1 - beta) * mean(g ** 2)
        row <- (1 - lr * weight_decay) * row - lr * g / (sqrt(square / (1 - beta ** n)) + eps)

    There is no first moment. The state is two numbers a row, where AdamW has two a
    weight; losses are the same (LOG.md). Gradients may be dense, or sparse with each row once as `backward`
    leaves them, with the same updates.
    """

    def __init__(self, params, lr=1e-3, beta=0.95, eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, beta=beta, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p, group):
        """One update of a table [rows, D]."""
        beta = group["beta"]
        state = self.state[p]
        if not state:
            state["square"] = torch.zeros_like(p[:, 0])
            state["count"] = torch.zeros_like(p[:, 0])
        weights, squares, counts = local(p), local(state["square"]), local(state["count"])
        is_sparse = p.grad.is_sparse
        if is_sparse:
            rows = p.grad._indices()[0]
            gradients = p.grad._values()
        else:
            rows = slice(None)
            gradients = local(p.grad)
        mean_square = torch.linalg.vector_norm(gradients, dim=1).square() / p.shape[1]
        # A dense gradient has all rows. Those that were not looked up are zero and keep their state.
        is_used = mean_square > 0
        count = counts[rows] + is_used
        old_square = squares[rows]
        square = torch.where(is_used, torch.lerp(mean_square, old_square, beta), old_square)
        counts[rows] = count
        squares[rows] = square
        rms = (square / (1 - beta ** count.clamp(min=1))).sqrt()
        factor = (-group["lr"] / (rms + group["eps"]))[:, None]
        decay = group["lr"] * group["weight_decay"]
        if is_sparse:
            steps = gradients * factor
            if decay > 0:
                steps -= decay * is_used[:, None] * weights[rows]
            weights.index_add_(0, rows, steps)
        else:
            if decay > 0:
                weights.mul_(1 - decay * is_used[:, None])
            weights.addcmul_(gradients, factor)


def backward(model, loss, scaler):
    """The backward pass: add the loss's gradients, scaled up with fp16, to those that are there.

    scaler: `torch.amp.GradScaler`, enabled with fp16 only.
    """
    # The gradient of one pass lists each row of a table once (`kernels.SparseLookup`), so it is left as it is.
    added_to = [p for p in model.parameters() if p.grad is not None and p.grad.is_sparse]
    scaler.scale(loss).backward()
    for p in added_to:
        # That of several passes may list a row more than once. Sum those of one row, so that it stays small while
        # gradients accumulate, and so that `RowWiseAdam` and the norm see each row once.
        p.grad = p.grad.coalesce()


def clip_gradients(model, optimizers, scaler, max_norm):
    """Scale the gradients down to at most this norm, all parameters together. Returns the norm before.

    With fp16 it first divides the gradients by the scaler's factor. The CPU does not wait for a GPU.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = []
    parts = []
    for p in model.parameters():
        if p.grad is not None and is_sharded(p.grad):
            parts.append(local(p.grad))
        elif p.grad is not None:
            gradients.append(p.grad._values() if p.grad.is_sparse else p.grad)
    norm = get_total_norm(gradients)
    if parts:
        # Each process has other rows of these, and the same of all others.
        squares = gather(get_total_norm(parts).square()).sum()
        norm = (squares + norm.to(squares.device).square()).sqrt()
        gradients += parts
    # No `if norm > max_norm`, which would have to read the norm back from the GPU.
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_optimizers(optimizers, scaler, gradient_norm):
    """Update all weights and clear the gradients. gradient_norm: what `clip_gradients` returned.

    With fp16, gradients may overflow; then no weight changes, and the scaler's factor falls. To know
    that, the CPU waits for the device once.
    """
    # One decision for all optimizers. The scaler's own is one for each, and an optimizer without an
    # overflow of its own would step with gradients that the common norm has made NaN or zero.
    if not scaler.is_enabled() or torch.isfinite(gradient_norm).item():
        for optimizer in optimizers:
            optimizer.step()
    scaler.update()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def learning_rate_scale(step, config):
    """The factor, 0 to 1, of the peak learning rates at an update.

    It rises linearly over the first `warmup` share of the steps. A "cosine" then falls to zero as half a
    cosine. A "trapezoid" stays at 1 and falls linearly to zero over the last `cooldown` share.
    """
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
    return min(1.0, (config.steps - step) / max(1, config.cooldown * config.steps))
