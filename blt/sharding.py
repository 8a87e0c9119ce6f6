"""A model whose weights are shared out among processes (FSDP2), because one card has no room for all it needs.

    torchrun --nproc_per_node 8 llm_large.py --shard yes

Each process holds an equal part of the rows of every matrix, with its gradient and the optimizer's state. Before a
layer runs, PyTorch's fully_shard gathers its weights from all processes, and lets go of them afterwards.
`state_dict()` returns whole weights, so a checkpoint does not depend on the number of processes. It gathers
them: all processes must call it, and the main one gets the weights.
"""

import copy
import math
import warnings

import torch.nn as nn
import torch.nn.functional as F

from blt.processes import gather, is_main, n_processes, process_number, sparse_weights


def local(x):
    """This process's part of a sharded tensor; any other tensor as it is."""
    return x.to_local() if is_sharded(x) else x


def is_sharded(x):
    """Whether a tensor is a DTensor, whose rows are shared out."""
    # Not by its class: importing that takes as long as --help.
    return hasattr(x, "to_local")


def sharded(model):
    """A copy of the model of which each process holds a part, to be trained. The model itself moves to the CPU.

    Tables with sparse gradients stay whole in each process (`processes.average_sparse_gradients`).
    """
    # Here, because importing them takes half a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (n_processes(),))
    # The copy's layers go to the device one after the other, each as a part.
    shards = copy.deepcopy(model.to("cpu"))
    whole = {p for name, p in shards.named_parameters() if name in sparse_weights(shards)}
    # Layers before what holds them.
    for module in reversed(list(shards.modules())):
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if not whole.issuperset(layer.parameters()):
                    fully_shard(layer, mesh=mesh, ignored_params=whole)
    # Whoever changes weights between two passes changes the parts: no gathered weights must be left from the first.
    fully_shard(shards, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    for p in whole:
        p.data = p.data.to(device)
    # A block returns its keys and values too, which are views; nothing is added to them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    shards.register_state_dict_post_hook(_join_weights)
    shards.register_load_state_dict_pre_hook(_split_weights)
    return shards


def share_state(optimizer):
    """Let the state dict of an optimizer of sharded weights be that of the whole model's optimizer."""
    optimizer.register_state_dict_post_hook(_join_state)
    optimizer.register_load_state_dict_pre_hook(_split_state)


def own_part(whole, axis=0):
    """This process's rows, along an axis, of a whole tensor: parts of equal size, the last smaller or empty."""
    # As fully_shard splits.
    parts = whole.chunk(n_processes(), axis)
    return parts[process_number()] if process_number() < len(parts) else whole.narrow(axis, 0, 0)


def all_rows(x_NrC, rows):
    """Whole matrices [N, R, C] from each process's `own_part` of their rows. rows: R."""
    share = math.ceil(rows / n_processes())
    padded = F.pad(x_NrC, (0, 0, 0, share - x_NrC.shape[1]))
    return gather(padded).transpose(0, 1).flatten(1, 2)[:, :rows]


def _whole(x):
    """A whole tensor on the CPU, in the main process only: a machine has no room for one in each."""
    if not is_sharded(x):
        return x
    whole = x.full_tensor()
    return whole.cpu() if is_main() else None


def _part(whole, like):
    """This process's rows of a tensor, as a DTensor that is shared out as `like` is."""
    from torch.distributed.tensor import DTensor

    own = own_part(whole).to(like.to_local().device)
    layout = dict(shape=whole.shape, stride=whole.stride())
    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, **layout)


def _join_weights(model, state, prefix, metadata):
    for name, value in state.items():
        state[name] = _whole(value)


def _split_weights(model, state, *rest):
    for name, p in model.named_parameters():
        if is_sharded(p) and name in state:
            state[name] = _part(state[name], p)


def _join_state(optimizer, state):
    # New dicts: those inside are the optimizer's own.
    joined = {
        number: {name: _whole(value) for name, value in of_parameter.items()}
        for number, of_parameter in state["state"].items()
    }
    return state | {"state": joined}


def _split_state(optimizer, state):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    split = {}
    for number, of_parameter in state["state"].items():
        p = parameters[number]
        split[number] = {
            name: _part(value, p) if is_sharded(p) and value.dim() > 0 else value
            for name, value in of_parameter.items()
        }
    return state | {"state": split}
