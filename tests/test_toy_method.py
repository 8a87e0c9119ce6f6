"""A patching method that is written here, and in no other file, does everything that the built-in ones do."""

import numpy as np
import pytest
from helpers import (
    BLT_FLAGS,
    CORPUS_FLAGS,
    error_of,
    output_of,
    run_here,
    some_words,
    tiny_blt,
    tiny_entropy_model,
    write_blt,
)

from blt.metric import bits_per_byte, leak_gate
from blt.patch_rules import (
    RULES,
    OnlineStarts,
    PatchConfig,
    PatchRule,
    calibrate,
    causal_methods,
    entropy_rise,
    patch_starts,
    register,
)
from blt.training import PatchedDataset, TrainingConfig, train_blt
from compress import compress, decompress
from entropy_patcher import EntropyPatcher
from generate import generate
from save_entropy_model import load_blt

VOWELS = np.isin(np.arange(257), list(b"aeiou"))


class VowelRule(PatchRule):
    """A rule of the bytes: patches end with a vowel."""

    name = "vowel"
    condition = "it follows a vowel"
    unit = None
    needs_entropies = False

    def wants_start(self, texts, threshold, rise):
        starts = np.roll(VOWELS[texts.byte_values], 1)
        starts[0] = False
        return starts

    def wants_start_online(self, rows, threshold, rise):
        return VOWELS[rows.last_byte_B]


class FallRule(PatchRule):
    """A rule of the entropies, with a threshold in nats."""

    name = "fall"
    condition = "its entropy has fallen by more than the threshold"

    def wants_start(self, texts, threshold, rise):
        starts = -entropy_rise(texts.entropies) > threshold
        # Nothing comes before the first position, so it has not fallen.
        starts[0] = False
        return starts

    def wants_start_online(self, rows, threshold, rise):
        return (rows.previous_entropies_B - rows.entropies_B > threshold) & (rows.position_B > 0)

    def threshold_range(self, entropies):
        rises = entropy_rise(entropies)[1:]
        return float(-rises.max()) - 1e-3, float(-rises.min()) + 1e-3


TOYS = {"vowel": VowelRule, "fall": FallRule}


@pytest.fixture(params=TOYS)
def method(request):
    """The name of a toy method, which is registered during the test."""
    register(TOYS[request.param])
    yield request.param
    del RULES[request.param]


@pytest.fixture
def patcher(method):
    """An `EntropyPatcher` of the method with about 4 bytes a patch."""
    config = PatchConfig(method, max_patch_size=9)
    if not config.needs_entropies:
        return EntropyPatcher(None, config)
    entropy_model = tiny_entropy_model()
    sample = EntropyPatcher(entropy_model).entropies(some_words(300))
    return EntropyPatcher(entropy_model, calibrate(config, 4.0, sample))


def data_of(patcher):
    train = [some_words(80, seed) for seed in range(6)]
    return PatchedDataset.from_documents(train, [some_words(40, 100)], patcher, row_bytes=64, batch_rows=4)


def test_patches(patcher):
    text = some_words(50)
    patches = patcher.create_patches(text)
    assert b"".join(patches) == text and len(text) / 6 < len(patches) < len(text) / 2
    assert patcher.config.method in causal_methods() and patcher.config.describe().startswith(patcher.config.method)
    if patcher.config.method == "vowel":
        assert all(patch[-1] in b"aeiou" or len(patch) == 9 for patch in patches[:-1])


@pytest.mark.parametrize("limits", [{}, dict(min_patch_size=2, max_patch_size=5)], ids=str)
def test_online_form_equals_vectorised_form(method, limits):
    rng = np.random.default_rng(0)
    entropies = rng.gamma(2.0, 0.5, 300).astype(np.float32)
    text = np.frombuffer(some_words(200)[:300], np.uint8)
    config = PatchConfig(method, 0.4, **limits)
    online = OnlineStarts(config, 1)
    previous = np.concatenate(([0], text[:-1]))
    starts = [online.step(entropies[t : t + 1], previous[t : t + 1], np.array([True]))[0] for t in range(300)]
    assert starts == patch_starts(entropies, **config.arguments(), byte_values=text).tolist()
    assert 30 < sum(starts) < 270


