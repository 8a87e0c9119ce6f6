"""Generation: cached, uncached, drafted and batched give the same text; sampling, stop strings, streaming."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_incremental import CONFIGS, RULES, TEXT, model_of, patcher_of

from blt.files import model_hash
from blt.records import RunRecord, save_model
from blt.sampling import Sampler, SamplingConfig
from entropy_patcher import EntropyPatcher
from generate import FullPass, GenerateConfig, Generator, generate
from save_entropy_model import save_entropy_model


def test_cached_equals_uncached_on_200_random_prompts():
    """Prompts of 0 to 600 bytes, all rules, models, windows, row lengths; greedy, and drafts where the rule has entropies."""
    generator = np.random.default_rng(0)
    for case in range(200):
        rule, name = sorted(RULES)[case % len(RULES)], sorted(CONFIGS)[case % 5]
        model, patcher = model_of(name, window=int(generator.choice([3, 12, 40]))), patcher_of(rule)
        with torch.no_grad():
            model.head.weight.mul_(4)
        begin, length = (
            int(generator.integers(0, 1000)),
            int(generator.choice([0, 1, 5, 60, 600], p=[0.1, 0.1, 0.3, 0.4, 0.1])),
        )
        prompt = (
            TEXT[begin : begin + length] if case % 2 else generator.integers(0, 256, length).astype(np.uint8).tobytes()
        )
        options = dict(context_bytes=[None, 64][case % 2], no_repeat_bytes=[None, 3][case // 2 % 2])
        wanted = generate(model, patcher, prompt, 8, cached=False, **options)
        assert generate(model, patcher, prompt, 8, **options) == wanted, (case, rule, name)
        if patcher.entropy_model is not None:
            assert generate(model, patcher, prompt, 8, draft_bytes=3, draft_confidence=0.0, **options) == wanted, (
                case,
                rule,
                name,
            )


def test_uncached_text_has_the_patches_of_the_asked_precision():
    """A trained model's patcher may compute in bf16; text written in fp32 has fp32 patches, cached or not."""
    model, patcher = model_of(), patcher_of("global")
    in_bf16 = EntropyPatcher(patcher.entropy_model, patcher.config, precision="bf16")
    prompts = [TEXT[begin : begin + 200] for begin in range(0, 1000, 100)]
    assert any((in_bf16.starts(prompt) != patcher.starts(prompt)).any() for prompt in prompts)  # so that it matters
    for prompt in prompts:
        logits = [
            FullPass(model, p, 1, None, "fp32").prefill([np.frombuffer(b"\0" + prompt, np.uint8)])
            for p in (patcher, in_bf16)
        ]
        assert torch.equal(*logits)


def test_a_prompt_of_10000_bytes():
    model, patcher, prompt = model_of(), patcher_of("global"), (TEXT * 6)[:10_000]
    for context in (None, 512):
        assert generate(model, patcher, prompt, 5, context_bytes=context) == generate(
            model, patcher, prompt, 5, context_bytes=context, cached=False
        )


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=1.0), dict(temperature=1.3, top_p=0.9, draft_bytes=4, draft_confidence=0.01)]
)
def test_rows_of_a_batch_are_as_if_alone(options):
    model, patcher, prompts = model_of(), patcher_of("global"), [b"", TEXT[:300], b"two books", b"\xff\x00"]
    together = generate(model, patcher, prompts, 30, seed=5, **options)
    assert together == [
        generate(model, patcher, prompt, 30, **{**options, "seed": 5 + row}) for row, prompt in enumerate(prompts)
    ]
    assert len(set(together)) > 1 and generate(model, patcher, [], 5) == []


def test_drafts_change_no_sample():
    model, patcher = model_of(), patcher_of("monotonic")
    with torch.no_grad():
        model.head.weight.mul_(3)
    for temperature in (0.0, 1.0):
        plain = generate(model, patcher, TEXT[:50], 60, temperature=temperature)
        for drafts in (1, 5, 20):
            assert (
                generate(
                    model, patcher, TEXT[:50], 60, temperature=temperature, draft_bytes=drafts, draft_confidence=0.0
                )
                == plain
            )


def test_good_drafts_are_kept():
    """An entropy model that always says what the BLT says: every pass but the last gives all drafts and one byte more."""
    model, patcher = model_of(), patcher_of("global")
    with torch.no_grad():
        model.head.weight.zero_()  # all logits equal: byte 0 is the most likely
        patcher.entropy_model.head.weight.zero_()
    generator = Generator(model, patcher, [b"ab"], 1 + 4 * 6, SamplingConfig(), draft_bytes=3, draft_confidence=0.0)
    assert sum(1 for _ in generator.steps()) == 1 + 6 and generator.accepted == generator.drafted == 18
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
    model, patcher = model_of(), patcher_of("global")
    text = b"abcabd" + generate(model, patcher, b"abcabd", 60, no_repeat_bytes=2)
    pairs = [text[i : i + 2] for i in range(4, len(text) - 1)]  # the prompt has ab twice itself
    assert len(set(pairs)) == len(pairs) and not {b"ab", b"bc", b"ca"} & set(pairs)


