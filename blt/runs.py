"""The beginning and the end that all training scripts have in common."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blt.checkpoints import EARLIER_FILES, check_resumable
from blt.checks import check_output, check_packages
from blt.config import print_header
from blt.corpus import Corpus
from blt.device import choose_device, choose_precision, set_seed
from blt.locks import claim_folder
from blt.loop import check_processes, training_curves
from blt.metric import baselines, result_line
from blt.ppmd import PRIMING_BYTES
from blt.processes import is_main, main_first, wait_for_all
from blt.records import save_model

# From this many bytes of training text on, PPMd takes so long that the user is told.
SLOW_BYTES = 10_000_000


@contextmanager
def claim_output(config, folder, *files):
    """Hold a run's output folder while the block runs. All that can be wrong with it is found here, at the start.

    config: a `RunConfig`.
    files: what the run writes beside the folder.
    Raises FileNotFoundError if there is nothing to resume, ValueError if another process trains there or
    TensorBoard is missing, OSError if the folder cannot be written.
    """
    # An error that all processes have comes before the folder is made.
    check_processes(config)
    if not is_main():
        # The main process holds it for all.
        wait_for_all()
        yield
        return
    folder = Path(folder)
    for path in map(Path, files):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file as --output, such as {path / 'model.pth'}")
    # A dataset may have the name of a result: em.json is where the record of em.pth goes.
    if Path(config.dataset).is_file():
        for path in (*files, *(folder / name for name in EARLIER_FILES)):
            check_output(path, reads=[config.dataset])
    check_resumable(folder, config, *files)
    if config.tensorboard:
        check_packages("tensorboard")
    # For the curves and for zstd beside the result, both at the end of the run.
    check_packages("matplotlib", "pyarrow")
    # Made now, so that a folder that cannot be made ends the run before its work.
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *(Path(file).parent for file in files)):
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} cannot be written; change its permissions, or pass another --output")
    is_stopped = False
    try:
        with claim_folder(folder):
            wait_for_all()
            yield
    except (KeyboardInterrupt, SystemExit):
        is_stopped = True
        raise
    finally:
        # A run that failed before its first file leaves no trace. Of one that was stopped the empty folder
        # stays: to --resume it says that the run had begun.
        if is_new and not is_stopped and not any(folder.iterdir()):
            folder.rmdir()


@dataclass
class Run:
    """What a training script works with."""

    device: torch.device
    precision: str  # bf16, fp16 or fp32
    corpus: Corpus
    train: np.ndarray  # int64, numbers of the training documents
    validation: list  # uint8 arrays, the validation documents


def start_run(config):
    """Seed everything, print the header, and open the corpus. config: a `RunConfig`."""
    # Before anything is drawn at random: weights are made after this.
    set_seed(config.seed)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    print_header(config, device, precision)
    # The validation text is split off before anything else is done with the documents.
    # Its store may have to be built.
    with main_first():
        corpus = config.corpus()
    for line in corpus.notes(config.max_bytes, config.val_bytes):
        print(line)
    train = corpus.documents("train", config.max_bytes)
    validation = [corpus.document(number) for number in corpus.documents("validation", config.val_bytes)]
    return Run(device, precision, corpus, train, validation)


def print_model(name, parts, config, train_bytes):
    """Print a model's parameters by part, {part: count}, and how much text it is about to read."""
    counts = ", ".join(f"{part} {count:,}" for part, count in parts.items())
    print(f"{name}: {sum(parts.values()):,} parameters ({counts})")
    trained_bytes = config.steps * config.accumulate * config.batch_rows * config.row_bytes
    print(f"training text {train_bytes:,} bytes, {trained_bytes / train_bytes:.2f} epochs")


def finish_run(model, record, result, run, run_dir, weights_path, record_path, bytes_per_id=1.0):
    """Save the best weights with their record, draw the curves, and print the result beside compressors.

    The main process does so; for others nothing is left to do.

    model: with its best weights.
    record: its `RunRecord`.
    result: what `loop.fit` returned; gets "baselines", which later tables read from the record.
    run: the `Run`, whose training text PPMd reads before the validation text.
    run_dir: where metrics.jsonl is.
    bytes_per_id: mean bytes of an id, for the curves of a BPE model.
    """
    if not is_main():
        return
    # Until now the record on disk had no result and no hash of the weights.
    record.result = result
    save_model(model, weights_path, record, record_path)
    training_curves(Path(run_dir) / "curves.png", run_dir, bytes_per_id)
    print(f"trained {result['train_seconds']:.0f} s at {result['bytes_per_second'] / 1e3:.1f} kB/s")
    # Last, because PPMd takes up to two minutes for a long text: a run that is stopped now has lost nothing else.
    read_bytes = min(int(np.diff(run.corpus.offsets)[run.train].sum()), PRIMING_BYTES)
    if read_bytes > SLOW_BYTES:
        print(f"PPMd reads {read_bytes:,} bytes of training text for the next line: about {read_bytes // 10**6} s")
    result["baselines"] = baselines(run.corpus, run.train, run.validation)
    record.save(record_path)
    print(result_line(result))
    print(f"wrote {weights_path}, {record_path}, {run_dir}/curves.png, {run_dir}/metrics.jsonl")
