"""A trained BLT read byte by byte: each step costs what its new bytes cost, and gives the logits of the full pass.

What is kept of each row of text (a document that is being written or read):
    entropy model, encoder, decoder   keys and values of the last window of bytes (`LayerCaches`)
    latent transformer                keys and values of all patches of the row; it runs only when a patch is complete
    the open patch                    its bytes' encoder states
    the newest patch                  its latent state, which the decoder reads
    the patch rule                    `OnlineStarts`

Rows keep their own pace: in one step each may read another number of bytes. Not a script; generate.py and compress.py use it.
"""

import numpy as np
import torch

from blt.attention import apply_rotary, rotary_cos_sin
from blt.device import autocast
from blt.entropies import entropy_of
from blt.ids import BOUNDARY
from blt.patch_rules import OnlineStarts
from blt.segments import Segments

CHUNK = 128  # ids that a row reads in one step, at most


class LayerCaches:
    """Keys (rotated) and values of a stack's layers for B rows, each layer two [B, H, S, K]; position p stands in slot p % S.

    window: positions that a query sees, itself included; S is then window + CHUNK, so that nothing a later query may need is overwritten
    by the ids of one step, not even by those that are taken back. None: all positions; S grows, doubling.
    """

    def __init__(self, n_layers, n_rows, n_heads, head_dim, theta, window=None):
        self.n_rows, self.n_heads, self.head_dim, self.theta, self.window = n_rows, n_heads, head_dim, theta, window
        self.slots = 64 if window is None else window + CHUNK
        self.cos_sin = None
        self.layers = [None] * n_layers  # made at their first use, in the precision of what they are to hold

    def plan(self, begins_B, N, rows, device):
        """A `CachedAttentionPlan` for N new positions, from begins_B on, of these rows (int64 array; None: all)."""
        if self.window is None and int(begins_B.max()) + N > self.slots:
            more = max(self.slots, int(begins_B.max()) + N - self.slots)
            self.layers = [
                layer and tuple(torch.nn.functional.pad(x, (0, 0, 0, more)) for x in layer) for layer in self.layers
            ]
            self.slots += more
        return CachedAttentionPlan(self, begins_B, N, rows, device)

    def cos_sin_at(self, positions_BN, device):
        """`rotary_cos_sin` of these positions, [B, N, 1, K / 2, 2], out of a table that grows by doubling."""
        if self.cos_sin is None or positions_BN.max() >= len(self.cos_sin):
            n = 1 << max(8, int(positions_BN.max()).bit_length())
            self.cos_sin = rotary_cos_sin(torch.arange(n, device=device), self.head_dim, self.theta)
        return self.cos_sin[torch.from_numpy(positions_BN).to(device)]


class CachedAttentionPlan:
    """Stands in for `layers.AttentionPlan` where new positions attend to cached ones. `past` is the number of the layer."""

    def __init__(self, caches, begins_B, N, rows, device):
        # NumPy, because these are many operations on few numbers.
        positions_BN, S = begins_B[:, None] + np.arange(N), caches.slots
        numbers = np.arange(len(begins_B)) if rows is None else rows
        places_BNH = (numbers[:, None, None] * caches.n_heads + np.arange(caches.n_heads)) * S + (positions_BN % S)[
            ..., None
        ]
        # The newest position that each slot may hold; slots of positions that were taken back count as long past.
        self.used = S if caches.window is not None else int(begins_B.max()) + N
        newest = positions_BN[:, -1:]
        held_BS = newest - (newest - np.arange(self.used)) % S
        visible_BNS = (held_BS[:, None] >= 0) & (held_BS[:, None] <= positions_BN[..., None])
        if caches.window is not None:
            visible_BNS &= held_BS[:, None] > positions_BN[..., None] - caches.window
        self.caches, self.cos_sin = caches, caches.cos_sin_at(positions_BN, device)
        self.rows = None if rows is None else torch.from_numpy(rows).to(device)
        self.places, self.visible = (
            torch.from_numpy(places_BNH.ravel()).to(device),
            torch.from_numpy(visible_BNS[:, None]).to(device),
        )

    def attend(self, q_BNHK, k_BNHK, v_BNHK, past, dropout=0.0):
        """Keep the new keys and values and attend to all that is visible. Nothing is dropped: this is not for training."""
        q, k = apply_rotary(q_BNHK, self.cos_sin), apply_rotary(k_BNHK, self.cos_sin)
        caches = self.caches
        if caches.layers[past] is None:
            shape = (caches.n_rows, caches.n_heads, caches.slots, caches.head_dim)
            caches.layers[past] = (k.new_zeros(shape), v_BNHK.new_zeros(shape))
        keys_values = []
        for cached, new in zip(caches.layers[past], (k, v_BNHK)):
            cached.view(-1, caches.head_dim).index_copy_(0, self.places, new.to(cached.dtype).flatten(0, 2))
            keys_values.append((cached if self.rows is None else cached[self.rows])[:, :, : self.used])
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), *keys_values, attn_mask=self.visible
        ).transpose(1, 2)


