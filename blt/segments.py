"""Patches as segments of a row of bytes: which patch a byte is pooled into, and which patch it reads.

`Segments` pools the bytes of each patch, and attends to them. `PatchMap` is the `Segments` of a row of
patch lengths, with the patch that each byte may read without seeing the future. `OpenPatches` is that of
text that is being written. `attend_to_patches` is how bytes read patches.

On CUDA `triton_kernels` do the work of `PatchMap`, `OpenPatches` and `attend_to_patches`, elsewhere
`kernels`.
"""

import importlib.util
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from blt.device import what_triton_lacks
from blt.kernels import GatherAttention, SegmentAttention, apply_function, in_memory

# Triton comes with torch's CUDA builds for Linux.
if importlib.util.find_spec("triton") is not None:
    from blt import triton_kernels

# Found out once: torch.compile does not see through it.
CAN_COMPILE = what_triton_lacks() is None


def runs_triton(device):
    """Whether `triton_kernels` run on this device."""
    return CAN_COMPILE and device.type == "cuda"


@contextmanager
def without_triton():
    """Inside the block CUDA runs the code for CPUs, to which the kernels are compared."""
    global CAN_COMPILE
    before = CAN_COMPILE
    CAN_COMPILE = False
    try:
        yield
    finally:
        CAN_COMPILE = before


class Segments:
    """The bytes of B rows sorted into the P patches of each row.

    into_BT: int64, the patch 0..P-1 of its row that each byte is pooled into; P leaves the byte out.

    Sums and maxima work on all rows at once: on N = B * T bytes and M = B * (P + 1) slots, which are
    the P patches of row 0, one slot for its left-out bytes, the patches of row 1, and so on.
    pool: int64 [N], the slot of each byte.
    begins, first: the inputs of `triton_kernels`; None where these are not used. For the kernels M counts
    the B * P patches only: left-out bytes have no slot, and `first` skips them.
    """

    begins = None
    first = None

    def __init__(self, into_BT, n_patches):
        self.P = n_patches
        n_rows = len(into_BT)
        # Left-out bytes get a slot of their own, because without them the shapes of tensors would
        # depend on values: the CPU would have to wait for a GPU, and torch.compile to compile again.
        first_slot_B1 = torch.arange(n_rows, device=into_BT.device)[:, None] * (n_patches + 1)
        self.pool = (into_BT + first_slot_B1).flatten()
        self.pool_slots = n_rows * (n_patches + 1)

    def sum(self, x_NF):
        """Sum over each slot's bytes: [N, F] -> [M, F]; 0 for slots without bytes."""
        return x_NF.new_zeros(self.pool_slots, x_NF.shape[1]).index_add(0, self.pool, x_NF)

    def max(self, x_NF, empty=0.0):
        """Maximum over each slot's bytes: [N, F] -> [M, F]; `empty` for slots without bytes."""
        slots_NF = self.pool[:, None].expand_as(x_NF)
        out = x_NF.new_full((self.pool_slots, x_NF.shape[1]), empty)
        return out.scatter_reduce(0, slots_NF, x_NF, "amax", include_self=False)

    def drop_left_out(self, x_MF):
        """The patches without the slots of left-out bytes: [M, ...] -> [B, P, ...]."""
        return x_MF.unflatten(0, (-1, self.P + 1))[:, :-1]

    def max_or_mean(self, x_BTD, how):
        """The "max" or "mean" of each patch's bytes [B, P, D]; zeros for a patch without bytes."""
        x_ND = x_BTD.flatten(0, 1)
        if self.begins is not None:
            pooled = apply_function(triton_kernels.MaxOrMean, x_ND, self.begins, self.first, how == "max")
            return pooled.unflatten(0, (-1, self.P))
        if how == "max":
            return self.drop_left_out(self.max(x_ND))
        n_bytes = self.sum(x_ND.new_ones(x_ND.shape[0], 1)).clamp(min=1)
        return self.drop_left_out(self.sum(x_ND) / n_bytes)

    def attend(self, q_BPkHK, key_BTHK, value_BTHK):
        """The k queries of each patch attend to the patch's bytes: [B, P, k, H, K]; zeros for a patch without bytes."""
        key_NHK = key_BTHK.flatten(0, 1)
        value_NHK = value_BTHK.flatten(0, 1)
        if self.begins is not None:
            arguments = (q_BPkHK.flatten(0, 1), key_NHK, value_NHK, self.begins, self.first)
            return apply_function(triton_kernels.AttentionToBytes, *arguments).unflatten(0, (-1, self.P))
        # The slot of left-out bytes has queries of zeros.
        q_MkHK = F.pad(q_BPkHK, (0, 0, 0, 0, 0, 0, 0, 1)).flatten(0, 1)
        return self.drop_left_out(apply_function(SegmentAttention, q_MkHK, key_NHK, value_NHK, self))


