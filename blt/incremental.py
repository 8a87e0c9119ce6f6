"""Read text step by step with a trained BLT: caches make each new byte cost the same at every position.

The logits equal those of a full pass over the text (`BLTModel.forward`), up to rounding. This is not a
script; generate.py and compress.py use it.

A batch has B rows, each row is one text, and the reader caches for each row:

    entropy model, encoder, decoder   keys and values of the last window of bytes (`LayerCaches`)
    latent transformer                keys and values of all patches
    open patch                        the encoder states of its bytes
    newest complete patch             its latent state, which the decoder reads
    n-grams                           the newest ids (`NgramHashes`)
    patch n-grams                     hashes from the starts of the newest patches (`SpanHashes`)
    patch rule                        the state of `OnlineStarts`

A step reads up to MAX_STEP ids of each row. It has three parts:

    find_patch_ends   The entropy model and the patch rule read the ids and mark those that end a patch.
    advance           The encoder reads the ids. The latent transformer reads the patches that they
                      complete. The decoder returns the logits after each id.
    commit            The first ids of the step, all or fewer, become part of the row. The reader
                      forgets the others: they were drafts that the BLT has rejected.

Example with the patch rule `space`. The row holds "^The c", where "^" is the document boundary, which is
always a patch of its own. So "^" and "The " are complete patches, and "c" is the open patch. A step
reads "at s":

    new id                 a      t      ' '    s
    does it end a patch?   no     no     yes    no     the latent transformer reads the patch "cat "
    the decoder reads      The    The    cat    cat    the newest patch that is complete at this id
    open patch             ca     cat    -      s      the step leaves "s" open
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from blt.attention import apply_rotary, rotary_cos_sin
from blt.device import autocast
from blt.entropies import entropy_of
from blt.ids import BOUNDARY
from blt.ngrams import NgramHashes, SpanHashes
from blt.patch_rules import OnlineStarts, check_finite
from blt.replay import Replayed, can_record, send
from blt.segments import OpenPatches

MAX_STEP = 128  # ids that a row reads in one step, at most
# The least room for the bytes of an open patch. It doubles as the patch grows.
OPEN_COLUMNS = 16
# The arrays of `LayerCaches.plan` that every `CachedAttentionPlan` has.
PLAN = ("positions", "slots", "is_visible")


class LayerCaches:
    """Keys and values of one stack's layers for B rows. The keys have their rotary embedding already.

    A layer holds two tensors [B, H, S, K], keys and values. Position p is in slot p % S. With a window
    the slots are a ring: new positions overwrite the oldest. Without one S grows by doubling.

    window: positions that a query sees, itself included; None: all positions before it as well.
    """

    def __init__(self, n_layers, n_rows, n_heads, head_dim, theta, window=None):
        self.n_rows = n_rows
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.theta = theta
        self.window = window
        # A step writes up to MAX_STEP positions, and may roll them back. With MAX_STEP slots beyond the
        # window they overwrite nothing that a later query still needs.
        self.n_slots = 64 if window is None else window + MAX_STEP
        self.cos_sin = None
        # A layer is allocated at its first use, in the precision of its first keys and values.
        self.layers = [None] * n_layers

    def plan(self, begin_B, N, device, rows=None, round_sizes=False):
        """What a `CachedAttentionPlan` is made of, for N new positions of each row, the first of them at begin_B.

        rows: int array, the rows that take part (begin_B is about these); None: all rows.
        round_sizes: without a window, attend to a power of 2 of slots, so that few different shapes occur.
        Returns a dict of arrays: positions [B, N], slots [B * N * H], is_visible [B, 1, N, S], and rows if given.
        """
        # NumPy instead of torch here: these are many operations on few numbers.
        positions_BN = begin_B[:, None] + np.arange(N)
        n_used = self.n_slots
        if self.window is None:
            # A cache that grows is used from slot 0 to the newest position; a ring is used as a whole.
            n_used = int(begin_B.max()) + N
            if round_sizes:
                n_used = rounded_up(n_used, 64)
            self._grow_to(n_used)
        self._make_angles(int(positions_BN.max()), device)
        row_numbers = np.arange(len(begin_B)) if rows is None else rows
        arrays = {
            "positions": positions_BN,
            "slots": self._slots_to_write(positions_BN, row_numbers).ravel(),
            "is_visible": self._visible_slots(positions_BN, n_used)[:, None],
        }
        return arrays if rows is None else arrays | {"rows": rows}

    def _slots_to_write(self, positions_BN, row_numbers):
        """Where the new positions go in a cache that is viewed as [B * H * S, K]: int64 [B, N, H]."""
        head_BH = row_numbers[:, None] * self.n_heads + np.arange(self.n_heads)
        slot_BN = positions_BN % self.n_slots
        return head_BH[:, None, :] * self.n_slots + slot_BN[:, :, None]

    def _visible_slots(self, positions_BN, n_used):
        """Which of the first n_used slots each new position attends to: bool [B, N, n_used]."""
        newest_B1 = positions_BN[:, -1:]
        # The position that each slot holds, if it was written in order. A slot past the newest position
        # counts as one of the previous round of the ring, or as negative: so positions that were rolled
        # back, and those of an earlier document, are invisible.
        held_BS = newest_B1 - (newest_B1 - np.arange(n_used)) % self.n_slots
        held_B1S = held_BS[:, None, :]
        query_BN1 = positions_BN[:, :, None]
        is_visible_BNS = (held_B1S >= 0) & (held_B1S <= query_BN1)
        if self.window is not None:
            is_visible_BNS &= held_B1S > query_BN1 - self.window
        return is_visible_BNS

    def _grow_to(self, n_needed):
        """Double the slots, or more, if there are fewer than n_needed."""
        if n_needed <= self.n_slots:
            return
        n_more = max(self.n_slots, n_needed - self.n_slots)
        for number, keys_values in enumerate(self.layers):
            if keys_values is not None:
                self.layers[number] = [F.pad(x_BHSK, (0, 0, 0, n_more)) for x_BHSK in keys_values]
        self.n_slots += n_more

    def _make_angles(self, newest, device):
        """Make or double the table of rotary angles, `rotary_cos_sin` [positions, 1, K / 2, 2], up to this position."""
        if self.cos_sin is None or newest >= len(self.cos_sin):
            # Enough for most rows: a table that has moved makes recorded steps be recorded again.
            n_positions = rounded_up(newest + 1, 4096)
            positions_T = torch.arange(n_positions, device=device)
            self.cos_sin = rotary_cos_sin(positions_T, self.head_dim, self.theta)

    def layer(self, number, k_BNHK, v_BNHK):
        """The cached [keys, values] of a layer, allocated like these new ones at the first use."""
        if self.layers[number] is None:
            shape = (self.n_rows, self.n_heads, self.n_slots, self.head_dim)
            self.layers[number] = [k_BNHK.new_zeros(shape), v_BNHK.new_zeros(shape)]
        return self.layers[number]

    def buffers(self):
        """All tensors, which stay where they are until they grow."""
        tensors = [] if self.cos_sin is None else [self.cos_sin]
        for keys_values in self.layers:
            tensors += keys_values or []
        return tensors


class CachedAttentionPlan:
    """An `AttentionPlan` for new positions that attend to cached ones and to each other.

    It is made once a step and stack, and shared by the layers of the stack.
    """

    def __init__(self, caches, positions, slots, is_visible, rows=None):
        """The tensors are the arrays of `LayerCaches.plan`."""
        self.caches = caches
        self.cos_sin = caches.cos_sin[positions]
        self.slots = slots
        self.is_visible = is_visible
        self.rows = rows
        self.bias_M1S = None

    def attend(self, q_BNHK, k_BNHK, v_BNHK, past):
        """Cache the new keys and values, then attend to all visible ones. Returns [B, N, H, K].

        past: the number of the layer.
        """
        q_BNHK = apply_rotary(q_BNHK, self.cos_sin)
        k_BNHK = apply_rotary(k_BNHK, self.cos_sin)
        keys_values = []
        for cached_BHSK, new_BNHK in zip(self.caches.layer(past, k_BNHK, v_BNHK), (k_BNHK, v_BNHK)):
            new_MK = new_BNHK.to(cached_BHSK.dtype).flatten(0, 2)
            cached_BHSK.view(-1, self.caches.head_dim).index_copy_(0, self.slots, new_MK)
            of_rows = cached_BHSK if self.rows is None else cached_BHSK[self.rows]
            keys_values.append(of_rows[:, :, : self.is_visible.shape[-1]])
        q_BHNK = q_BNHK.transpose(1, 2)
        if q_BHNK.shape[2] > 1:
            out_BHNK = F.scaled_dot_product_attention(q_BHNK, *keys_values, attn_mask=self.is_visible)
        else:
            out_BHNK = self._attend_from_one(q_BHNK, *keys_values)
        return out_BHNK.transpose(1, 2)

    def _attend_from_one(self, q_BH1K, k_BHSK, v_BHSK):
        """Attention of one position of each row. torch's kernels with a mask are slow for it on a GPU."""
        B, H = q_BH1K.shape[:2]
        if self.bias_M1S is None:
            # The layers of a stack share it. One row of it for each head, as the product below wants.
            bias_B11S = torch.where(self.is_visible, 0.0, -torch.inf).to(q_BH1K.dtype)
            self.bias_M1S = bias_B11S.expand(-1, H, -1, -1).flatten(0, 1)
        q_M1K, k_MSK, v_MSK = q_BH1K.flatten(0, 1), k_BHSK.flatten(0, 1), v_BHSK.flatten(0, 1)
        scores_M1S = torch.baddbmm(self.bias_M1S, q_M1K, k_MSK.mT, alpha=q_M1K.shape[-1] ** -0.5)
        return torch.bmm(scores_M1S.softmax(-1), v_MSK).unflatten(0, (B, H))


