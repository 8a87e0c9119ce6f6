"""Losses that stop a run: those that are no numbers, and those that rise and stay up. And a report of the batch."""

import math
from collections import deque

import torch

from blt.files import write_json

# A spike lasts this many updates in a row: one batch of odd text is no fault.
SPIKE_STEPS = 10
# A loss near zero doubles easily, so a spike is also this many nats above the lowest.
SPIKE_NATS = 0.5
# Losses are read back from the device at the latest when there are this many.
MOST_UNREAD = 100
# What a report shows of the losses before the fault.
SHOWN_LOSSES = 50


class Fault(ValueError):
    """Why a run stops, in its text. step: the update where it began, counted from 1."""

    def __init__(self, words, step):
        super().__init__(words)
        self.step = step


class LossWatch:
    """Looks at every update's loss and gradient. The CPU waits for the device in `check` only.

    ratio: a spike is a loss of more than this many times the lowest mean of SPIKE_STEPS updates so far,
    in each of SPIKE_STEPS updates in a row; 0: none is.
    lowest: that lowest mean, of a run that is resumed; None: the first loss.
    allows_infinite_gradients: with fp16 they are usual; the scaler leaves the update out.
    """

    def __init__(self, ratio, lowest=None, allows_infinite_gradients=False):
        self.ratio = ratio
        self.lowest = lowest
        self.allows_infinite_gradients = allows_infinite_gradients
        self.unread = []
        self.recent = deque(maxlen=SHOWN_LOSSES)  # (step, loss) of the last updates
        self.window = deque(maxlen=SPIKE_STEPS)
        self.row_nats = {}  # {step: nats of each row} of the updates in which a spike may have begun

    def add(self, step, loss_nats, gradient_norm, row_nats):
        """Take note of an update.

        step: its number, counted from 1.
        loss_nats, gradient_norm: 0-dimensional tensors.
        row_nats: float [rows], the mean nats an id of each row of the update (padding costs none).
        """
        self.unread.append((step, loss_nats, gradient_norm, row_nats))

    def is_full(self):
        """Whether `check` is due because much is unread."""
        return len(self.unread) >= MOST_UNREAD

    def check(self):
        """Read back what was added. Raises Fault for the first update that is wrong."""
        if not self.unread:
            return
        numbers = torch.stack([torch.stack((loss, norm.float())) for _, loss, norm, _ in self.unread]).tolist()
        for (step, _, _, row_nats), (loss, norm) in zip(self.unread, numbers):
            self.row_nats[step] = row_nats
            self.row_nats.pop(step - SPIKE_STEPS, None)
            self.recent.append((step, loss))
            if not math.isfinite(loss):
                raise Fault(f"the loss is {loss} at step {step}", step)
            if not math.isfinite(norm) and not self.allows_infinite_gradients:
                raise Fault(f"the norm of the gradient is {norm} at step {step}", step)
            self._look_for_spike(step, loss)
        self.unread.clear()

    def _look_for_spike(self, step, loss):
        self.lowest = loss if self.lowest is None else self.lowest
        self.window.append(loss)
        if len(self.window) < SPIKE_STEPS:
            return
        is_high = min(self.window) > max(self.ratio * self.lowest, self.lowest + SPIKE_NATS)
        if self.ratio and is_high:
            first = step - SPIKE_STEPS + 1
            raise Fault(
                f"the loss rose at step {first} from {self.lowest:.2f} nats to {min(self.window):.2f} or more, "
                f"and was still there {SPIKE_STEPS} steps later",
                first,
            )
        self.lowest = min(self.lowest, sum(self.window) / SPIKE_STEPS)

    def report(self, path, fault, batches, vocabulary):
        """Write the batch of a fault's step as JSON: the rows with their losses and texts, the worst first.

        batches: the `RowBatch`es of the step's passes.
        vocabulary: `ids.Vocabulary` of the ids.
        """
        ids = torch.cat([batch.ids for batch in batches]).cpu()
        nats = self.row_nats[fault.step].tolist()
        rows = [
            {"nats": value if math.isfinite(value) else str(value), "text": text_of(row, vocabulary)}
            for value, row in zip(nats, ids)
        ]
        # Sorting needs numbers: one that is not finite comes first.
        rows.sort(key=lambda row: row["nats"] if isinstance(row["nats"], float) else math.inf, reverse=True)
        losses = [[step, loss if math.isfinite(loss) else str(loss)] for step, loss in self.recent]
        write_json(path, {"fault": str(fault), "step": fault.step, "losses": losses, "rows": rows})


def text_of(ids, vocabulary):
    """The text of a row's ids. Documents are apart by an empty line; bytes that are not UTF-8 are shown as \\x."""
    documents = [[]]
    for number in ids.tolist():
        if number == vocabulary.boundary:
            documents.append([])
        else:
            documents[-1].append(number)
    return "\n\n".join(
        vocabulary.decode(document).decode("utf-8", "backslashreplace") for document in documents if document
    )