class IncrementalBLT:
    """B rows of text, read step by step by a BLT and its entropy model.

    extend(ids)             read ids, get the logits of what follows each
    find_closes, advance, commit   the same in three parts, for ids that may be taken back (self-speculation)

    The logits are those of `BLTModel` over the whole row, with patches made by the patcher, but for rounding. A boundary (256) may only
    be a row's first id in a step; it begins a new document, for which nothing before matters.

    context_bytes: ids in a row of the model, None for no limit. When so many are read, the row begins anew with the last half of
    them, as `rows.evaluation_batches` reads long documents; the entropies see the whole document all the same.
    precision: fp32, or bf16/fp16; equal results for other batches and step sizes can be had in fp32 only.
    """

    def __init__(self, model, patcher, n_rows=1, context_bytes=None, precision="fp32"):
        if context_bytes is not None and context_bytes < 2:
            raise ValueError(f"context_bytes is {context_bytes}; it must be 2 or more, or None")
        c, e = model.config, patcher.entropy_model if patcher.config.needs_entropies else None
        self.model, self.entropy_model, self.context_bytes, self.precision = model.eval(), e, context_bytes, precision
        self.n_rows, self.device = n_rows, next(model.parameters()).device
        self.rule = OnlineStarts(patcher.config, n_rows)
        self.caches = {
            part: LayerCaches(
                getattr(c, f"{part}_layers"), n_rows, c.heads(part), getattr(c, f"{part}_dim") // c.heads(part),
                c.rope_theta, None if part == "global" else c.window,
            )
            for part in ("encoder", "global", "decoder")
        }  # fmt: skip
        if e is not None:
            e.eval()
            c_e = e.config
            self.caches["entropy"] = LayerCaches(
                c_e.n_layers, n_rows, c_e.n_heads, c_e.d_model // c_e.n_heads, c_e.rope_theta, c_e.max_seq_len
            )
        self.document_length = np.zeros(n_rows, np.int64)  # ids that the entropy model has read of the document
        self.length = np.zeros(n_rows, np.int64)  # ids in the model's row
        self.patches = np.zeros(n_rows, np.int64)  # complete ones in the row
        self.open_length = np.zeros(n_rows, np.int64)  # bytes of the open patch
        longest = max(c.ngram_sizes, default=1)
        self.recent = torch.zeros(
            n_rows, longest - 1, dtype=torch.int64, device=self.device
        )  # the last ids, for the n-grams
        self.latent_BG = None  # of the newest complete patch
        self.open_states = None  # the open patch's encoder states, for each cross-attention [B, room, D]
        if context_bytes is not None:
            self.row_ids, self.row_closes = (
                np.zeros((n_rows, context_bytes), np.int64),
                np.zeros((n_rows, context_bytes), bool),
            )

    def room(self):
        """How many ids each row can read in the next step: int64 [B], at least 1."""
        if self.context_bytes is None:
            return np.full(self.n_rows, CHUNK)
        left = self.context_bytes - self.length
        return np.minimum(CHUNK, np.where(left > 0, left, self.context_bytes - self._kept_context()))

    def _kept_context(self):
        return self.context_bytes - max(1, self.context_bytes // 2)

    def prefill(self, texts):
        """Read arrays of ids of any length, one a row. Returns float32 logits [B, 257] of what follows each (zeros for an empty one)."""
        done, logits_BV = (
            np.zeros(self.n_rows, np.int64),
            torch.zeros(self.n_rows, self.model.n_classes, device=self.device),
        )
        lengths = np.array([len(text) for text in texts])
        while (done < lengths).any():
            counts = np.minimum(lengths - done, self.room())
            ids = np.zeros((self.n_rows, counts.max()), np.int64)
            for row, (text, begin, count) in enumerate(zip(texts, done, counts)):
                ids[row, :count] = text[begin : begin + count]
            new = self.extend(ids, counts)
            rows = np.flatnonzero(counts)
            logits_BV[rows] = new[rows, counts[rows] - 1].float()
            done += counts
        return logits_BV

    def extend(self, ids_BN, counts_B=None):
        """Read the first counts_B ids of each row (None: all N; at most `room`). Returns logits [B, N, 257]; those beyond the counts mean nothing."""
        counts_B = np.full(self.n_rows, ids_BN.shape[1]) if counts_B is None else counts_B
        closes_BN, _ = self.find_closes(ids_BN, counts_B)
        logits_BNV = self.advance(ids_BN, closes_BN, counts_B)
        self.commit(counts_B)
        return logits_BNV

    @torch.no_grad()
    def find_closes(self, ids_BN, counts_B):
        """Let the entropy model and the patch rule read ids: bool [B, N], which of them complete a patch; and logits [B, N, 256] or None."""
        B, N = ids_BN.shape
        is_read = np.arange(N) < counts_B[:, None]
        if B != self.n_rows or not N or (counts_B > self.room()).any():
            raise ValueError(
                f"ids of {list(ids_BN.shape)} do not fit {self.n_rows} rows with room for {self.room().tolist()} ids"
            )
        if ((ids_BN == BOUNDARY) & is_read)[:, 1:].any():
            raise ValueError("a boundary begins a document: it must be the first id of its row in a step")
        self._begin_documents((ids_BN[:, 0] == BOUNDARY) & (counts_B > 0))
        if ((self.document_length == 0) & (ids_BN[:, 0] != BOUNDARY) & (counts_B > 0)).any():
            raise ValueError("a document begins with a boundary (256)")
        logits_BNV, H = None, None
        if self.entropy_model is not None:
            plan = self.caches["entropy"].plan(self.document_length, N, None, self.device)
            with autocast(self.device, self.precision):
                logits_BNV = self.entropy_model.read(
                    torch.from_numpy(ids_BN).to(self.device), plan, range(len(self.entropy_model.blocks))
                )
            H = entropy_of(logits_BNV).cpu().numpy()
        closes = np.stack(
            [self.rule.step(None if H is None else H[:, i], ids_BN[:, i], is_read[:, i]) for i in range(N)], axis=1
        )
        self.document_length = self.document_length + counts_B
        return closes, logits_BNV

    def _begin_documents(self, is_new_B):
        for values in (self.document_length, self.length, self.patches, self.open_length):
            values[is_new_B] = 0
        self.rule.reset(is_new_B)

    @torch.no_grad()
    def advance(self, ids_BN, closes_BN, counts_B):
        """Logits [B, N, 257] after each id. Nothing counts as read before `commit`."""
        if self.context_bytes is not None:
            self._begin_rows_anew(self.length + counts_B > self.context_bytes)
        with autocast(self.device, self.precision):
            return self._advance(ids_BN, closes_BN & (np.arange(ids_BN.shape[1]) < counts_B[:, None]))

    def _advance(self, ids_BN, closes_BN):
        B, N = ids_BN.shape
        model, encoder, device = self.model, self.model.encoder, self.device
        layers = {part: range(len(caches.layers)) for part, caches in self.caches.items()}
        ids = torch.from_numpy(ids_BN).to(device)
        ngrams = None
        if encoder.hash_embedding is not None:
            before = self.recent.shape[1]
            is_in_row = torch.from_numpy(np.arange(-before, N) + self.length[:, None] >= 0).to(device)
            ngrams = encoder.hash_embedding(torch.cat((self.recent, ids), dim=1), is_in_row.long())[:, before:]
        states = encoder.byte_states(
            ids, ngrams, self.caches["encoder"].plan(self.length, N, None, device), layers["encoder"]
        )
        self._keep_open(states)

        closed = closes_BN.sum(1)
        rows = np.flatnonzero(closed)
        P = int(closed.max(initial=0))
        if self.latent_BG is None:
            self.latent_BG = torch.zeros(B, model.config.global_dim, device=device)
        latents_BPG = self.latent_BG[:, None]
        if P:
            last = N - 1 - closes_BN[rows, ::-1].argmax(1)
            width = int((self.open_length[rows] + last).max()) + 1
            place = np.arange(width) - self.open_length[rows, None]  # in this step's ids; below 0: read before
            patch = np.cumsum(closes_BN[rows], axis=1) - closes_BN[rows]
            into = np.where(place < 0, 0, np.take_along_axis(patch, place.clip(0, N - 1), 1))
            into = np.where((into < closed[rows, None]) & (place < N), into, P)
            of_rows = None if len(rows) == B else rows
            open_states = [x[:, :width] if of_rows is None else x[of_rows, :width] for x in self.open_states]
            vectors = encoder.patch_vectors(open_states, Segments(torch.from_numpy(into).to(device), P))
            new = model.latent(
                vectors, self.caches["global"].plan(self.patches[rows], P, of_rows, device), layers["global"]
            )
            latents_BPG = torch.cat((latents_BPG, new.new_zeros(B, P, new.shape[2]).to(latents_BPG.dtype)), dim=1)
            latents_BPG[slice(None) if of_rows is None else of_rows, 1:] = new.to(latents_BPG.dtype)
        reads = np.cumsum(closes_BN, axis=1) + np.arange(B)[:, None] * (P + 1)
        plan = self.caches["decoder"].plan(self.length, N, None, device)
        out = model.head(
            model.decoder(
                states[-1], latents_BPG, plan, torch.from_numpy(reads.flatten()).to(device), layers["decoder"]
            )
        )
        self.step = (ids_BN, ids, closes_BN, latents_BPG)
        return out

    def _keep_open(self, states):
        """Put the new bytes' states behind those of the open patches."""
        B, N = states[0].shape[:2]
        needed = int(self.open_length.max()) + N
        if self.open_states is None:
            self.open_states = [x.new_zeros(B, 2 * needed, x.shape[2]) for x in states]
        room = self.open_states[0].shape[1]
        if needed > room:
            self.open_states = [
                torch.nn.functional.pad(x, (0, 0, 0, max(room, needed - room))) for x in self.open_states
            ]
            room = self.open_states[0].shape[1]
        places = torch.from_numpy(
            (np.arange(B)[:, None] * room + self.open_length[:, None] + np.arange(N)).flatten()
        ).to(self.device)
        for kept, new in zip(self.open_states, states):
            kept.view(B * room, -1).index_copy_(0, places, new.flatten(0, 1).to(kept.dtype))

    @torch.no_grad()
    def commit(self, counts_B):
        """Count the first counts_B ids of the last `advance` as read, and forget the others."""
        ids_BN, ids, closes_BN, latents_BPG = self.step
        B, N = ids_BN.shape
        closes = closes_BN & (np.arange(N) < counts_B[:, None])
        closed = closes.sum(1)
        self.latent_BG = latents_BPG[torch.arange(B, device=self.device), torch.from_numpy(closed).to(self.device)]
        last = np.where(closed > 0, N - 1 - closes[:, ::-1].argmax(1), -1)
        begin = np.where(closed > 0, self.open_length + last + 1, 0)  # of what stays open
        open_length = np.where(closed > 0, counts_B - last - 1, self.open_length + counts_B)
        if ((begin > 0) & (open_length > 0)).any():
            width = int(open_length.max())
            source = torch.from_numpy(begin[:, None] + np.arange(width)).to(self.device)
            for x in self.open_states:
                source_places = source.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[2])
                x[:, :width] = x.gather(1, source_places)
        if self.context_bytes is not None:
            rows, places = np.nonzero(np.arange(N) < counts_B[:, None])
            self.row_ids[rows, self.length[rows] + places] = ids_BN[rows, places]
            self.row_closes[rows, self.length[rows] + places] = closes[rows, places]
        if self.recent.shape[1]:
            source = torch.from_numpy(counts_B[:, None] + np.arange(self.recent.shape[1])).to(self.device)
            self.recent = torch.cat((self.recent, ids), dim=1).gather(1, source)
        self.open_length = open_length
        self.length = self.length + counts_B
        self.patches = self.patches + closed

    def _begin_rows_anew(self, is_full_B):
        """Let these rows of the model begin with the last half of what they hold; the first id then is a patch of its own."""
        if not is_full_B.any():
            return
        rows, kept = np.flatnonzero(is_full_B), self._kept_context()
        ids, closes = self.row_ids[:, -kept:].copy(), self.row_closes[:, -kept:].copy()
        closes[:, 0] = True
        for values in (self.length, self.patches, self.open_length):
            values[rows] = 0
        for begin in range(0, kept, CHUNK):
            counts = np.where(is_full_B, min(CHUNK, kept - begin), 0)
            piece = slice(begin, begin + CHUNK)
            self._advance(ids[:, piece], closes[:, piece] & is_full_B[:, None])
            self.commit(counts)

    def roll_back(self, document_length_B, rule_state):
        """Let the entropy model and the patch rule forget the ids after these: for drafts that were not kept."""
        self.document_length = document_length_B
        self.rule.state = rule_state