def caches_of_stack(config, part, n_rows):
    """`LayerCaches` for one stack of a `BLTConfig`: "encoder", "global" (latent transformer) or "decoder"."""
    n_layers = getattr(config, f"{part}_layers")
    n_heads = config.heads(part)
    head_dim = getattr(config, f"{part}_dim") // n_heads
    window = None if part == "global" else config.window
    return LayerCaches(n_layers, n_rows, n_heads, head_dim, config.rope_theta, window)


def caches_of_entropy_model(config, n_rows):
    """`LayerCaches` for an `EntropyConfig`."""
    head_dim = config.d_model // config.n_heads
    return LayerCaches(config.n_layers, n_rows, config.n_heads, head_dim, config.rope_theta, config.max_seq_len)


def named(part, arrays):
    """The arrays with the part before their names, as in "encoder slots"."""
    return {f"{part} {name}": array for name, array in arrays.items()}


def take(tensors, names, part=None):
    """The tensors of these names; of this part."""
    return [tensors[name if part is None else f"{part} {name}"] for name in names]


def rounded_up(n, least):
    """The smallest power of 2, of `least` and above, that is n or more. least: a power of 2."""
    return max(least, 1 << (n - 1).bit_length())


def is_counted(counts_B, N):
    """bool [B, N]: the first counts_B of N columns. Counts 2 and 0 of 3 give [1, 1, 0] and [0, 0, 0]."""
    return np.arange(N) < counts_B[:, None]


