"""Patches as segments of bytes: which patch a byte is pooled into, and which one it reads."""

import torch


class Segments:
    """Bytes as parts of patches. into_BT: int64, the patch 0..P-1 of its row that each byte is pooled into; P: into none."""

    def __init__(self, into_BT, n_patches):
        self.P = n_patches
        # Slot P of each row takes the bytes that are left out, and is dropped.
        self.pool = (into_BT + torch.arange(len(into_BT), device=into_BT.device)[:, None] * (n_patches + 1)).flatten()
        self.pool_slots = len(into_BT) * (n_patches + 1)

    def sum(self, x_NF):
        """Sum over each patch's bytes: [B * T, F] -> [B * (P + 1), F]."""
        return x_NF.new_zeros(self.pool_slots, x_NF.shape[1]).index_add(0, self.pool, x_NF)

    def max(self, x_NF, empty=0.0):
        """Maximum over each patch's bytes: [B * T, F] -> [B * (P + 1), F]; `empty` for patches without bytes."""
        index = self.pool[:, None].expand_as(x_NF)
        out = x_NF.new_full((self.pool_slots, x_NF.shape[1]), empty)
        return out.scatter_reduce(0, index, x_NF, "amax", include_self=False)

    def drop_left_out(self, x_NF):
        """[B * (P + 1), ...] -> [B, P, ...] without the slots of left-out bytes."""
        return x_NF.unflatten(0, (-1, self.P + 1))[:, :-1]


class PatchMap(Segments):
    """Which patch each byte is pooled into and which it reads: integer maps made once per forward.

    Worked example: lengths 1, 2, 3 over 6 ids, the last of them only a target. Patches of the ids: 0 1 1 2 2 2. The encoder
    pools the inputs as 0 1 1 2 2; input t reads the newest patch that is complete before id t + 1: 0 0 1 1 1.

    A boundary inside a row may stand at the end of the last document's patch (that the document ends there is nothing a
    patch may tell). Such a patch then belongs to the new document: the bytes before the boundary are left out of it. No byte
    of the old document reads it.
    """

    def __init__(self, patch_lengths_BP, documents_BT):
        B, P = patch_lengths_BP.shape
        T = documents_BT.shape[1]
        ends_BP = patch_lengths_BP.cumsum(dim=1)
        places = torch.arange(T + 1, device=ends_BP.device).expand(B, T + 1).contiguous()
        patch_of_id = torch.searchsorted(ends_BP, places, right=True).clamp_(max=P - 1)
        last_input_BP = (ends_BP - 1).clamp(0, T - 1)
        self.documents_BP = documents_BT.gather(1, last_input_BP)
        pooled_into = patch_of_id[:, :T]
        is_left_out = self.documents_BP.gather(1, pooled_into) != documents_BT
        super().__init__(pooled_into.masked_fill(is_left_out, P), P)
        row = torch.arange(B, device=ends_BP.device)[:, None]
        self.read = ((patch_of_id[:, 1:] - 1).clamp_(min=0) + row * P).flatten()


def check_patch_lengths(patch_lengths_BP, n_ids):
    """Raise ValueError unless every row of lengths is a cut of n_ids ids that the model can read without seeing ahead.

    The first length must be 1 (else the first patch would be read before it is complete), lengths are positive with
    zeros on the right only, and they sum to n_ids = T + 1. Reads values: not for compiled code.
    """
    lengths = torch.as_tensor(patch_lengths_BP)
    if lengths.dim() != 2 or lengths.is_floating_point():
        raise ValueError(f"patch_lengths must be integers [B, P], not {lengths.dtype} {list(lengths.shape)}")
    if not bool((lengths[:, :1] == 1).all()) or lengths.shape[1] == 0:
        raise ValueError("the first patch of a row must have length 1: the boundary or a single byte, alone")
    if bool((lengths < 0).any()):
        raise ValueError("patch lengths must not be negative")
    if bool(((lengths[:, 1:] > 0) & (lengths[:, :-1] == 0)).any()):
        raise ValueError("zero patch lengths may stand on the right of a row only")
    sums = lengths.sum(dim=1)
    if not bool((sums == n_ids).all()):
        raise ValueError(
            f"patch lengths must sum to {n_ids}, all ids of a row with its last target, not to {sums.tolist()}"
        )
