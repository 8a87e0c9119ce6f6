"""bench.py and flops.py: FLOPs against torch's counter, the textbook model against the fast one, the script."""

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    TINY,
    BenchConfig,
    Job,
    ModelFlags,
    Runner,
    bench_patching,
    find_model,
    log_slope,
    memory,
    reset_peak,
    serve,
    spread,
)
from blt.flops import (
    attention_flops,
    block_flops,
    blt_flops,
    flat_shape_of_equal_flops,
    listed_peak,
    mean_positions,
    measured_peak,
    transformer_flops,
)
from blt.ids import BOUNDARY
from blt.plain_blt import plain_logits
from blt.records import RunRecord
from blt.segments import check_patch_lengths
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    encoder_dim=32, encoder_heads=2, hash_rows=97, ngram_sizes=[2, 4], global_layers=2, global_dim=48, global_heads=3,
    decoder_layers=2, decoder_dim=32, decoder_heads=2, window=8,
)  # fmt: skip
CONFIGS = {
    "plain": {},
    "k1, other widths, window beyond the row": dict(cross_attn_k=1, decoder_dim=64, window=512),
    "k4 without widening, odd window": dict(cross_attn_k=4, global_dim=128, global_heads=2, window=7),
    "qk_norm, mean pooling": dict(qk_norm=True, pooling="mean"),
    "cross-attention in all encoder layers, in the first decoder layer": dict(
        encoder_layers=3, cross_attn_all_layers_encoder=True, cross_attn_all_layers_decoder=False
    ),
    "cross-attention after the last of several encoder layers": dict(encoder_layers=2, decoder_layers=3),
    "no n-grams, window 1, other theta and epsilon": dict(ngram_sizes=[], window=1, rope_theta=100.0, norm_eps=1e-2),
}
configs = pytest.mark.parametrize("difference", CONFIGS.values(), ids=CONFIGS.keys())


def random_model(**difference):
    """A model whose norms are random too, so that each weight matters."""
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**{**SMALL, **difference})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def random_rows(B=3, T=41, seed=0):
    """ids with boundaries anywhere, also inside patches, and patch lengths, rows with fewer patches padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(97, 101, (B, T))  # few letters: n-grams repeat
    ids[rng.random((B, T)) < 0.1] = BOUNDARY
    ids[0, 0] = BOUNDARY
    starts = rng.random((B, T + 1)) < np.array([0.3, 0.15, 0.5])[:B, None]
    starts[:, :2] = True
    starts[0, -1], starts[1, -1] = True, False  # the last target in a patch of its own, and not
    lengths = [np.diff(np.flatnonzero(row), append=T + 1) for row in starts]
    padded = torch.zeros(B, max(map(len, lengths)) + 2, dtype=torch.int64)
    for row, values in zip(padded, lengths):
        row[: len(values)] = torch.from_numpy(values)
    check_patch_lengths(padded, T + 1)
    return torch.from_numpy(ids), padded


@configs
def test_textbook_equals_model_with_gradients(difference):
    model, (ids, lengths) = random_model(**difference), random_rows()
    results = []
    for logits in (model(ids, lengths), plain_logits(model, ids, lengths)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        results.append(
            (logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (ours, our_gradients), (plain, plain_gradients) = results
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    for name, _ in model.named_parameters():
        zeros = torch.zeros(())
        torch.testing.assert_close(
            our_gradients.get(name, zeros), plain_gradients.get(name, zeros), atol=1e-5, rtol=1e-3, msg=name
        )


def test_textbook_keeps_documents_and_patches_apart():
    """The oracle itself: what it may not see changes nothing, what it may see changes something."""
    model = random_model()
    ids, lengths = torch.full((1, 12), 97), torch.tensor([[1, 3, 4, 3, 2]])
    ids[0, 7] = BOUNDARY  # the last id of the patch 4 to 7, which belongs to the new document
    with torch.no_grad():
        before = plain_logits(model, ids, lengths)[0]
        changed = {
            t: (plain_logits(model, ids.index_fill(1, torch.tensor([t]), 98), lengths)[0] - before).abs().amax(1) > 1e-6
            for t in (5, 9)
        }
    assert (
        changed[5].tolist() == [False] * 5 + [True] * 2 + [False] * 5
    )  # its own document after it, and nothing past the boundary
    assert changed[9].tolist() == [False] * 9 + [True] * 3


def test_bf16_of_the_model_is_the_textbook_within_rounding():
    model, (ids, lengths) = random_model(), random_rows()
    with torch.no_grad():
        plain = plain_logits(model, ids, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(ids, lengths)
    error = (ours.float() - plain).abs()
    assert 0 < error.mean() < 0.02 and error.max() < 0.15, (error.mean(), error.max())


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs


def counted(function, *arguments):
    """FLOPs as torch counts them: {"mm": of dense layers, "attention": of scores and values, whole blocks of the mask}."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the CPU's fused kernel is not counted
        function(*arguments)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    mm = sum(n for op, n in counts.items() if op in ("aten.mm", "aten.addmm"))
    return {"mm": mm, "attention": sum(counts.values()) - mm}


