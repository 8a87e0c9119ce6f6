"""Cached, uncached, drafted and batched generation give the same text; sampling; stop strings."""

import numpy as np
import pytest
import torch
from helpers import error_of, output_of, run_here, write_blt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_incremental import CONFIGS, PATCH_CONFIGS, TEXT, model_of, patcher_of

from blt.sampling import Sampler, SamplingConfig
from entropy_patcher import EntropyPatcher
from generate import FullPass, GenerateConfig, Generator, generate


@pytest.mark.parametrize("cases", [range(32), pytest.param(range(32, 200), marks=pytest.mark.slow)], ids=str)
def test_cached_equals_uncached_on_200_random_prompts(cases):
    """Prompts of 0 to 600 bytes, with every patch config, model, window and row length.

    The text is greedy. It is also drafted where the patch config has entropies.
    """
    generator = np.random.default_rng(cases[0])
    patchings = sorted(PATCH_CONFIGS)
    names = sorted(CONFIGS)
    for case in cases:
        patching = patchings[case % len(patchings)]
        name = names[case % 5]
        model = model_of(name, window=int(generator.choice([3, 12, 40])))
        patcher = patcher_of(patching)
        with torch.no_grad():
            model.head.weight.mul_(4)
        begin = int(generator.integers(0, 1000))
        length = int(generator.choice([0, 1, 5, 60, 600], p=[0.1, 0.1, 0.3, 0.4, 0.1]))
        if case % 2:
            prompt = TEXT[begin : begin + length]
        else:
            prompt = generator.integers(0, 256, length).astype(np.uint8).tobytes()
        context_bytes = [None, 64][case % 2]
        no_repeat_bytes = [None, 3][case // 2 % 2]
        options = dict(context_bytes=context_bytes, no_repeat_bytes=no_repeat_bytes)
        wanted = generate(model, patcher, prompt, 8, cached=False, **options)
        cached = generate(model, patcher, prompt, 8, **options)
        assert cached == wanted, (case, patching, name)
        if patcher.entropy_model is not None:
            drafts = dict(draft_bytes=3, draft_confidence=0.0)
            drafted = generate(model, patcher, prompt, 8, **drafts, **options)
            assert drafted == wanted, (case, patching, name)


def test_uncached_text_has_the_patches_of_the_asked_precision():
    """A patcher may compute in bf16; text asked for in fp32 has fp32 patches, cached or not."""
    model = model_of()
    patcher = patcher_of("global")
    in_bf16 = EntropyPatcher(patcher.entropy_model, patcher.config, precision="bf16")
    prompts = [TEXT[begin : begin + 200] for begin in range(0, 1000, 100)]
    # In bf16 some patches differ, so the precision matters here.
    assert any((in_bf16.starts(prompt) != patcher.starts(prompt)).any() for prompt in prompts)
    for prompt in prompts:
        ids = np.frombuffer(b"\0" + prompt, np.uint8)
        wanted = FullPass(model, patcher, 1, None, "fp32").prefill([ids])
        got = FullPass(model, in_bf16, 1, None, "fp32").prefill([ids])
        assert torch.equal(got, wanted)


def test_a_prompt_of_10000_bytes():
    model = model_of()
    patcher = patcher_of("global")
    prompt = (TEXT * 6)[:10_000]
    for context in (None, 512):
        cached = generate(model, patcher, prompt, 5, context_bytes=context)
        assert cached == generate(model, patcher, prompt, 5, context_bytes=context, cached=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=1.0),
        dict(temperature=1.3, top_p=0.9, draft_bytes=4, draft_confidence=0.01),
    ],
)
def test_rows_of_a_batch_are_as_if_alone(options):
    model = model_of()
    patcher = patcher_of("global")
    prompts = [b"", TEXT[:300], b"two books", b"\xff\x00"]
    together = generate(model, patcher, prompts, 30, seed=5, **options)
    for row, prompt in enumerate(prompts):
        assert together[row] == generate(model, patcher, prompt, 30, seed=5 + row, **options)
    assert len(together) == len(prompts)
    assert len(set(together)) > 1
    assert generate(model, patcher, [], 5) == []


def test_drafts_change_no_sample():
    model = model_of()
    patcher = patcher_of("monotonic")
    with torch.no_grad():
        model.head.weight.mul_(3)
    for temperature in (0.0, 1.0):
        plain = generate(model, patcher, TEXT[:50], 60, temperature=temperature)
        for draft_bytes in (1, 5, 20):
            drafts = dict(draft_bytes=draft_bytes, draft_confidence=0.0)
            drafted = generate(model, patcher, TEXT[:50], 60, temperature=temperature, **drafts)
            assert drafted == plain


def test_good_drafts_are_kept():
    """If the entropy model always agrees with the BLT, a pass gives all drafts and one byte more."""
    model = model_of()
    patcher = patcher_of("global")
    # All logits are equal, so byte 0 is the most likely.
    with torch.no_grad():
        model.head.weight.zero_()
        patcher.entropy_model.head.weight.zero_()
    n_bytes = 1 + 4 * 6
    drafts = dict(draft_bytes=3, draft_confidence=0.0)
    generator = Generator(model, patcher, [b"ab"], n_bytes, SamplingConfig(), **drafts)
    assert sum(1 for _ in generator.steps()) == 1 + 6
    assert generator.accepted == generator.drafted == 18
    assert generator.samplers[0].final_bytes() == bytes(25)


LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05] + [1e-9] * 253))