def last_true(flags_BN):
    """Column of the last True of each row, -1 where there is none. 0, 1, 1, 0 gives 2."""
    last_B = flags_BN.shape[1] - 1 - flags_BN[:, ::-1].argmax(axis=1)
    return np.where(flags_BN.any(axis=1), last_B, -1)


@dataclass
class Step:
    """What `advance` has computed and `commit` needs."""

    ids_BN: np.ndarray  # the new ids
    released_BT: np.ndarray  # they and the recent ones before them, for `NgramHashes`
    is_end_BN: np.ndarray  # bool, the ids that end a patch
    latents_BPG: torch.Tensor  # patch 0: the newest before the step; then those that it completes
    span_states: np.ndarray | None  # of `SpanHashes`, before and after each id


class IncrementalBLT:
    """B rows of text, read step by step by a BLT and its entropy model.

    extend(ids)                        read ids and get the logits of what follows each
    find_patch_ends, advance, commit   the same in three parts, for ids that may be rejected (drafts)

    A boundary (256) must be a row's first id in a step. It begins a new document, for which nothing
    before it matters. Rows are independent: in one step each may read a different number of ids.

    context_bytes: the most ids in a row of the model, None for no limit. A full row restarts with the
        last half of its ids, as `rows.evaluation_batches` reads long documents. The entropy model and
        the patch rule do not restart: they see the whole document.
    precision: fp32, or bf16/fp16. Only in fp32 are results equal for all batch and step sizes.
    """

    def __init__(self, model, patcher, n_rows=1, context_bytes=None, precision="fp32"):
        if context_bytes is not None and context_bytes < 2:
            raise ValueError(f"context_bytes is {context_bytes}; it must be 2 or more, or None")
        config = model.config
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.n_rows = n_rows
        self.context_bytes = context_bytes
        self.precision = precision
        self.rule = OnlineStarts(patcher.config, n_rows)
        # In fp32 only: autocast keeps copies of weights, which a recording would not find again.
        self.may_record = precision == "fp32" and can_record(self.device)
        self.entropy_pass = Replayed(self.device)
        self.blt_pass = Replayed(self.device)
        self.caches = {}
        for part in ("encoder", "global", "decoder"):
            self.caches[part] = caches_of_stack(config, part, n_rows)
        self.entropy_model = patcher.entropy_model if patcher.config.needs_entropies else None
        if self.entropy_model is not None:
            self.entropy_model.eval()
            self.caches["entropy"] = caches_of_entropy_model(self.entropy_model.config, n_rows)

        # The document: what the entropy model and the patch rule read. Drafts let them read n_ahead ids
        # before these are committed. rule_states has the rule's state before and after each of them.
        self.document_length = np.zeros(n_rows, np.int64)
        self.n_ahead = np.zeros(n_rows, np.int64)
        self.rule_states = []

        # The row: what the BLT reads. It is the whole document until it is full and restarts.
        self.row_length = np.zeros(n_rows, np.int64)
        self.n_patches = np.zeros(n_rows, np.int64)
        self.newest_latent_BG = torch.zeros(n_rows, config.global_dim, device=self.device)
        if context_bytes is not None:
            # They grow with the text: a context may be far longer than any text.
            self.row_ids = np.zeros((n_rows, min(context_bytes, 256)), np.int64)
            self.row_is_end = np.zeros(self.row_ids.shape, bool)
            self.restart_length = context_bytes - max(1, context_bytes // 2)

        # The open patch: its bytes, and for each cross-attention their states [B, capacity, D].
        self.open_length = np.zeros(n_rows, np.int64)
        dtype = model.head.weight.dtype
        open_states_BCD = torch.zeros(n_rows, OPEN_COLUMNS, config.encoder_dim, dtype=dtype, device=self.device)
        self.open_states = [open_states_BCD.clone() for _ in model.encoder.cross_attentions]

        self.ngrams = NgramHashes([*config.ngram_sizes, *config.gate_ngrams], n_rows)
        self.spans = SpanHashes(config.patch_ngrams, n_rows) if config.patch_ngrams else None
        self.step = None

    def step_limits(self):
        """How many ids each row can read in the next step: int64 [B], from 1 to MAX_STEP."""
        if self.context_bytes is None:
            return np.full(self.n_rows, MAX_STEP)
        n_left_B = self.context_bytes - self.row_length
        # A full row restarts before it reads on, and then has room again.
        n_left_B = np.where(n_left_B > 0, n_left_B, self.context_bytes - self.restart_length)
        return np.minimum(MAX_STEP, n_left_B)

    def prefill(self, texts):
        """Read arrays of ids of any length, one for each row, in as many steps as they need.

        Returns float32 logits [B, 257] of what follows each text; zeros for an empty one.
        """
        n_done_B = np.zeros(self.n_rows, np.int64)
        logits_BV = torch.zeros(self.n_rows, self.model.n_classes, device=self.device)
        lengths_B = np.array([len(text) for text in texts])
        while (n_done_B < lengths_B).any():
            counts_B = np.minimum(lengths_B - n_done_B, self.step_limits())
            ids_BN = np.zeros((self.n_rows, counts_B.max()), np.int64)
            for row, text in enumerate(texts):
                begin = n_done_B[row]
                count = counts_B[row]
                ids_BN[row, :count] = text[begin : begin + count]
            new_logits_BNV = self.extend(ids_BN, counts_B)
            rows = np.flatnonzero(counts_B)
            logits_BV[rows] = new_logits_BNV[rows, counts_B[rows] - 1].float()
            n_done_B += counts_B
        return logits_BV

    def extend(self, ids_BN, counts_B=None):
        """Read the first counts_B ids of each row (None: all N) in one step.

        Counts must not exceed `step_limits`. Returns logits [B, N, 257], undefined beyond the counts. On CUDA
        the next step overwrites them.
        """
        if counts_B is None:
            counts_B = np.full(self.n_rows, ids_BN.shape[1])
        is_end_BN, _ = self.find_patch_ends(ids_BN, counts_B)
        logits_BNV = self.advance(ids_BN, is_end_BN, counts_B)
        self.commit(counts_B)
        return logits_BNV

    # --------------------------------------------------- first part of a step: where patches end

    @torch.no_grad()
    def find_patch_ends(self, ids_BN, counts_B):
        """Read the first counts_B ids of each row with the entropy model and the patch rule.

        A patch ends where the next byte starts a new one. The rule decides that from the bytes before
        that next byte, so the end is known as soon as the patch's last byte has been read. This method
        may be called several times in one step, to draft byte by byte.

        Returns is_end, bool [B, N], False beyond the counts; and the entropy model's logits [B, N, 256],
        None without one. Raises ValueError for more ids than `step_limits`, and for a document that
        does not begin with a boundary.
        """
        self._check_ids(ids_BN, counts_B)
        self._start_documents((ids_BN[:, 0] == BOUNDARY) & (counts_B > 0))
        logits_BNV, entropies_BN = None, None
        if self.entropy_model is not None:
            logits_BNV, entropies_BN = self._read_with_entropy_model(ids_BN)

        if not self.rule_states:
            self.rule_states.append(self.rule.copy_state())
        is_read_BN = is_counted(counts_B, ids_BN.shape[1])
        is_end_BN = np.zeros(ids_BN.shape, bool)
        for n in range(ids_BN.shape[1]):
            entropies_B = None if entropies_BN is None else entropies_BN[:, n]
            is_end_BN[:, n] = self.rule.step(entropies_B, ids_BN[:, n], is_read_BN[:, n])
            self.rule_states.append(self.rule.copy_state())
        self.n_ahead = self.n_ahead + counts_B
        return is_end_BN, logits_BNV

    def _check_ids(self, ids_BN, counts_B):
        """Raise ValueError for ids that this step cannot read."""
        B, N = ids_BN.shape
        if B != self.n_rows or N == 0 or (self.n_ahead + counts_B > self.step_limits()).any():
            room = f"{self.n_rows} rows with room for {self.step_limits().tolist()} ids"
            raise ValueError(f"ids of {list(ids_BN.shape)} do not fit {room}")
        is_boundary_BN = (ids_BN == BOUNDARY) & is_counted(counts_B, N)
        if is_boundary_BN[:, 1:].any() or (is_boundary_BN[:, 0] & (self.n_ahead > 0)).any():
            raise ValueError("a boundary begins a document: it must be the first id of its row in a step")
        begins_document_B = (self.document_length + self.n_ahead == 0) & (counts_B > 0)
        if (begins_document_B & ~is_boundary_BN[:, 0]).any():
            raise ValueError("a document begins with a boundary (256)")

    def _start_documents(self, is_new_B):
        """Forget the text of these rows."""
        # The caches need no clearing: from position 0 on, what they hold is invisible.
        self._start_rows(is_new_B)
        self.document_length[is_new_B] = 0
        self.rule.reset(is_new_B)

    def _start_rows(self, is_new_B):
        """Forget what these rows of the model hold."""
        for values_B in (self.row_length, self.n_patches, self.open_length):
            values_B[is_new_B] = 0
        self.ngrams.recent[is_new_B] = 0
        if self.spans is not None:
            self.spans.state[is_new_B] = 0

    def _read_with_entropy_model(self, ids_BN):
        """Of the byte after each id: logits [B, N, 256], and entropies [B, N] in nats as a NumPy array."""
        begin_B = self.document_length + self.n_ahead
        plan = self.caches["entropy"].plan(begin_B, ids_BN.shape[1], self.device)
        arrays = {"ids": ids_BN} | plan
        buffers = self.caches["entropy"].buffers()
        with autocast(self.device, self.precision):
            logits_BNV, entropies_BN = self.entropy_pass(self._entropy_pass, arrays, buffers, self._records(ids_BN))
        entropies = entropies_BN.cpu().numpy()
        check_finite(entropies)
        return logits_BNV, entropies

    def _entropy_pass(self, tensors):
        """What the device does in `_read_with_entropy_model`."""
        plan = CachedAttentionPlan(self.caches["entropy"], *take(tensors, PLAN))
        logits_BNV = self.entropy_model.read(tensors["ids"], plan, self._layer_numbers("entropy"))
        return logits_BNV, entropy_of(logits_BNV)

    def _records(self, ids_BN):
        """Whether a step of this shape is worth recording: that of text being written, a byte of each row."""
        return self.may_record and ids_BN.shape[1] == 1

    def _blt_buffers(self):
        """The tensors that `_blt_pass` reads and writes beside its arguments."""
        tensors = [self.newest_latent_BG, *self.open_states]
        for part in ("encoder", "global", "decoder"):
            tensors += self.caches[part].buffers()
        return tensors

    def _layer_numbers(self, part):
        """What each layer of a stack hands to `CachedAttentionPlan.attend` as its past: its number."""
        return range(len(self.caches[part].layers))

    # ------------------------------------------------------ second part: the logits after each id

    @torch.no_grad()
    def advance(self, ids_BN, is_end_BN, counts_B):
        """Read all ids of the step with the BLT, once. Returns logits [B, N, 257] after each id.

        is_end_BN: from `find_patch_ends`. The ids are part of the row only after `commit`.
        """
        # Padding ids, those beyond the counts, are computed as well. They must not end patches. All else
        # that they write is overwritten by the next step before it becomes visible.
        is_end_BN = is_end_BN & is_counted(counts_B, ids_BN.shape[1])
        with autocast(self.device, self.precision):
            if self.context_bytes is not None:
                self._restart_rows(self.row_length + counts_B > self.context_bytes)
            logits_BNV, self.step = self._read_with_blt(ids_BN, is_end_BN)
        return logits_BNV

    def _read_with_blt(self, ids_BN, is_end_BN):
        """One pass of the BLT over new ids: logits [B, N, 257] and the `Step`."""
        B, N = ids_BN.shape
        record = self._records(ids_BN)
        arrays = {"ids": ids_BN}
        for part in ("encoder", "decoder"):
            arrays |= named(part, self.caches[part].plan(self.row_length, N, self.device))
        config = self.model.config
        hashes_BNS, released_BT = self.ngrams.read(ids_BN)
        hashes_BNS, gate_hashes_BNS = np.split(hashes_BNS, [len(config.ngram_sizes)], axis=2)
        span_states = None
        if self.spans is not None:
            spans_BNS, span_states = self.spans.read(ids_BN, is_end_BN)
            hashes_BNS = np.concatenate((hashes_BNS, spans_BNS), axis=2)
        if config.n_embedding_tables:
            arrays["hashes"] = hashes_BNS % config.hash_rows
        if config.gate_ngrams:
            arrays["gate hashes"] = gate_hashes_BNS % config.hash_rows
        arrays["open_slots"] = self._open_slots(N)
        n_complete_B = is_end_BN.sum(axis=1)
        P = int(n_complete_B.max(initial=0))
        if P > 0:
            # Rows that complete no patch stay out of the latent transformer, the most expensive part. A recording
            # has all rows in it: they cost a GPU nothing, and other numbers of rows would be other recordings.
            rows = np.arange(B) if record else np.flatnonzero(n_complete_B)
            # With all rows, None instead of their numbers saves a copy of the cached keys and values.
            chosen = None if len(rows) == B else rows
            arrays["patch_of_column"] = self._patches_of_open_states(is_end_BN, rows, P, record)
            plan = self.caches["global"].plan(self.n_patches[rows], P, self.device, chosen, record)
            arrays |= named("global", plan)
        # Patch 0 of the latents is the newest one before the step. So an id reads the patch whose number
        # is the count of patch ends up to it. An id that ends a patch reads that very patch.
        newest_patch_BN = np.cumsum(is_end_BN, axis=1)
        arrays["read"] = (newest_patch_BN + np.arange(B)[:, None] * (1 + P)).flatten()
        logits_BNV, latents_BPG = self.blt_pass(self._blt_pass, arrays, self._blt_buffers(), record)
        return logits_BNV, Step(ids_BN, released_BT, is_end_BN, latents_BPG, span_states)

    def _blt_pass(self, tensors):
        """What the device does in `_read_with_blt`, in the order of `BLTModel.forward`."""
        ids_BN = tensors["ids"]
        ngrams_BND = None
        if "hashes" in tensors:
            ngrams_BND = self.model.encoder.hash_embedding.sums(tensors["hashes"])
        plan = CachedAttentionPlan(self.caches["encoder"], *take(tensors, PLAN, "encoder"))
        states = self.model.encoder.byte_states(ids_BN, ngrams_BND, plan, self._layer_numbers("encoder"))
        # Behind the states of the open patches.
        for kept_BCD, new_BND in zip(self.open_states, states):
            new_MD = new_BND.flatten(0, 1).to(kept_BCD.dtype)
            kept_BCD.flatten(0, 1).index_copy_(0, tensors["open_slots"], new_MD)
        latents_BPG = self.newest_latent_BG[:, None]
        if "patch_of_column" in tensors:
            latents_BPG = self._complete_patches(tensors, latents_BPG)
        gates_BND = None
        if "gate hashes" in tensors:
            gates_BND = self.model.decoder.gate_embedding.sums(tensors["gate hashes"])
        plan = CachedAttentionPlan(self.caches["decoder"], *take(tensors, PLAN, "decoder"))
        layers = self._layer_numbers("decoder")
        out_BND = self.model.decoder(states[-1], latents_BPG, plan, tensors["read"], gates_BND, layers)
        return self.model.logits(out_BND), latents_BPG

    def _complete_patches(self, tensors, old_B1G):
        """Latent states [B, 1 + P, G] of the newest patch before the step and of the P that it completes.

        A row that completes fewer has undefined states at its end.
        """
        patch_of_column_RC = tensors["patch_of_column"]
        rows = tensors.get("global rows")
        index = slice(None) if rows is None else rows
        n_columns = patch_of_column_RC.shape[1]
        P = tensors["global positions"].shape[1]
        open_states = [kept_BCD[index, :n_columns] for kept_BCD in self.open_states]
        vectors_BPkD = self.model.encoder.patch_vectors(open_states, OpenPatches(patch_of_column_RC, P))
        plan = CachedAttentionPlan(self.caches["global"], *take(tensors, PLAN, "global"), rows)
        new_BPG = self.model.latent(vectors_BPkD, plan, self._layer_numbers("global"))
        empty_BPG = old_B1G.new_zeros(self.n_rows, P, new_BPG.shape[2])
        latents_BPG = torch.cat((old_B1G, empty_BPG), dim=1)
        latents_BPG[index, 1:] = new_BPG.to(latents_BPG.dtype)
        return latents_BPG

    def _open_slots(self, N):
        """Where the states of N new bytes go, behind those of the open patches: int64 [B * N] of B * capacity."""
        n_needed = int(self.open_length.max()) + N
        old_capacity = self.open_states[0].shape[1]
        # It doubles: the patch will grow further, and growing copies.
        capacity = max(old_capacity, rounded_up(n_needed, OPEN_COLUMNS))
        if capacity > old_capacity:
            n_more = capacity - old_capacity
            self.open_states = [F.pad(kept_BCD, (0, 0, 0, n_more)) for kept_BCD in self.open_states]
        columns_BN = self.open_length[:, None] + np.arange(N)
        return (np.arange(self.n_rows)[:, None] * capacity + columns_BN).flatten()

    def _patches_of_open_states(self, is_end_BN, rows, P, round_sizes=False):
        """The patch of the step, 0 to P - 1, that each open state belongs to; P: to none that is complete.

        Returns int64 [rows, columns], with enough columns for the complete patches of every row.
        Example: an open patch of 2 bytes, then 4 new ids, of which 1 and 2 end patches: 0 0 0 0 1.
        round_sizes: a power of 2 of columns, so that few different shapes occur.
        """
        N = is_end_BN.shape[1]
        is_end_RN = is_end_BN[rows]
        open_length_R1 = self.open_length[rows, None]
        n_columns = int((self.open_length[rows] + last_true(is_end_RN)).max()) + 1
        if round_sizes:
            n_columns = rounded_up(n_columns, OPEN_COLUMNS)
        # The first columns are bytes of earlier steps (below 0 here), the others are ids of this step.
        new_id_RC = np.arange(n_columns) - open_length_R1
        patch_of_id_RN = np.cumsum(is_end_RN, axis=1) - is_end_RN
        patch_RC = np.take_along_axis(patch_of_id_RN, new_id_RC.clip(0, N - 1), axis=1)
        patch_RC = np.where(new_id_RC < 0, 0, patch_RC)
        n_complete_R1 = is_end_RN.sum(axis=1)[:, None]
        is_complete_RC = (patch_RC < n_complete_R1) & (new_id_RC < N)
        return np.where(is_complete_RC, patch_RC, P)

    def _restart_rows(self, is_full_B):
        """Let these full rows restart with the last half of their ids.

        Example: context_bytes is 8, and the next id is "i".
            abcdefgh     the row is full
                efgh     it restarts: the BLT reads these ids again, at positions 0 to 3
                efghi    the row goes on

        Patches stay as they were, but the first id becomes a patch of its own, as in every row.
        """
        if not is_full_B.any():
            return
        # A full row has grown to context_bytes.
        ids_BT = self.row_ids[:, -self.restart_length :].copy()
        is_end_BT = self.row_is_end[:, -self.restart_length :].copy()
        is_end_BT[:, 0] = True
        is_end_BT &= is_full_B[:, None]
        self._start_rows(is_full_B)
        # The entropy model and the rule take no part: they have read these ids and go on after them.
        for begin in range(0, self.restart_length, MAX_STEP):
            end = min(begin + MAX_STEP, self.restart_length)
            _, step = self._read_with_blt(ids_BT[:, begin:end], is_end_BT[:, begin:end])
            # The other rows read these ids as padding: none of them counts.
            self._append_to_rows(step, np.where(is_full_B, end - begin, 0))

    # ------------------------------------------------------- third part: which ids become text

    @torch.no_grad()
    def commit(self, counts_B):
        """Make the first counts_B ids of the step part of the rows, and forget the others."""
        # The caches need no roll back: they hold positions, and the next step writes the same ones.
        if (self.n_ahead != counts_B).any():
            self._roll_back_rule(counts_B)
        self.document_length = self.document_length + counts_B
        self.n_ahead = np.zeros(self.n_rows, np.int64)
        self.rule_states = []
        self._append_to_rows(self.step, counts_B)

    def _roll_back_rule(self, counts_B):
        """Give each row of the patch rule the state that it had after counts_B ids of the step."""
        rows = np.arange(self.n_rows)
        for name in self.rule.state:
            states_NB = np.stack([state[name] for state in self.rule_states])
            self.rule.state[name] = states_NB[counts_B, rows]

    def _append_to_rows(self, step, counts_B):
        """Make the first counts_B ids of a step part of the model's rows."""
        B, N = step.ids_BN.shape
        is_end_BN = step.is_end_BN & is_counted(counts_B, N)
        n_complete_B = is_end_BN.sum(axis=1)
        if n_complete_B.any():
            numbers = send({"rows": np.arange(B), "newest_patches": n_complete_B}, self.device)
            # In place, because recordings read it where it is.
            self.newest_latent_BG.copy_(step.latents_BPG[numbers["rows"], numbers["newest_patches"]])
        self.ngrams.keep(step.released_BT, counts_B)
        self._drop_complete_patches(is_end_BN, counts_B)
        if self.context_bytes is not None:
            # For the restart of a full row, which reads its last half again.
            rows, columns = np.nonzero(is_counted(counts_B, N))
            positions = self.row_length[rows] + columns
            self._grow_rows_to(int((self.row_length + counts_B).max()))
            self.row_ids[rows, positions] = step.ids_BN[rows, columns]
            self.row_is_end[rows, positions] = is_end_BN[rows, columns]
        if self.spans is not None:
            self.spans.state = step.span_states[counts_B, np.arange(B)]
        self.row_length = self.row_length + counts_B
        self.n_patches = self.n_patches + n_complete_B

    def _grow_rows_to(self, n_needed):
        """Make room for n_needed ids in the rows: twice the room, or more, but at most context_bytes."""
        capacity = self.row_ids.shape[1]
        if n_needed > capacity:
            n_more = min(max(n_needed, 2 * capacity), self.context_bytes) - capacity
            self.row_ids = np.pad(self.row_ids, ((0, 0), (0, n_more)))
            self.row_is_end = np.pad(self.row_is_end, ((0, 0), (0, n_more)))

    def _drop_complete_patches(self, is_end_BN, counts_B):
        """Forget the encoder states of bytes whose patch is complete.

        The states after a row's last patch end are the new open patch. They move to the front.
        """
        last_end_B = last_true(is_end_BN)
        has_end_B = last_end_B >= 0
        begin_B = np.where(has_end_B, self.open_length + last_end_B + 1, 0)
        self.open_length = np.where(has_end_B, counts_B - last_end_B - 1, self.open_length + counts_B)
        if not ((begin_B > 0) & (self.open_length > 0)).any():
            return
        n_columns = int(self.open_length.max())
        source_BC = torch.from_numpy(begin_B[:, None] + np.arange(n_columns)).to(self.device)
        for kept_BCD in self.open_states:
            _, capacity, D = kept_BCD.shape
            # Rows with a shorter open patch copy columns that nobody reads, but that must exist.
            index_BC1 = source_BC.clamp(max=capacity - 1)[..., None]
            kept_BCD[:, :n_columns] = kept_BCD.gather(1, index_BC1.expand(-1, -1, D))