@configs
def test_flops_of_a_blt_are_those_that_torch_counts(difference):
    model, T, P, B = random_model(**difference), 64, 16, 2
    c = model.config
    ids, lengths = torch.randint(0, 256, (B, T)), torch.full((B, P), 4)
    lengths[:, 0], lengths[:, -1] = 1, T + 1 - 1 - 4 * (P - 2)
    check_patch_lengths(lengths, T + 1)
    parts, found = blt_flops(c, T / P, T), counted(model, ids, lengths)
    n_encoder_cross = c.encoder_layers if c.cross_attn_all_layers_encoder else 1
    n_decoder_cross = c.decoder_layers if c.cross_attn_all_layers_decoder else 1
    n = mean_positions(T, c.window)
    attention = {
        "encoder": c.encoder_layers * attention_flops(c.encoder_dim, n), "decoder": c.decoder_layers * attention_flops(c.decoder_dim, n),
        "latent": c.global_layers * attention_flops(c.global_dim, (P + 1) / 2) * P / T,
    }  # fmt: skip
    cross = attention_flops(n_encoder_cross * c.encoder_dim + n_decoder_cross * c.decoder_dim, c.cross_attn_k)
    assert parts["encoder attention"] == attention["encoder"] and parts["latent attention"] == pytest.approx(
        attention["latent"]
    )
    # Dense products: exactly equal. Cross-attention's scores and values are sums and gathers here, which torch counts as no product.
    assert B * T * (sum(parts.values()) - sum(attention.values()) - cross) == pytest.approx(found["mm"], rel=1e-12)
    # Attention: torch counts whole blocks and whole rows of patches, the formula only the places that the mask lets through.
    assert B * T * sum(attention.values()) <= found["attention"]
    assert B * T * attention["latent"] <= B * c.global_layers * attention_flops(c.global_dim, P) * P


def test_attention_places_by_hand():
    assert (
        mean_positions(4, 2) == (1 + 2 + 2 + 2) / 4
        and mean_positions(4) == 2.5
        and mean_positions(3, 3) == mean_positions(3, 99) == 2.0
    )
    for length, window in ((1, 1), (7, 3), (100, 64)):
        assert mean_positions(length, window) == pytest.approx(np.minimum(np.arange(length) + 1, window).mean())


def test_flops_of_the_entropy_model_are_those_that_torch_counts():
    c = EntropyConfig(d_model=32, n_heads=2, n_layers=3, max_seq_len=8)
    parts = transformer_flops(c.d_model, c.n_layers, c.vocab_size, 40, c.max_seq_len)
    found = counted(MinimalLLM(c), torch.randint(0, 256, (2, 40)))
    assert 80 * (parts["layers"] + parts["head"]) == found["mm"] and 80 * parts["attention"] <= found["attention"]
    assert parts["layers"] == 3 * block_flops(32) == 3 * 2 * (4 * 32 * 32 + 3 * 32 * 256)


def test_flat_shape_has_nearly_the_flops():
    for wanted in (2e6, 6e6, 50e6, 600e6):
        shape = flat_shape_of_equal_flops(wanted, 4096, 512)
        assert abs(sum(transformer_flops(*shape, 257, 4096, 512).values()) / wanted - 1) < 0.05, shape
    with pytest.raises(ValueError, match="above 0"):
        flat_shape_of_equal_flops(0, 4096, 512)


def test_peaks():
    assert listed_peak("NVIDIA H200", "bf16") == (
        989.4e12,
        "NVIDIA Hopper architecture paper, of which the H200 has the same cores",
    )
    assert listed_peak("Tesla T4", "fp16")[0] == 65e12 and listed_peak("Tesla T4", "bf16") is None
    for other in (
        "NVIDIA H200 NVL",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ):
        assert listed_peak(other, "bf16") is None
    peak = measured_peak(torch.device("cpu"), "fp32", shapes=[(256, 256, 256)], seconds=0.02)
    assert 1e8 < peak < 1e14


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def job(folder, kind="ours", **changes):
    config = BenchConfig(data_cache=str(folder / "data_cache"), compile="no", repeats=1, warmup=1)
    made = Job(
        kind,
        "tiny",
        TINY,
        64,
        2,
        "static:4",
        config,
        "cpu",
        "fp32",
        1,
        one_document=kind == "transformers",
        flat_shape=(32, 1),
    )
    return replace(made, **changes)