def frequencies(**options):
    sampler = Sampler(b"", 4000, SamplingConfig(seed=1, **options))
    choices = [sampler.choose(LOGITS) for _ in range(4000)]
    return np.bincount(choices, minlength=4)[:4] / 4000


@pytest.mark.parametrize(
    "options, wanted",
    [
        (dict(temperature=0.0), [1, 0, 0, 0]),
        (dict(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (dict(temperature=0.5), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (dict(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (dict(temperature=1.0, top_p=0.79), [0.625, 0.375, 0, 0]),
        (dict(temperature=1.0, top_p=0.4), [1, 0, 0, 0]),
        (dict(temperature=1.0, min_p=0.25), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
    ],
)
def test_sampling_follows_the_probabilities(options, wanted):
    np.testing.assert_allclose(frequencies(**options), wanted, atol=0.025)


def test_no_repeat_bytes():
    model = model_of()
    patcher = patcher_of("global")
    text = b"abcabd" + generate(model, patcher, b"abcabd", 60, no_repeat_bytes=2)
    # The prompt itself has ab twice.
    pairs = [text[i : i + 2] for i in range(4, len(text) - 1)]
    assert len(set(pairs)) == len(pairs)
    assert not {b"ab", b"bc", b"ca"} & set(pairs)


def test_stop_strings_end_a_text_before_them():
    model = model_of()
    patcher = patcher_of("space")
    whole = generate(model, patcher, b"x", 40, temperature=1.0, seed=2)
    stop = ["\udcff\udcfe", whole[10:12].decode("utf-8", "surrogateescape")]
    config = SamplingConfig(temperature=1.0, seed=2, stop=stop)
    generator = Generator(model, patcher, [b"x"], 40, config)
    seen = []
    for _ in generator.steps():
        seen.append(generator.samplers[0].final_bytes())
    wanted = whole[: whole.index(whole[10:12])]
    assert seen[-1] == wanted
    # No byte is shown and then removed.
    assert all(wanted.startswith(shown) for shown in seen)


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=30), st.integers(1, 6))
def test_final_bytes_only_grow(text, n):
    stop = "xyz"[: 1 + n % 3]
    sampler = Sampler(b"ab", 40, SamplingConfig(stop=[stop]))
    last = b""
    for byte in text:
        if not sampler.is_over:
            sampler.choose(np.eye(257)[byte])
            assert sampler.final_bytes().startswith(last)
            last = sampler.final_bytes()


def test_a_stop_string_longer_than_the_text_shows_nothing_early():
    """Without a prompt, more bytes could still be removed than there are."""
    sampler = Sampler(b"", 40, SamplingConfig(stop=["abcdef"]))
    for byte in b"abcd":
        sampler.choose(np.eye(257)[byte])
        assert sampler.final_bytes() == b""


def test_bad_settings_get_errors():
    model = model_of()
    patcher = patcher_of("space")
    with pytest.raises(ValueError, match="drafts come from the entropy model"):
        generate(model, patcher, b"", 3, draft_bytes=2)
    for name, value in (
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", 0),
        ("min_p", 1.0),
        ("stop", [""]),
        ("context_bytes", 1),
        ("no_repeat_bytes", 0),
    ):
        with pytest.raises(ValueError, match=name):
            generate(model, patcher, b"", 3, **{name: value})
    for make in (lambda: GenerateConfig(max_new_bytes=0), lambda: generate(model, patcher, b"", 0)):
        with pytest.raises(ValueError, match="max_new_bytes is 0"):
            make()
    for flags in (dict(prompt=["a"], prompt_file="b"), dict(prompt=["a"], interactive=True)):
        with pytest.raises(ValueError, match="only one of prompt, prompt_file and interactive"):
            GenerateConfig(**flags)


def test_an_error_leaves_the_model_in_its_mode():
    model = model_of().train()
    with pytest.raises(ValueError, match="drafts come from the entropy model"):
        generate(model, patcher_of("space"), b"", 3, draft_bytes=2)
    assert model.training


def test_a_single_byte_has_no_speed(folder):
    """It comes with the pass over the prompt."""
    _, _, errors = run_here(folder[0], "generate", "--prompt", "a", "--max_new_bytes", 1, "--temperature", 0)
    assert "1 bytes after" in errors and "a second" not in errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model, patcher = model_of(), patcher_of("global")
    write_blt(folder / "checkpoints", model, patcher.config, patcher.entropy_model, "bf16", row_bytes=128)
    return folder, model, EntropyPatcher(patcher.entropy_model, patcher.config)


def test_the_script_streams_what_generate_returns(folder):
    folder, model, patcher = folder
    new = generate(model, patcher, "Büch", 30, temperature=0.9, seed=3, context_bytes=128)
    flags = "--max_new_bytes 30 --temperature 0.9 --seed 3 --draft_bytes 3 --draft_confidence 0.01"
    status, printed, errors = run_here(folder, "generate", "--prompt", "Büch", *flags.split())
    assert status == 0, errors
    assert printed == "Büch" + new.decode(errors="replace") + "\n"
    assert "a second" in errors
    assert "drafts accepted" in errors


def test_the_script_reads_lines(folder):
    flags = "--interactive --max_new_bytes 3 --temperature 0".split()
    printed = output_of(folder[0], "generate", *flags, stdin=b"one\ntwo\n\nthree\n")
    assert printed.count("\n") >= 2
    # An empty line ends the dialogue.
    assert printed.startswith("one")
    assert "two" in printed
    assert "three" not in printed
    assert "not found" in error_of(folder[0], "generate", "--prompt_file", "none.txt")
