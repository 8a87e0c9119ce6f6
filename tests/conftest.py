"""What all test files have in common: one thread, and the outputs of the three main scripts."""

import json
import os
import shutil

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# Without a GPU, Triton's kernels are interpreted. It reads this when they are defined, so when helpers
# is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import BLT_FLAGS, CORPUS_FLAGS, ENTROPY_FLAGS, run_command  # noqa: E402

# Examples take longer on a busy machine, and nothing is kept between runs.
settings.register_profile("tests", deadline=None, database=None)
settings.load_profile("tests")
# Tiny models gain nothing from a second thread, and lose much to it on a busy machine.
torch.set_num_threads(1)


# A file's tests run in one process. The files that take minutes begin first, so that all processes end together.
LONG_FILES = (
    "test_processes",
    "test_caches",
    "test_experiments",
    "test_checkpoints",
    "test_fuzz_compress",
    "test_gpu_card",
    "test_generate",
    "test_replay",
    "test_convert_hf",
    "test_triton_kernels",
)


def pytest_collection_modifyitems(items):
    """Sort the tests by LONG_FILES; the order is otherwise that of the files."""
    order = {name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The three main scripts as commands, in order: (folder, {script: what it printed}).

    It is made once, also where pytest-xdist runs the tests in several processes. Tests must not write to it;
    those that do take `pipeline_copy`.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "pipeline"
    printed_path = shared / "pipeline_printed.json"
    with FileLock(shared / "pipeline.lock"):
        if not printed_path.exists():
            folder.mkdir()
            printed = {
                "entropy_llm": run_command(folder, "entropy_llm", *ENTROPY_FLAGS),
                "create_patches": run_command(folder, "create_patches", *CORPUS_FLAGS),
                "llm": run_command(folder, "llm", *BLT_FLAGS),
            }
            printed_path.write_text(json.dumps(printed))
    return folder, json.loads(printed_path.read_text())


@pytest.fixture
def pipeline_copy(pipeline, tmp_path):
    """A copy of the pipeline's folder in which a test may write. The corpus, 23 MB, is shared."""
    folder = tmp_path / "copy"
    shutil.copytree(pipeline[0], folder, ignore=shutil.ignore_patterns("data_cache"))
    (folder / "data_cache").symlink_to(pipeline[0] / "data_cache")
    return folder