class PatchMap(Segments):
    """The patch that each byte of a row is pooled into, and the one that it reads (BLT section 3.3).

    A row has T + 1 ids: the inputs 0..T-1 and the last input's target. The lengths cover all of them.
    Input t predicts id t + 1 and reads the newest patch that is complete before id t + 1. That is t's
    own patch if t is its last byte, else the patch before. An incomplete patch is never read: it
    holds bytes that are still to be predicted.

    Worked example: lengths 1, 2, 3 over ids 0..5, of which id 5 is a target only.

        id                  0  1  2  3  4  5
        patch of the id     0  1  1  2  2  2
        pooled into         0  1  1  2  2
        reads               0  0  1  1  1        the patch of id t + 1, minus 1

    A document may end inside a patch: if its boundary always opened a patch, the patches would tell the
    model where the document ends. Such a patch belongs to the new document, and the old document's
    bytes are left out of it. They do not read it either, since it is complete only after them. (The
    first byte of a document always starts a patch, so the boundary is the last input of such a patch.)

    read: int64 [N], the patch that each byte reads; those of row b are numbered from b * P.
    documents_BP: the document that each patch belongs to.
    """

    def __init__(self, patch_lengths_BP, documents_BT):
        B, P = patch_lengths_BP.shape
        T = documents_BT.shape[1]
        ends_BP = patch_lengths_BP.cumsum(dim=1)
        # An id's patch number is the number of patches that end before it. Unused patch slots, of
        # length 0, end where the row ends and so hold no id. The clamps here and below matter for
        # invalid rows only: they keep indices in range where nothing checks values.
        positions = torch.arange(T + 1, device=ends_BP.device).expand(B, T + 1).contiguous()
        patch_of_id = torch.searchsorted(ends_BP, positions, right=True).clamp_(max=P - 1)
        # A patch belongs to the document of its last input.
        last_input_BP = (ends_BP - 1).clamp(0, T - 1)
        self.documents_BP = documents_BT.gather(1, last_input_BP)
        pooled_into_BT = patch_of_id[:, :T]
        is_left_out_BT = self.documents_BP.gather(1, pooled_into_BT) != documents_BT
        super().__init__(pooled_into_BT.masked_fill(is_left_out_BT, P), P)
        # For `starts_before`.
        self.patch_of_byte_BT = pooled_into_BT
        self.bounds_BP = (ends_BP, patch_lengths_BP)
        self.documents_BT = documents_BT
        # The newest patch that is complete before id t + 1 is the one before that id's own.
        reads_BT = (patch_of_id[:, 1:] - 1).clamp_(min=0)
        first_patch_B1 = torch.arange(B, device=ends_BP.device)[:, None] * P
        self.read = (reads_BT + first_patch_B1).flatten()
        if runs_triton(ends_BP.device):
            # Patches are runs of bytes, of which the kernels take the ends.
            self.begins = first_positions((pooled_into_BT + first_patch_B1).flatten(), B * P)
            # The left-out bytes of a patch are its first ones. What comes before its document is none of it.
            first_of_document_BP = torch.searchsorted(documents_BT, self.documents_BP)
            first_of_row_B1 = torch.arange(B, device=ends_BP.device)[:, None] * T
            first_of_document_M = (first_of_document_BP + first_of_row_B1).flatten().int()
            self.first = torch.maximum(self.begins[:-1], first_of_document_M)

    def starts_before(self, counts):
        """Where the patch begins that is this many before each byte's own; never before its document.

        Example: lengths 1, 2, 3 and the counts 0 and 1 give 0, 1, 1, 3, 3 and 0, 0, 0, 1, 1 for the five
        bytes of one document. Returns int64 [B, T, number of counts].
        """
        ends_BP, lengths_BP = self.bounds_BP
        first_id_BP = ends_BP - lengths_BP
        patches = [(self.patch_of_byte_BT - count).clamp(min=0) for count in counts]
        starts = [first_id_BP.gather(1, patch_BT) for patch_BT in patches]
        first_of_document_BT = torch.searchsorted(self.documents_BT, self.documents_BT)
        return torch.maximum(torch.stack(starts, dim=-1), first_of_document_BT[..., None])