def test_candidates_compute_the_same_model(folder):
    ours = Runner(job(folder, one_document=True))
    for kind in ("transformers", "loop"):
        other = Runner(job(folder, kind, one_document=True, precision="fp32"))
        assert np.abs(ours.logits() - other.logits()).max() < 1e-4
        assert other.facts["bytes_per_patch"] == ours.facts["bytes_per_patch"]
        (forward, backward, update), loss = other.step(0)
        assert min(forward, backward, update) > 0
        assert loss == pytest.approx(
            Runner(job(folder, one_document=True)).step(0)[1], rel=0.05
        )  # theirs has 3 classes more
    places, classes = ours.logits().shape
    assert 50 <= places <= 64 and classes == 257
    stranger = Runner(job(folder, one_document=True, config=replace(ours.job.config, seed=1)))
    assert np.abs(ours.logits() - stranger.logits()).max() > 0.1


def test_flat_candidate(folder):
    pytest.importorskip("template_llm")
    _, loss = Runner(job(folder, "flat")).step(0)
    assert 3 < loss < 9


def test_settings_are_tried_and_the_fastest_is_taken(folder):
    runner = Runner(job(folder, "transformers", precision="auto", config=replace(job(folder).config, precision="auto")))
    works = {name: s for name, s in runner.facts["tried"].items() if isinstance(s, float)}
    assert {"fp32, eager", "fp32, sdpa"} <= set(works) and runner.facts["setting"] == min(works, key=works.get)


def test_rows_and_what_is_said_of_them(folder):
    for patches, size in (("static:4", 4), ("random", 4.5)):
        facts = Runner(job(folder, row_bytes=512, patches=patches)).facts
        assert facts["bytes_per_patch"] == pytest.approx(size, rel=0.06)
        assert 0 <= facts["padding"]["bytes"] < 0.2 and 0 <= facts["padding"]["patches"] < 0.3
        assert 900 < facts["step_bytes"] <= 1024


def test_a_process_answers_and_reports_its_errors(folder):
    for model, wanted in ((TINY, (True, "tiny")), (replace(TINY, qk_norm=True), (False, "BLTConfig.qk_norm is True"))):
        ours, theirs = multiprocessing.Pipe()
        ours.send(("memory",))
        ours.send(("no_such_method",))
        serve(theirs, job(folder, "transformers", model=model))
        is_good, answer = ours.recv()
        assert is_good == wanted[0] and (is_good or wanted[1] in answer)
        if is_good:
            assert answer["kind"] == "transformers" and ours.recv()[1]["state_bytes"] >= 4 * answer["parameters"]
            assert ours.recv() == (False, "AttributeError: 'Runner' object has no attribute 'no_such_method'")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_seen_and_forgotten():
    cpu = torch.device("cpu")
    before = memory(cpu)
    large = torch.ones(50_000_000)
    del large
    assert 150e6 < memory(cpu, peak=True) - before < 400e6
    reset_peak(cpu)
    assert memory(cpu, peak=True) - before < 100e6


def test_models_by_name(folder):
    assert {f.name for f in fields(BLTConfig)} <= {f.name for f in fields(ModelFlags)}, (
        "every field of BLTConfig needs a flag"
    )
    config = BenchConfig(hash_rows=123, row_bytes=77)
    model, row_bytes, batch_rows = find_model("llm:small:cpu", config)
    # The size is small's, the batch is the CPU's, and a flag beats both.
    assert (model.global_dim, model.hash_rows, row_bytes, batch_rows) == (384, 123, 77, 4)
    assert find_model("custom", config)[0] == BLTConfig(hash_rows=123)
    assert find_model("llm_large", config)[0].global_layers == 20
    record = folder / "model.json"
    settings = {"row_bytes": 99, "batch_rows": 3, **asdict(TINY)}
    RunRecord("blt", {"global_dim": 64}, settings, {"dataset": "sample", "sha256": None}).save(record)
    assert find_model(str(record), BenchConfig()) == (replace(TINY, global_dim=64), 99, 3)