def test_stop_strings_end_a_text_before_them():
    model, patcher = model_of(), patcher_of("space")
    whole = generate(model, patcher, b"x", 40, temperature=1.0, seed=2)
    config = SamplingConfig(
        temperature=1.0, seed=2, stop=["\udcff\udcfe", whole[10:12].decode("utf-8", "surrogateescape")]
    )
    generator, seen = Generator(model, patcher, [b"x"], 40, config), []
    for _ in generator.steps():
        seen.append(generator.samplers[0].final_bytes())
    wanted = whole[: whole.index(whole[10:12])]
    assert seen[-1] == wanted and all(wanted.startswith(s) for s in seen)  # nothing is shown and then removed


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=30), st.integers(1, 6))
def test_final_bytes_only_grow(text, n):
    sampler, last = Sampler(b"ab", 40, SamplingConfig(stop=["xyz"[: 1 + n % 3]])), b""
    for byte in text:
        if not sampler.is_over:
            sampler.choose(np.eye(257)[byte])
            assert sampler.final_bytes().startswith(last)
            last = sampler.final_bytes()


def test_a_stop_string_longer_than_the_text_shows_nothing_early():
    """Without a prompt: how many bytes may still be removed is then more than there are."""
    sampler = Sampler(b"", 40, SamplingConfig(stop=["abcdef"]))
    for byte in b"abcd":
        sampler.choose(np.eye(257)[byte])
        assert sampler.final_bytes() == b""


def test_bad_settings_get_errors():
    model, patcher = model_of(), patcher_of("space")
    with pytest.raises(ValueError, match="drafts come from the entropy model"):
        generate(model, patcher, b"", 3, draft_bytes=2)
    for bad in (
        dict(temperature=-1),
        dict(top_p=0),
        dict(top_k=0),
        dict(min_p=1.0),
        dict(stop=[""]),
        dict(context_bytes=1),
        dict(no_repeat_bytes=0),
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            generate(model, patcher, b"", 3, **bad)
    with pytest.raises(ValueError, match="max_new_bytes"):
        GenerateConfig(max_new_bytes=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model, patcher = model_of(), patcher_of("global")
    save_entropy_model(patcher.entropy_model, folder / "entropy_model.pth")
    record = RunRecord(
        kind="blt",
        model_config=asdict(model.config),
        settings={"row_bytes": 128},
        corpus={"dataset": "sample", "sha256": None},
        patch_config=asdict(patcher.config),
        precision="bf16",
        entropy_model_path="entropy_model.pth",
        entropy_model_sha256=model_hash(patcher.entropy_model),
    )
    save_model(model, folder / "checkpoints" / "best.pt", record, folder / "checkpoints" / "model.json")
    return folder, model, EntropyPatcher(patcher.entropy_model, patcher.config)


def run(folder, *arguments, **options):
    script = Path(__file__).parent.parent / "generate.py"
    return subprocess.run([sys.executable, script, *arguments], cwd=folder, capture_output=True, timeout=120, **options)


def test_the_script_streams_what_generate_returns(folder):
    folder, model, patcher = folder
    new = generate(model, patcher, "Büch", 30, temperature=0.9, seed=3, context_bytes=128)
    made = run(
        folder,
        "--prompt",
        "Büch",
        "--max_new_bytes",
        "30",
        "--temperature",
        "0.9",
        "--seed",
        "3",
        "--draft_bytes",
        "3",
        "--draft_confidence",
        "0.01",
    )
    assert made.returncode == 0, made.stderr.decode()
    assert made.stdout.decode() == "Büch" + new.decode(errors="replace") + "\n"
    assert "a second" in made.stderr.decode() and "drafts accepted" in made.stderr.decode()


def test_the_script_reads_lines(folder):
    made = run(folder[0], "--interactive", "--max_new_bytes", "3", "--temperature", "0", input=b"one\ntwo\n\nthree\n")
    assert made.returncode == 0 and made.stdout.decode(errors="replace").count("\n") >= 2
    assert made.stdout.startswith(b"one") and b"two" in made.stdout and b"three" not in made.stdout
    assert b"not found" in run(folder[0], "--prompt_file", "none.txt").stderr