class OpenPatches(Segments):
    """The patches that a step of generation completes. For forward passes only.

    into_BT: as in `Segments`; it does not decrease along a row, so left-out bytes are the row's last.
    """

    def __init__(self, into_BT, n_patches):
        super().__init__(into_BT, n_patches)
        if runs_triton(into_BT.device):
            B, T = into_BT.shape
            row_B1 = torch.arange(B, device=into_BT.device)[:, None]
            self.begins = first_positions((into_BT + row_B1 * n_patches).flatten(), B * n_patches)
            # A row's left-out bytes have the number of the next row's first patch, which begins later.
            first_of_row_M = (row_B1 * T).expand(B, n_patches).flatten().int()
            self.first = torch.maximum(self.begins[:-1], first_of_row_M)


def first_positions(numbers_N, n_numbers):
    """Where each number 0 to n_numbers - 1 begins in a non-decreasing numbers_N, and N: int32 [n_numbers + 1].

    Example: 0 0 2 2 2 with 4 numbers gives 0 2 2 5 5. A number that does not occur begins where it would be.
    """
    all_numbers = torch.arange(n_numbers + 1, device=numbers_N.device, dtype=numbers_N.dtype)
    return torch.searchsorted(in_memory(numbers_N), all_numbers, out_int32=True)


def attend_to_patches(q_BTHK, key_BPkHK, value_BPkHK, read_N):
    """Each byte attends to the k vectors of the patch that it reads: [B, T, H, K].

    read_N: int64, non-decreasing, the number of that patch among all B * P of the batch, `PatchMap.read`.
    """
    q_NHK = q_BTHK.flatten(0, 1)
    key_MkHK = key_BPkHK.flatten(0, 1)
    value_MkHK = value_BPkHK.flatten(0, 1)
    if runs_triton(read_N.device):
        begins = first_positions(read_N, key_MkHK.shape[0])
        attended_NHK = apply_function(triton_kernels.AttentionToPatches, q_NHK, key_MkHK, value_MkHK, begins)
    else:
        attended_NHK = apply_function(GatherAttention, q_NHK, key_MkHK, value_MkHK, read_N)
    return attended_NHK.unflatten(0, q_BTHK.shape[:2])


def check_patch_lengths(patch_lengths_BP, n_ids):
    """Raise ValueError unless the model can read these patches without seeing the future.

    Each row's lengths must be positive, with zeros on the right only, and sum to n_ids = T + 1, the
    row's inputs and its last target. The first length must be 1: a byte reads the newest complete
    patch, so a longer first patch would have to be read before it is complete.

    It reads values, which would make a GPU wait: call it where rows are made, not in compiled code.
    """
    lengths = torch.as_tensor(patch_lengths_BP)
    if lengths.dim() != 2 or lengths.is_floating_point():
        found = f"{lengths.dtype} {list(lengths.shape)}"
        raise ValueError(f"patch_lengths must be integers [B, P], not {found}")
    if lengths.shape[1] == 0 or not bool((lengths[:, :1] == 1).all()):
        raise ValueError("the first patch of a row must have length 1: the document boundary or a single byte")
    if bool((lengths < 0).any()):
        raise ValueError("patch lengths must not be negative")
    is_after_zero = (lengths[:, 1:] > 0) & (lengths[:, :-1] == 0)
    if bool(is_after_zero.any()):
        raise ValueError("zero patch lengths must be at the right end of a row, as unused slots")
    sums = lengths.sum(dim=1)
    if not bool((sums == n_ids).all()):
        raise ValueError(
            f"patch lengths must sum to {n_ids}, the ids of a row with its last target, not to {sums.tolist()}"
        )