def test_mistakes_are_named():
    for change, message in (
        (dict(against=["cuda"]), "against is .*transformers, flat, loop"), (dict(patches="static:x"), "patches is"), (dict(patches="global"), "patches is"),
        (dict(repeats=0), "repeats is 0"), (dict(scaling_rows=[64], scaling_bytes=32), "scaling_rows is"), (dict(output="x.txt"), "output is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            BenchConfig(**change)
    for name, message in (("llm:huge", "unknown preset 'huge'"), ("gpt", "'gpt'; it must be llm, llm_large")):
        with pytest.raises(ValueError, match=message):
            find_model(name, BenchConfig())
    with pytest.raises(FileNotFoundError, match="nowhere.json not found"):
        find_model("nowhere.json", BenchConfig())
    with pytest.raises(ValueError, match="encoder_dim is 36"):
        find_model("custom", BenchConfig(encoder_dim=36, encoder_heads=8))


def test_median_and_quartiles():
    assert spread([4, 1, 2, 3, 5]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}


def test_slope():
    assert log_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2) and log_slope([1, 2, 4], [5, 10, 20]) == pytest.approx(
        1
    )
    assert log_slope([8], [1]) is None and log_slope([1, 2], [-1, 2]) is None


def test_patching_rules_are_timed(folder):
    speeds = bench_patching(job(folder).config)
    assert set(speeds) == {"global", "monotonic", "both", "static", "space", "cumulative"}
    assert (
        all(1e5 < speed["median"] < 1e11 for speed in speeds.values())
        and speeds["global"]["median"] > speeds["cumulative"]["median"]
    )


def run(folder, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, ROOT / "bench.py", *map(str, flags)],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env=environment,
    )


def test_the_script(folder):
    tiny = [
        x
        for name, value in vars(TINY).items()
        if value not in (None, []) and not isinstance(value, (bool, list))
        for x in (f"--{name}", value)
    ]
    flags = [
        "--models", "custom", *tiny, "--row_bytes", 64, "--batch_rows", 2, "--patches", "static:2", "--repeats", 2, "--warmup", 1, "--no_entropy_pass", "--no_repatching",
        "--against", "transformers", "loop", "--scaling", "--scaling_rows", 64, 128, "--scaling_bytes", 128, "--scaling_patches", 2, "--scaling_widths", 1, "--precision", "fp32",
    ]  # fmt: skip
    done = run(folder, *flags)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-1000:] + done.stderr[-2000:]
    out = json.loads((folder / "bench.json").read_text())
    (model,), (against, loop), scaling = out["models"], out["against"], out["scaling"]
    assert out["precision"] == "fp32" and out["threads"] == 1 and 1e9 < out["peak_flops"] < 1e13
    assert 0 < model["forward_ms"]["median"] < model["forward_backward_ms"]["median"] < model["step_ms"]["median"]
    assert model["step_ms"]["q1"] <= model["step_ms"]["median"] <= model["step_ms"]["q3"] and model["step_ms"]["n"] == 2
    assert model["bytes_per_second"] == pytest.approx(1000 * model["step_bytes"] / model["step_ms"]["median"])
    flops = sum(model["flops_per_byte"].values())
    assert flops == pytest.approx(sum(blt_flops(TINY, model["bytes_per_patch"], 64).values()))
    assert (
        model["mfu"] == pytest.approx(3 * flops * model["bytes_per_second"] / out["peak_flops"])
        and 0 < model["mfu"] < 1
    )
    assert model["parameters"] == sum(p.numel() for p in BLTModel(TINY).parameters()) and model["compile_s"] is None
    assert loop["kind"] == "loop" and loop["time_ratio"]["step_ms"]["n"] == 2 and "measured" in out["peak_source"]
    assert against["logits_difference"] < 1e-3 and against["theirs"]["kind"] == "transformers"
    assert set(against["theirs"]["tried"]) == {"fp32, eager", "fp32, sdpa"}
    assert 0.02 < against["time_ratio"]["step_ms"]["median"] < 100
    assert [p["row_bytes"] for p in scaling["equal_bytes"]] == [64, 128] and [
        p["batch_rows"] for p in scaling["equal_bytes"]
    ] == [2, 1]
    assert [p["batch_rows"] for p in scaling["one_row"]] == [1, 1] and -1 < scaling["slopes"][
        "step time of one row"
    ] < 2
    assert (folder / "bench_scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for text in (
        "train custom",
        "FLOPs/byte",
        "custom against transformers",
        "custom against loop",
        "slope of log",
        "wrote bench.json",
    ):
        assert text in done.stdout


def test_a_mistake_on_the_command_line_is_one_line(folder):
    done = run(folder, "--models", "llm:huge")
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0 and "unknown preset 'huge'" in done.stderr
