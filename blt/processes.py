"""Several processes that train one model together, one a GPU, as torchrun starts them.

    torchrun --nproc_per_node 8 llm.py

Each process has the whole model and a share of the rows of every update (`loop.share_of_update`). PyTorch's
DistributedDataParallel adds up their gradients (`parallel`), so all make the same update. The main process, number 0,
prints and writes; the others keep quiet. Without torchrun there is one process, the main one, and these
functions change nothing.

What processes tell each other in Python numbers goes over gloo, beside the GPUs: it waits for no device. All of them
must call the functions below in the same order.
"""

import os
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

# The others may have to wait while the main process builds a corpus or computes entropies. Within one
# machine torchrun ends all processes when one has died; if a machine is lost, the others wait in vain.
LONGEST_WAIT = timedelta(days=7)


def n_processes():
    """How many processes train together."""
    return dist.get_world_size() if _is_joined() else 1


def process_number():
    """The number of this process, from 0."""
    return dist.get_rank() if _is_joined() else 0


def _is_joined():
    # Some builds of torch know of no other processes.
    return dist.is_available() and dist.is_initialized()


def is_main():
    """Whether this is the process that prints and writes."""
    return process_number() == 0


@contextmanager
def joined(config):
    """Join the processes that torchrun has started beside this one; after the block, end the process.

    Without torchrun the program goes on after the block.
    config: a script's config. One with RUNS_TOGETHER can be of several processes.
    Raises ValueError if this script or this device cannot be shared.
    """
    is_of_torchrun = dist.is_available() and dist.is_torchelastic_launched()
    if not is_of_torchrun or int(os.environ["WORLD_SIZE"]) == 1 or _is_joined():
        yield
        return
    if not getattr(config, "RUNS_TOGETHER", False):
        raise ValueError("this script runs as one process; start it with python instead of torchrun")
    device = config.device
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; torchrun gives each process its own GPU: use --device cuda, or cpu")
    uses_cuda = device != "cpu" and torch.cuda.is_available()
    if uses_cuda:
        number = int(os.environ["LOCAL_RANK"])
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun has started {os.environ['LOCAL_WORLD_SIZE']} processes here, but torch finds "
                f"{torch.cuda.device_count()} GPU(s); lower --nproc_per_node"
            )
        # "cuda" without a number is this one from here on.
        torch.cuda.set_device(number)
    dist.init_process_group("cpu:gloo,cuda:nccl" if uses_cuda else "gloo", timeout=LONGEST_WAIT)
    with open(os.devnull, "w") as nowhere, nullcontext() if is_main() else redirect_stdout(nowhere):
        yield
    # A process that leaves early would take its connections away from those that still work.
    wait_for_all()
    # Everything is written. Where processes close their connections at the same moment, one in some sixty runs
    # ended with an abort in torch's threads. After an error torchrun ends the others.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def wait_for_all():
    """Go on when every process has come here."""
    sum_over_processes(0)


@contextmanager
def main_first():
    """Let the main process run the block, which writes files, before the others, which then find them."""
    if not is_main():
        wait_for_all()
    yield
    if is_main():
        wait_for_all()


def sum_over_processes(*numbers):
    """Add up each Python number over all processes: a tuple of the same types; of bools, whether any is True."""
    if n_processes() == 1:
        return numbers
    # float64 holds every count below 9e15 exactly.
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return tuple(type(number)(total) for number, total in zip(numbers, sums.tolist()))


def from_main(make):
    """What make() returns in the main process, for all: plain values such as strings."""
    if n_processes() == 1:
        return make()
    values = [make() if is_main() else None]
    dist.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]


# Tensors


def gather(x):
    """The tensors of all processes, of equal shape, in the order of their numbers: [processes, *x.shape]."""
    if n_processes() == 1:
        return x[None]
    whole = x.new_empty(n_processes(), *x.shape)
    dist.all_gather(list(whole.unbind(0)), x.contiguous())
    return whole


def sparse_weights(model):
    """Names of the parameters that have sparse gradients: those of large tables."""
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    ]


def parallel(model):
    """The model as one of n_processes(): a backward pass leaves the mean of all processes' gradients in each.

    Sparse gradients stay those of the process, for `average_sparse_gradients`.
    """
    # NCCL cannot add sparse tensors up.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sparse_weights(model))
    is_on_gpu = next(model.parameters()).device.type == "cuda"
    devices = [torch.cuda.current_device()] if is_on_gpu else None
    # The buffers are constants, equal in all processes.
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def gradient_exchange(parallel_model, is_last):
    """The context of one pass. Gradients are exchanged in the last pass of an update only.

    A sharded model exchanges them in every pass, because it has no room for whole gradients.
    """
    return parallel_model.no_sync() if hasattr(parallel_model, "no_sync") and not is_last else nullcontext()


def average_sparse_gradients(model):
    """Replace each sparse gradient by its mean over all processes. It must be coalesced."""
    if n_processes() == 1:
        return
    for p in model.parameters():
        if p.grad is not None and p.grad.is_sparse:
            p.grad = _average_sparse(p.grad)


def _average_sparse(gradient):
    """The mean over processes of sparse gradients [rows, D], coalesced. Each may list different rows."""
    rows = gradient._indices()[0]
    counts = gather(torch.tensor(len(rows))).tolist()
    missing = max(counts) - len(rows)
    all_rows = gather(F.pad(rows, (0, missing)))
    all_values = gather(F.pad(gradient._values(), (0, 0, 0, missing)))
    rows = torch.cat([all_rows[i, :count] for i, count in enumerate(counts)])
    values = torch.cat([all_values[i, :count] for i, count in enumerate(counts)]) / n_processes()
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False).coalesce()


def seed_step(seed, step):
    """Let each process drop other channels, which depend on the step alone: a resumed run drops the same."""
    if n_processes() > 1:
        torch.manual_seed(((seed * 1_000_003 + step) * 4096 + process_number()) % 2**63)


def name_of_program():
    """The script's name for an error message, with the number of the process if there are several."""
    name = os.path.basename(sys.argv[0])
    return name if n_processes() == 1 else f"{name}, process {process_number()}"