def test_trains_generates_and_compresses(patcher, tmp_path):
    blt = tiny_blt()
    data = data_of(patcher)
    settings = dict(row_bytes=64, batch_rows=4, steps=20, eval_every=20, device="cpu", precision="fp32")
    before = bits_per_byte(blt, patcher, data.validation, row_bytes=64)
    result = train_blt(blt, data, TrainingConfig(**settings, output=str(tmp_path / "run")))
    assert result["val_bpb"] < 0.8 * before
    assert leak_gate(blt, patcher, some_words(40, 7)) < 1e-3

    blt.eval()
    prompt = b"the cat sat on"
    new = generate(blt, patcher, prompt, 25)
    assert len(new) == 25 and new == generate(blt, patcher, prompt, 25, cached=False)
    text = some_words(60, 9)
    packed, _ = compress(text, blt, patcher, 2, 64)
    # A text that the model cannot predict would be stored as it is.
    assert len(packed) < len(text)
    assert decompress(packed, blt, patcher) == text

    # An output folder with this method is one like any other.
    folder = write_blt(tmp_path / "checkpoints", blt, patcher.config, patcher.entropy_model)
    again, patcher_again, _ = load_blt(folder)
    assert patcher_again.config == patcher.config
    assert generate(again, patcher_again, prompt, 25) == new


def test_leak_gate_sees_a_method_that_looks_ahead():
    """Its online form may be right: what training and evaluation read is the vectorised form."""

    class AheadRule(VowelRule):
        name = "ahead"

        def wants_start(self, texts, threshold, rise):
            # It reads the byte it decides about.
            return VOWELS[texts.byte_values]

    register(AheadRule)
    try:
        patcher = EntropyPatcher(None, PatchConfig("ahead"))
        for seed in range(5):
            with pytest.raises(ValueError, match="leak: patch method 'ahead' starts other patches"):
                leak_gate(tiny_blt(), patcher, some_words(40, seed))
    finally:
        del RULES["ahead"]


def test_scripts_know_the_method(method, pipeline_copy):
    """Lists on the command line and in messages come from the registry."""
    flags = ["--patch_method", method, *(["--target_patch_size", 4] if method == "fall" else [])]
    printed = output_of(pipeline_copy, "llm", *BLT_FLAGS, *flags, "--steps", 2, "--eval_every", 2)
    assert f"patches: {method}" in printed
    limits = ["--max_patch_size", 9, *(["--target_patch_size", 4] if method == "fall" else [])]
    printed = output_of(pipeline_copy, "create_patches", *CORPUS_FLAGS, "--method", method, *limits)
    assert f"patches: {method}" in printed and "at most 9 bytes" in printed
    assert "note: no patches.html" in printed
    # Without a method of its own, training takes what create_patches.py chose.
    printed = output_of(pipeline_copy, "llm", *BLT_FLAGS, "--steps", 2, "--eval_every", 2)
    assert f"patches: {method}" in printed and "at most 9 bytes" in printed
    assert output_of(pipeline_copy, "generate", "--prompt", "The ", "--device", "cpu").startswith("The ")
    assert method in run_here(pipeline_copy, "llm", "--help")[1]
    assert method in error_of(pipeline_copy, "create_patches", "--method", "greedy")
    with pytest.raises(ValueError, match=method):
        PatchConfig("greedy")


def test_the_toys_are_gone():
    assert not set(TOYS) & set(RULES)


@pytest.mark.parametrize("missing", ["name", "condition", "wants_start", "wants_start_online"])
def test_a_method_that_lacks_a_part_is_refused(missing):
    parts = {
        part: VowelRule.__dict__[part]
        for part in ("name", "condition", "unit", "needs_entropies", "wants_start", "wants_start_online")
    }
    del parts[missing]
    with pytest.raises(TypeError, match=f"has no {missing}"):
        register(type("Incomplete", (PatchRule,), parts))
    assert "vowel" not in RULES


def test_a_method_whose_starts_depend_on_the_patch_needs_next_start():
    class Incomplete(VowelRule):
        depends_on_patch = True

    with pytest.raises(TypeError, match="'vowel' has no next_start"):
        register(Incomplete)
    # A method that looks ahead cannot be followed online, so it needs no online form.
    parts = {"name": "ahead", "condition": "it is a vowel", "is_causal": False, "wants_start": VowelRule.wants_start}
    register(type("AheadRule", (PatchRule,), parts))
    assert "ahead" not in causal_methods()
    del RULES["ahead"]


def test_a_name_is_given_once():
    class Second(VowelRule):
        name = "global"

    with pytest.raises(TypeError, match="'global' already"):
        register(Second)
