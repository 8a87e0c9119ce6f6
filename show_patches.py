"""Show how a text is split into patches: a picture, and a page in which the rule and its threshold can be moved.

Reads   a text (--text, --file, or standard input) and entropy_model.pth; with --model a trained BLT and
        its own entropy model (entropy_model.pth only if its patches need none)
Writes  in pictures/: patches.html (one file that opens anywhere, without network) and patches.png
Run     python show_patches.py --text "Hello, patches." | --file book.txt [--model checkpoints] [--field value ...]
Time    18 s on 2 CPU cores for 100 kB of text with --model and models of size nano

The page shows the entropy of each byte and what the models predicted there, and applies every
patching method itself. With --model the text is split by that model's rule, and the BLT's
predictions are shown beside the entropy model's.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from blt.checks import check, check_output, check_packages, check_positive
from blt.config import run_script
from blt.device import autocast, choose_device, choose_precision
from blt.entropies import TopPredictions, stream_predictions
from blt.ids import argument_bytes
from blt.metric import row_logits
from blt.patch_rules import DEFAULT_PATCH_SIZE, PatchConfig, calibrate, causal_methods, check_thresholds
from blt.pictures import MAX_FIGURE_BYTES, MAX_PAGE_BYTES, draw_entropy_figure, whole_characters, write_patch_page
from blt.progress import progress_bar
from blt.rows import evaluation_batches
from entropy_patcher import EntropyPatcher
from save_entropy_model import load_blt, load_entropy_model


@dataclass
class ShowPatchesConfig:
    """Settings of this script. The fields under "patches" go without --model, which has a rule of its own."""

    # text
    text: str | None = None  # the text to show
    file: str | None = None  # or a file with it, any bytes; neither: standard input
    # models
    entropy_model_path: str | None = None  # trained entropy model; None: entropy_model.pth, or the one of --model
    model: str | None = None  # output folder of llm.py: its rule splits the text, and its predictions are shown too
    context_bytes: int | None = None  # bytes that the BLT sees at once, in windows half of that apart; None: a row's
    top_k: int = 5  # most likely bytes to show at each position
    # patches
    method: str | None = None  # the patching method; None: the model's, else global
    target_patch_size: float | None = None  # find the threshold that gives this many bytes a patch here (None: 4.5)
    entropy_threshold: float | None = None  # or the threshold itself: nats; bytes for static
    monotonic_threshold: float = 0.0  # nats; both: the rise of entropy that a start also needs
    min_patch_size: int = 1  # bytes; a start that comes earlier is suppressed
    max_patch_size: int | None = None  # bytes; a patch that reaches this size is closed; None: no limit
    # output
    output: str = "pictures"  # folder
    title: str | None = None  # heading of both; None: the file's name
    picture_bytes: int = 384  # the picture shows this many bytes of the beginning, 4000 at most
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # of the entropy model; a BLT has that of its training

    CHOICES = {"method": causal_methods}

    def __post_init__(self):
        check_positive(self, "target_patch_size", "picture_bytes")
        check(self, "picture_bytes", self.picture_bytes <= MAX_FIGURE_BYTES, f"at most {MAX_FIGURE_BYTES}")
        check(self, "top_k", 1 <= self.top_k <= 16, "from 1 to 16")
        check(self, "context_bytes", self.context_bytes is None or self.context_bytes >= 2, "2 or more")
        if self.text is not None and self.file is not None:
            raise ValueError("give either text or file, not both")
        of_rule = ("method", "target_patch_size", "entropy_threshold", "monotonic_threshold")
        of_rule += ("min_patch_size", "max_patch_size")
        changed = [name for name in of_rule if getattr(self, name) != getattr(type(self), name)]
        if self.model is not None and changed:
            raise ValueError(
                f"leave out {' and '.join(changed)}: a BLT reads the patches that it was trained with; "
                "other rules can be tried in the page"
            )
        config = self.patch_config()  # its checks, before any work is done
        check_thresholds(config.method, self.target_patch_size, self.entropy_threshold, self.monotonic_threshold)

    def patch_config(self):
        """The rule as a `PatchConfig`; without a threshold it has 1, until one is calibrated."""
        return PatchConfig(
            method="global" if self.method is None else self.method,
            entropy_threshold=1.0 if self.entropy_threshold is None else self.entropy_threshold,
            monotonic_threshold=self.monotonic_threshold,
            min_patch_size=self.min_patch_size,
            max_patch_size=self.max_patch_size,
        )


def read_text(config):
    """The bytes to show, from --text, --file or standard input."""
    if config.text is not None:
        text = argument_bytes(config.text)
    elif config.file is not None:
        text = Path(config.file).read_bytes()
    elif sys.stdin.isatty():
        raise ValueError('no text; give --text "Some words" or --file book.txt, or pipe a text in')
    else:
        text = sys.stdin.buffer.read()
    if not text:
        raise ValueError(f"{'the text' if config.file is None else config.file} is empty: nothing to show")
    return text


@torch.no_grad()
def blt_predictions(model, starts, document, context_bytes, k=5, precision="fp32", progress=None):
    """What a BLT predicted for each byte of a document: `TopPredictions`, from windows as in evaluation.

    starts: bool [N + 1], which positions of the document start a patch.
    context_bytes: of a window. Shorter documents are read whole.
    """
    device = next(model.parameters()).device
    row_bytes = min(context_bytes, len(document) + 1)
    pieces, done = [], 0
    for batch in evaluation_batches([document], [starts], row_bytes, batch_rows=2):
        batch = batch.to(device)
        with autocast(device, precision):
            logits_BTV = row_logits(model, batch)
        # The windows follow each other, so scored logits are in order: each byte once, then the
        # document's end.
        logits_NV = logits_BTV[batch.is_scored]
        piece = TopPredictions.of_logits(logits_NV, document[done : done + len(logits_NV)], k)
        pieces.append(piece)
        done += len(piece.of_byte_N)
        if progress is not None:
            progress.update(len(piece.of_byte_N))
    return TopPredictions.joined(pieces)


def open_models(config, device):
    """Load what the page needs: (BLT, its record, its EntropyPatcher, entropy model, precision of the entropy model).

    Without --model the first three are None.
    """
    blt, record, patcher, entropy_model = None, None, None, None
    precision = choose_precision(config.precision, device)
    if config.model is not None:
        blt, patcher, record = load_blt(config.model, device)
        entropy_model = patcher.entropy_model
        precision = patcher.precision
        if entropy_model is not None and config.entropy_model_path is not None:
            raise ValueError(
                "leave out entropy_model_path: the BLT's patches come from the entropy model that it was trained with"
            )
    if entropy_model is None:
        path = "entropy_model.pth" if config.entropy_model_path is None else config.entropy_model_path
        entropy_model, _ = load_entropy_model(path, device)
    return blt, record, patcher, entropy_model, precision


def main(config):
    check_packages("matplotlib")
    check_output(config.output, is_folder=True)
    for name in ("patches.html", "patches.png"):
        check_output(Path(config.output) / name, reads=[config.file])
    device = choose_device(config.device)
    whole = read_text(config)
    text = whole_characters(whole, MAX_PAGE_BYTES)
    document = np.frombuffer(text, dtype=np.uint8)
    if len(text) < len(whole):
        print(f"note: the page shows the first {len(text):,} of {len(whole):,} bytes")

    blt, record, patcher, entropy_model, precision = open_models(config, device)
    with progress_bar(len(text), "entropies") as progress:
        entropies, predictions = stream_predictions(entropy_model, document, config.top_k, precision, progress)
    if patcher is None:
        patch_config = config.patch_config()
        if config.entropy_threshold is None:
            target = DEFAULT_PATCH_SIZE if config.target_patch_size is None else config.target_patch_size
            patch_config = calibrate(patch_config, target, entropies)
        patcher = EntropyPatcher(entropy_model, patch_config, precision=precision)
    starts = patcher.starts(document, entropies)
    predicted = {"entropy model": predictions}
    if blt is not None:
        context_bytes = record.row_bytes() if config.context_bytes is None else config.context_bytes
        with progress_bar(len(text), "BLT") as progress:
            predicted["BLT"] = blt_predictions(blt, starts, document, context_bytes, config.top_k, precision, progress)
    # The page and the picture have no place for the document's end.
    write_outputs(config, text, entropies[:-1], starts[:-1], patcher.config, predicted)


def write_outputs(config, text, entropies, is_start, rule, predicted):
    """Write the page and the picture, and print what they show.

    entropies, is_start: [N] of each byte.
    rule: `PatchConfig`.
    predicted: {model's name: `TopPredictions`}.
    """
    folder = Path(config.output)
    title = config.title
    if title is None:
        title = "Patches" if config.file is None else Path(config.file).name
    costs = [(f"{name}, bits a byte", f"{made.bits_per_byte:.3f}") for name, made in predicted.items()]
    subtitle = rule.describe()
    if "BLT" in predicted:
        subtitle += "; the BLT's predictions belong to this rule and stay as they are"
    page = write_patch_page(
        folder / "patches.html", text, entropies, rule.arguments(), predicted, title, subtitle, costs
    )
    sentence = whole_characters(text, config.picture_bytes)
    n = len(sentence)
    caption = f"{title}: {rule.describe()}"
    picture = draw_entropy_figure(
        folder / "patches.png", sentence, entropies[:n], is_start[:n], rule.entropy_level(), caption
    )
    patches = int(is_start.sum())
    print(f"{len(text):,} bytes, {patches:,} patches, {len(text) / patches:.2f} bytes a patch ({rule.describe()})")
    cost_words = " | ".join(f"{name} {cost}" for name, cost in costs)
    print(f"entropy: mean {entropies.mean(dtype=np.float64):.3f} nats | {cost_words} (end of text not counted)")
    print(f"wrote {page} ({page.stat().st_size / 1e6:.2f} MB)")
    print(f"wrote {picture} ({picture.stat().st_size / 1e3:.0f} kB, the first {n:,} bytes)")


if __name__ == "__main__":
    run_script(main, ShowPatchesConfig, __doc__)
