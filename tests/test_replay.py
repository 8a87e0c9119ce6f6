"""Recorded steps of generation give the text of steps that are not recorded.

CUDA graphs need a GPU. Here the operations of a recording are listed as torch does them, and done again in that
order, with what the first time read and wrote: like a CUDA graph, this notices nothing that Python has computed
since, but what is in the recording's inputs.
"""

import weakref

import numpy as np
import pytest
import torch
from test_incremental import CONFIGS, PATCH_CONFIGS, TEXT, model_of, patcher_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from blt import incremental, replay
from blt.incremental import IncrementalBLT
from blt.replay import Layout, Replayed, send
from compress import decode, encode
from generate import generate


class ListOfOperations(TorchDispatchMode):
    """Operations and their results, in order."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        result = operation(*arguments, **(named or {}))
        self.done.append((operation, arguments, named or {}, result))
        return result


def listed_calls(function, device):
    """In place of `replay.record_calls`, on a CPU."""
    for _ in range(2):
        function()
    with ListOfOperations() as operations:
        outputs = function()

    def again():
        # The new result in place of each result of the first time.
        new_of = {}

        def newest(value):
            return new_of.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for operation, arguments, named, result in operations.done:
            new_result = operation(*tree_map(newest, arguments), **tree_map(newest, named))
            for old, new in zip(tree_leaves(result), tree_leaves(new_result), strict=True):
                new_of[id(old)] = new
        for output in tree_leaves(outputs):
            output.copy_(newest(output))

    return again, outputs


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded from now on. A list: the arguments of each recording."""
    made = []

    class Counted(replay.Recording):
        def __init__(self, function, arrays, device):
            made.append(sorted(arrays))
            super().__init__(function, arrays, device)

    def switch_on():
        monkeypatch.setattr(incremental, "can_record", lambda device: True)
        monkeypatch.setattr(replay, "record_calls", listed_calls)
        monkeypatch.setattr(replay, "Recording", Counted)
        return made

    return switch_on


def settings_of(case):
    """Model, patcher, prompts and options of a case."""
    generator = np.random.default_rng(case)
    patching = sorted(PATCH_CONFIGS)[case % len(PATCH_CONFIGS)]
    model = model_of(sorted(CONFIGS)[case % 5], window=int(generator.choice([3, 12, 40])))
    with torch.no_grad():
        model.head.weight.mul_(4)
    lengths = generator.choice([0, 1, 5, 60, 300], 1 + case % 3)
    prompts = [TEXT[i : i + int(length)] for i, length in enumerate(lengths)]
    options = dict(context_bytes=[None, 64][case % 2], temperature=[0.0, 1.0][case // 2 % 2])
    return model, patcher_of(patching), prompts, options


@pytest.mark.parametrize("cases", [range(8), pytest.param(range(8, 20), marks=pytest.mark.slow)], ids=str)
def test_recorded_steps_write_the_same_text(recorded, cases):
    wanted = []
    for case in cases:
        model, patcher, prompts, options = settings_of(case)
        wanted.append(generate(model, patcher, prompts, 90, **options))
    made = recorded()
    for case, texts in zip(cases, wanted):
        model, patcher, prompts, options = settings_of(case)
        made.clear()
        assert generate(model, patcher, prompts, 90, **options) == texts, case
        # A step with and one without the end of a patch, each for a few sizes of the caches.
        assert 1 < len(made) < 16, (case, made)


def test_drafts_and_recorded_steps_side_by_side(recorded):
    """The entropy model's steps are recorded, those of the BLT are not, as they read several ids."""
    model, patcher = model_of(), patcher_of("global")
    options = dict(draft_bytes=4, draft_confidence=0.05)
    wanted = generate(model, patcher, TEXT[:300], 60, **options)
    made = recorded()
    assert generate(model, patcher, TEXT[:300], 60, **options) == wanted
    assert made


@pytest.mark.parametrize("streams", [1, 3])
def test_what_recorded_steps_code_they_decode(recorded, streams):
    model, patcher = model_of(), patcher_of("monotonic")
    recorded()
    code, _ = encode(model, patcher, TEXT[:200], streams, 128)
    assert decode(model, patcher, code, 200, streams, 128) == TEXT[:200]


def test_a_long_text_needs_few_recordings(recorded):
    made = recorded()
    model, patcher = model_of(), patcher_of("space")
    reader = IncrementalBLT(model, patcher)
    reader.prefill([np.array([256])])
    for byte in TEXT[:500]:
        reader.extend(np.array([[byte]]))
    # Up to 64 and 128 patches, whose newest has up to 16 bytes or 32; no patch ends.
    assert len(made) < 8


def test_arrays_go_through_one_buffer():
    arrays = {
        "ids": np.arange(5)[None],
        "mask": np.array([[True, False, True]]),
        "numbers": np.float32([1.5]),
        "none": np.zeros((2, 0), np.int64),
    }
    layout = Layout(arrays)
    cpu = torch.device("cpu")
    for got in (layout.tensors(layout.pack(arrays, cpu)), send(arrays, cpu)):
        for name, array in arrays.items():
            assert np.array_equal(got[name].numpy(), array) and got[name].numpy().dtype == array.dtype


def test_recordings_are_made_again_when_a_cache_has_moved(recorded):
    made = recorded()
    cache = [torch.zeros(3)]

    def add(tensors):
        cache[0][: tensors["x"].shape[0]] = tensors["x"]
        return cache[0].sum()[None]

    replayed = Replayed(torch.device("cpu"))

    def call(*x):
        return float(replayed(add, {"x": np.float32(x)}, cache, record=True))

    # A shape is recorded the second time that it occurs.
    assert [call(1, 2), call(3, 4), call(5, 6), call(5), call(6)] == [3, 7, 11, 11, 12]
    assert len(made) == 2
    cache[0] = torch.zeros(4)
    assert [call(1), call(2)] == [1, 2]
    assert len(made) == 3 and len(replayed.recordings) == 1


def test_a_reader_is_freed_with_its_last_name():
    """Without waiting for Python's search for cycles, which does not see a GPU's memory."""
    reader = IncrementalBLT(model_of(), patcher_of("global"))
    reader.prefill([np.array([256])])
    gone = weakref.ref(reader)
    del reader
    assert gone() is None
