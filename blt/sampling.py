"""Choosing the next byte from a model's logits."""

from dataclasses import dataclass, field

import numpy as np

from blt.checks import check, check_positive
from blt.ids import BOUNDARY


@dataclass
class SamplingConfig:
    temperature: float = 0.0  # 0: always the likeliest byte
    top_k: int | None = None  # draw from so many likeliest bytes only
    top_p: float = 1.0  # draw from the likeliest bytes that together have this probability
    min_p: float = 0.0  # draw from bytes that have this share of the likeliest byte's probability
    no_repeat_bytes: int | None = None  # no sequence of so many bytes comes twice in a text, its prompt included
    stop: list[str] = field(default_factory=list)  # end before any of these strings
    context_bytes: int | None = None  # ids in a row of the model; a full one begins anew with its last half
    seed: int = 1337  # of the sampling; row i of a batch has seed + i

    def __post_init__(self):
        check_positive(self, "top_k", "no_repeat_bytes")
        check(self, "temperature", self.temperature >= 0, "0 or more")
        check(self, "top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check(self, "min_p", 0 <= self.min_p < 1, "from 0 to below 1")
        check(self, "stop", all(self.stop), "strings that are not empty")
        check(self, "context_bytes", self.context_bytes is None or self.context_bytes >= 2, "2 or more")


class Sampler:
    """Chooses the next id of one row, and knows when its text is over."""

    def __init__(self, prompt, max_new_bytes, config, row=0):
        self.config, self.text, self.begin, self.end = (
            config,
            bytearray(prompt),
            len(prompt),
            len(prompt) + max_new_bytes,
        )
        self.random = np.random.default_rng(config.seed + row)
        self.stops = [stop.encode("utf-8", "surrogateescape") for stop in config.stop]
        self.is_over, self.followers = False, {}
        n = config.no_repeat_bytes
        for i in range(len(prompt) - n + 1 if n else 0):
            self._remember(i + n)

    def _remember(self, end):
        n = self.config.no_repeat_bytes
        self.followers.setdefault(bytes(self.text[end - n : end - 1]), []).append(self.text[end - 1])

    def choose(self, logits_V):
        """The id to go on with, and the text with it; float logits [257]. One random number a byte, whatever the settings."""
        c, draw = self.config, self.random.random()
        if c.no_repeat_bytes:
            forbidden = self.followers.get(bytes(self.text[max(0, len(self.text) - c.no_repeat_bytes + 1) :]), [])
            logits_V = logits_V.copy()
            logits_V[forbidden] = -np.inf
        choice = int(logits_V.argmax()) if c.temperature == 0 else self._sample(logits_V, draw)
        if choice == BOUNDARY:
            self.is_over = True
            return choice
        self.text.append(choice)
        if c.no_repeat_bytes and len(self.text) >= c.no_repeat_bytes:
            self._remember(len(self.text))
        self.is_over = len(self.text) >= self.end
        for stop in self.stops:
            if self.text.endswith(stop) and len(self.text) - len(stop) >= self.begin:
                del self.text[len(self.text) - len(stop) :]
                self.is_over = True
                break
        return choice

    def _sample(self, logits_V, draw):
        c = self.config
        order = np.argsort(-logits_V, kind="stable")
        p = np.exp((logits_V[order].astype(np.float64) - logits_V[order[0]]) / c.temperature)
        p /= p.sum()
        keep = (np.cumsum(p) - p < c.top_p) & (p >= c.min_p * p[0])
        if c.top_k is not None:
            keep[c.top_k :] = False
        total = np.cumsum(np.where(keep, p, 0.0))
        return int(order[min(np.searchsorted(total, draw * total[-1], side="right"), keep.nonzero()[0][-1])])

    def final_bytes(self):
        """New bytes that no stop string can take away any more."""
        return bytes(
            self.text[self.begin :]
            if self.is_over
            else self.text[self.begin : len(self.text) - max(map(len, self.stops), default=1) + 1]
        )
