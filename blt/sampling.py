"""Choosing the next byte from a model's logits."""

from dataclasses import dataclass, field

import numpy as np

from blt.checks import check, check_positive
from blt.ids import BOUNDARY, argument_bytes


@dataclass
class SamplingConfig:
    temperature: float = 0.0  # 0: always the most likely byte
    top_k: int | None = None  # draw from at most this many bytes, the most likely ones; None: from all
    top_p: float = 1.0  # draw from the most likely bytes that together have this probability
    min_p: float = 0.0  # draw from bytes with at least this share of the most likely byte's probability
    no_repeat_bytes: int | None = None  # no sequence of this many bytes occurs twice; None: no limit
    stop: list[str] = field(default_factory=list)  # end before any of these strings
    context_bytes: int | None = None  # ids in a row of the model; a full row restarts with its last half
    seed: int = 1337  # of the sampling; row i of a batch has seed + i

    def __post_init__(self):
        check_positive(self, "top_k", "no_repeat_bytes")
        check(self, "temperature", self.temperature >= 0, "0 or more")
        check(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check(self, "min_p", 0 <= self.min_p < 1, "from 0 to below 1")
        check(self, "stop", all(self.stop), "strings that are not empty")
        check(self, "context_bytes", self.context_bytes is None or self.context_bytes >= 2, "2 or more")


class Sampler:
    """Chooses the bytes of one row, and knows when its text is over.

    text: bytearray, the prompt and the bytes chosen so far.
    is_over: whether the text is complete: the model has chosen the document's end, a stop string came, or
        max_new_bytes have been chosen.
    """

    def __init__(self, prompt, max_new_bytes, config, row=0):
        self.config = config
        self.text = bytearray(prompt)
        self.prompt_length = len(prompt)
        self.max_length = len(prompt) + max_new_bytes
        self.is_over = False
        self.random = np.random.default_rng(config.seed + row)
        self.stops = [argument_bytes(stop) for stop in config.stop]
        # For no_repeat_bytes = n: which bytes have followed each sequence of n - 1 bytes.
        self.followers = {}
        if config.no_repeat_bytes:
            for end in range(config.no_repeat_bytes, len(prompt) + 1):
                self._remember_follower(end)

    def choose(self, logits_V):
        """Choose the next id by float logits [257]. Returns it; a byte is also appended to the text."""
        # One random number for every byte, whatever the settings: the text of a seed then does not depend
        # on how many bytes were drafted or which rows share the batch.
        draw = self.random.random()
        if self.config.no_repeat_bytes:
            logits_V = self._without_repeats(logits_V)
        if self.config.temperature == 0:
            choice = int(logits_V.argmax())
        else:
            choice = self._sample(logits_V, draw)
        if choice == BOUNDARY:
            self.is_over = True
        else:
            self._append(choice)
        return choice

    def final_bytes(self):
        """The new bytes that no stop string can remove any more: safe to show."""
        end = len(self.text)
        if not self.is_over:
            # The last bytes may be the beginning of a stop string.
            longest_stop = max(map(len, self.stops), default=1)
            end = max(self.prompt_length, end - longest_stop + 1)
        return bytes(self.text[self.prompt_length : end])

    def _sample(self, logits_V, draw):
        """The id at `draw`, a number from 0 to below 1, in the distribution of the settings."""
        c = self.config
        # Most likely first. The stable order makes ties independent of the machine.
        order_V = np.argsort(-logits_V, kind="stable")
        scaled_V = (logits_V[order_V].astype(np.float64) - logits_V[order_V[0]]) / c.temperature
        p_V = np.exp(scaled_V)
        p_V /= p_V.sum()
        # top_p keeps the byte that crosses the limit: what comes before it is less than top_p.
        before_V = np.cumsum(p_V) - p_V
        is_kept_V = (before_V < c.top_p) & (p_V >= c.min_p * p_V[0])
        if c.top_k is not None:
            is_kept_V[c.top_k :] = False
        total_V = np.cumsum(np.where(is_kept_V, p_V, 0.0))
        index = np.searchsorted(total_V, draw * total_V[-1], side="right")
        # Rounding may put the draw behind the last id that is kept.
        last_kept = is_kept_V.nonzero()[0][-1]
        return int(order_V[min(index, last_kept)])

    def _append(self, byte):
        """Append a byte, and end the text at its longest length or before a stop string."""
        self.text.append(byte)
        if self.config.no_repeat_bytes and len(self.text) >= self.config.no_repeat_bytes:
            self._remember_follower(len(self.text))
        self.is_over = len(self.text) >= self.max_length
        for stop in self.stops:
            begin = len(self.text) - len(stop)
            # A stop string counts only if it is new as a whole.
            if self.text.endswith(stop) and begin >= self.prompt_length:
                del self.text[begin:]
                self.is_over = True
                return

    def _remember_follower(self, end):
        """Note which byte has followed the sequence that the text has before position end - 1."""
        begin = end - self.config.no_repeat_bytes
        sequence = bytes(self.text[begin : end - 1])
        self.followers.setdefault(sequence, []).append(self.text[end - 1])

    def _without_repeats(self, logits_V):
        """The logits with those bytes excluded that would complete a sequence for the second time."""
        begin = max(0, len(self.text) - self.config.no_repeat_bytes + 1)
        forbidden = self.followers.get(bytes(self.text[begin:]), [])
        logits_V = logits_V.copy()
        logits_V[forbidden] = -np.inf
        return logits_V
