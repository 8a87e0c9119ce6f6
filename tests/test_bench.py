"""bench.py and blt/flops.py: FLOPs as torch counts them, the textbook model, the script."""

import json
import multiprocessing
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, output_of, run_command
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

SMALL = dict(
    encoder_dim=32,
    encoder_heads=2,
    hash_rows=97,
    ngram_sizes=[2, 4],
    global_layers=2,
    global_dim=48,
    global_heads=3,
    decoder_layers=2,
    decoder_dim=32,
    decoder_heads=2,
    window=8,
)
CONFIGS = {
    "plain": {},
    "k1, other widths, window beyond the row": dict(cross_attn_k=1, decoder_dim=64, window=512),
    "k4 without widening, odd window": dict(
        cross_attn_k=4,
        global_dim=128,
        global_heads=2,
        window=7,
    ),
    "qk_norm, mean pooling": dict(qk_norm=True, pooling="mean"),
    "squared ReLU, soft cap": dict(relu2=True, logit_softcap=2.0),
    "cross-attention in all encoder layers, in the first decoder layer": dict(
        encoder_layers=3,
        cross_attn_all_layers_encoder=True,
        cross_attn_all_layers_decoder=False,
    ),
    "cross-attention after the last of several encoder layers": dict(encoder_layers=2, decoder_layers=3),
    "no n-grams, window 1, other theta and epsilon": dict(
        ngram_sizes=[],
        window=1,
        rope_theta=100.0,
        norm_eps=1e-2,
    ),
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
    """(ids, patch lengths): document boundaries also lie inside patches, and rows have padded slots."""
    rng = np.random.default_rng(seed)
    # Few letters, so that n-grams repeat.
    ids = rng.integers(97, 101, (B, T))
    ids[rng.random((B, T)) < 0.1] = BOUNDARY
    ids[0, 0] = BOUNDARY
    is_start = rng.random((B, T + 1)) < np.array([0.3, 0.15, 0.5])[:B, None]
    is_start[:, :2] = True
    # The last target is a patch of its own in row 0, and not in row 1.
    is_start[0, -1] = True
    is_start[1, -1] = False
    lengths = [np.diff(np.flatnonzero(row), append=T + 1) for row in is_start]
    padded = torch.zeros(B, max(map(len, lengths)) + 2, dtype=torch.int64)
    for row, values in zip(padded, lengths):
        row[: len(values)] = torch.from_numpy(values)
    check_patch_lengths(padded, T + 1)
    return torch.from_numpy(ids), padded


def logits_and_gradients(model, logits, ids):
    """Logits, and the gradients of their cross-entropy by parameter name, 0 where there is none."""
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = torch.zeros(()) if parameter.grad is None else parameter.grad.clone()
    return logits.detach(), gradients


@configs
def test_textbook_equals_model_with_gradients(difference):
    model = random_model(**difference)
    ids, lengths = random_rows()
    ours, our_gradients = logits_and_gradients(model, model(ids, lengths), ids)
    plain, plain_gradients = logits_and_gradients(model, plain_logits(model, ids, lengths), ids)
    assert ours.std() > 0.3
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-5, rtol=1e-3, msg=name)


def test_textbook_keeps_documents_and_patches_apart():
    """A test of the textbook model itself: which logits change after one byte has changed."""
    model = random_model()
    ids = torch.full((1, 12), 97)
    # The last id of the patch 4 to 7, which belongs to the new document.
    ids[0, 7] = BOUNDARY
    lengths = torch.tensor([[1, 3, 4, 3, 2]])
    changed = {}
    with torch.no_grad():
        before = plain_logits(model, ids, lengths)[0]
        for t in (5, 9):
            other_ids = ids.clone()
            other_ids[0, t] = 98
            difference = plain_logits(model, other_ids, lengths)[0] - before
            changed[t] = difference.abs().amax(1) > 1e-6
    # The rest of its own document changes, and nothing after the boundary.
    assert changed[5].tolist() == [False] * 5 + [True] * 2 + [False] * 5
    assert changed[9].tolist() == [False] * 9 + [True] * 3


def test_bf16_of_the_model_is_the_textbook_within_rounding():
    model = random_model()
    ids, lengths = random_rows()
    with torch.no_grad():
        plain = plain_logits(model, ids, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            ours = model(ids, lengths)
    error = (ours.float() - plain).abs()
    assert 0 < error.mean() < 0.02, error.mean()
    assert error.max() < 0.15, error.max()


# ---- FLOPs


def counted(function, *arguments):
    """FLOPs of a call as torch counts them: "mm" of dense layers, "attention" of scores and values.

    torch counts whole blocks of the attention mask.
    """
    counter = FlopCounterMode(display=False)
    # torch does not count the CPU's fused kernel, so attention is computed by plain products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        function(*arguments)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    mm = counts.get("aten.mm", 0) + counts.get("aten.addmm", 0)
    return {"mm": mm, "attention": sum(counts.values()) - mm}


@configs
def test_flops_of_a_blt_are_those_that_torch_counts(difference):
    model = random_model(**difference)
    c = model.config
    T = 64
    P = 16
    B = 2
    ids = torch.randint(0, 256, (B, T))
    lengths = torch.full((B, P), 4)
    lengths[:, 0] = 1
    lengths[:, -1] = T + 1 - 1 - 4 * (P - 2)
    check_patch_lengths(lengths, T + 1)
    parts = blt_flops(c, T / P, T)
    found = counted(model, ids, lengths)

    n = mean_positions(T, c.window)
    encoder = c.encoder_layers * attention_flops(c.encoder_dim, n)
    decoder = c.decoder_layers * attention_flops(c.decoder_dim, n)
    latent = c.global_layers * attention_flops(c.global_dim, (P + 1) / 2) * P / T
    attention = encoder + decoder + latent
    assert parts["encoder attention"] == encoder
    assert parts["latent attention"] == pytest.approx(latent)

    # Dense products: exactly equal. The scores and values of cross-attention are sums and gathers
    # here, which torch does not count as products.
    n_encoder_cross = c.encoder_layers if c.cross_attn_all_layers_encoder else 1
    n_decoder_cross = c.decoder_layers if c.cross_attn_all_layers_decoder else 1
    cross_width = n_encoder_cross * c.encoder_dim + n_decoder_cross * c.decoder_dim
    cross = attention_flops(cross_width, c.cross_attn_k)
    dense = sum(parts.values()) - attention - cross
    assert B * T * dense == pytest.approx(found["mm"], rel=1e-12)

    # Attention: torch counts whole blocks and whole rows of patches. The formula counts only the
    # positions that the mask allows.
    assert B * T * attention <= found["attention"]
    assert B * T * latent <= B * c.global_layers * attention_flops(c.global_dim, P) * P


def test_mean_positions_by_hand():
    assert mean_positions(4, 2) == (1 + 2 + 2 + 2) / 4
    assert mean_positions(4) == 2.5
    assert mean_positions(3, 3) == mean_positions(3, 99) == 2.0
    for length, window in ((1, 1), (7, 3), (100, 64)):
        positions = np.minimum(np.arange(length) + 1, window)
        assert mean_positions(length, window) == pytest.approx(positions.mean())
    # Of several documents all positions together: 1, 2, 2, 2 and 1, 2.
    assert mean_positions([4, 2], 2) == 10 / 6 and mean_positions(np.array([4.0, 4.0])) == 2.5


def test_flops_of_the_entropy_model_are_those_that_torch_counts():
    c = EntropyConfig(d_model=32, n_heads=2, n_layers=3, max_seq_len=8)
    parts = transformer_flops(c.d_model, c.n_layers, c.vocab_size, 40, c.max_seq_len)
    found = counted(MinimalLLM(c), torch.randint(0, 256, (2, 40)))
    assert 80 * (parts["layers"] + parts["head"]) == found["mm"]
    assert 80 * parts["attention"] <= found["attention"]
    assert parts["layers"] == 3 * block_flops(32) == 3 * 2 * (4 * 32 * 32 + 3 * 32 * 256)


def test_flat_shape_has_nearly_the_flops():
    for wanted in (2e6, 6e6, 50e6, 600e6):
        shape = flat_shape_of_equal_flops(wanted, 4096, 512)
        flops = sum(transformer_flops(*shape, 257, 4096, 512).values())
        assert abs(flops / wanted - 1) < 0.05, shape
    with pytest.raises(ValueError, match="above 0"):
        flat_shape_of_equal_flops(0, 4096, 512)


def test_peaks():
    flops, source = listed_peak("NVIDIA H200", "bf16")
    assert flops == 989.4e12
    assert source == "NVIDIA Hopper architecture paper, of which the H200 has the same cores"
    assert listed_peak("Tesla T4", "fp16")[0] == 65e12
    assert listed_peak("Tesla T4", "bf16") is None
    for other in (
        "NVIDIA H200 NVL",
        "NVIDIA H200 MIG 1g.18gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
    ):
        assert listed_peak(other, "bf16") is None
    peak = measured_peak(torch.device("cpu"), "fp32", shapes=[(256, 256, 256)], seconds=0.02)
    assert 1e8 < peak < 1e14


# ---- bench.py


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def job(folder, kind="ours", **changes):
    """A `Job` on the CPU in fp32, with static patches of 4 bytes in two rows of 64."""
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
        # The losses differ a little: transformers' model has 3 classes more.
        our_loss = Runner(job(folder, one_document=True)).step(0)[1]
        assert loss == pytest.approx(our_loss, rel=0.05)
    n_positions, n_classes = ours.logits().shape
    assert 50 <= n_positions <= 64
    assert n_classes == 257
    # Other weights give other logits.
    other_seed = replace(ours.job.config, seed=1)
    stranger = Runner(job(folder, one_document=True, config=other_seed))
    assert np.abs(ours.logits() - stranger.logits()).max() > 0.1


def test_flat_candidate(folder):
    pytest.importorskip("template_llm")
    _, loss = Runner(job(folder, "flat")).step(0)
    assert 3 < loss < 9


def test_where_the_time_of_a_step_goes(folder):
    runner = Runner(job(folder))
    assert runner.steps(0) > 0
    profile = runner.profile(0)
    milliseconds = [row[0] for row in profile]
    assert milliseconds == sorted(milliseconds, reverse=True) and min(milliseconds) > 0
    # A name for each product of a forward and a backward pass, and none for what torch marks.
    calls = {name: calls for _, calls, name in profile}
    assert calls["aten::mm"] >= 10 and not any("Optimizer.step" in name for name in calls)


def test_settings_are_tried_and_the_fastest_is_taken(folder):
    config = replace(job(folder).config, precision="auto")
    runner = Runner(job(folder, "transformers", precision="auto", config=config))
    # The time of each setting that works; a setting that does not has a message.
    works = {name: time for name, time in runner.facts["tried"].items() if isinstance(time, float)}
    assert {"fp32, eager", "fp32, sdpa"} <= set(works)
    assert runner.facts["setting"] == min(works, key=works.get)


def test_facts_about_the_rows(folder):
    for patches, size in (("static:4", 4), ("random", 4.5)):
        facts = Runner(job(folder, row_bytes=512, patches=patches)).facts
        assert facts["bytes_per_patch"] == pytest.approx(size, rel=0.06)
        assert 0 <= facts["padding"]["bytes"] < 0.2
        assert 0 <= facts["padding"]["patches"] < 0.3
        assert 900 < facts["step_bytes"] <= 1024


def test_a_process_answers_and_reports_its_errors(folder):
    ours, theirs = multiprocessing.Pipe()
    ours.send(("memory",))
    ours.send(("no_such_method",))
    serve(theirs, job(folder, "transformers", model=TINY))
    is_good, facts = ours.recv()
    assert is_good
    assert facts["kind"] == "transformers"
    _, used = ours.recv()
    assert used["state_bytes"] >= 4 * facts["parameters"]
    message = "AttributeError: 'Runner' object has no attribute 'no_such_method'"
    assert ours.recv() == (False, message)


def test_a_process_reports_a_model_that_cannot_be_made(folder):
    ours, theirs = multiprocessing.Pipe()
    # Would end a process that accepts the model, so that the test fails instead of waiting.
    ours.send(("no_such_method",))
    serve(theirs, job(folder, "transformers", model=replace(TINY, qk_norm=True)))
    is_good, message = ours.recv()
    assert not is_good
    assert "BLTConfig.qk_norm is True" in message


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
    flags = {field.name for field in fields(ModelFlags)}
    assert {field.name for field in fields(BLTConfig)} <= flags, "every field of BLTConfig needs a flag"
    config = BenchConfig(hash_rows=123, row_bytes=77)
    model, row_bytes, batch_rows = find_model("llm:small:cpu", config)
    # The size is small's, the batch is the CPU's, and a flag beats both.
    assert (model.global_dim, model.hash_rows) == (384, 123)
    assert (row_bytes, batch_rows) == (77, 4)
    assert find_model("custom", config)[0] == BLTConfig(hash_rows=123)
    assert find_model("llm_large", config)[0].global_layers == 20
    path = folder / "model.json"
    settings = {"row_bytes": 99, "batch_rows": 3, **asdict(TINY)}
    corpus = {"dataset": "sample", "sha256": None}
    RunRecord("blt", asdict(TINY) | {"global_dim": 64}, settings, corpus).save(path)
    assert find_model(str(path), BenchConfig()) == (replace(TINY, global_dim=64), 99, 3)
    # A baseline's record would give a BLT of default sizes.
    RunRecord("flat", {"dim": 64}, settings, corpus).save(path)
    with pytest.raises(ValueError, match="of kind 'flat'; bench.py measures BLTs"):
        find_model(str(path), BenchConfig())


def test_mistakes_are_named():
    for change, message in (
        (dict(against=["cuda"]), "against is .*transformers, flat, loop"),
        (dict(patches="static:x"), "patches is"),
        (dict(patches="global"), "patches is"),
        (dict(repeats=0), "repeats is 0"),
        (dict(scaling_rows=[64], scaling_bytes=32), "scaling_rows is"),
        (dict(output="x.txt"), "output is"),
    ):
        with pytest.raises(ValueError, match=message):
            BenchConfig(**change)
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        find_model("llm:huge", BenchConfig())
    with pytest.raises(ValueError, match="'gpt'; it must be llm, llm_large"):
        find_model("gpt", BenchConfig())
    with pytest.raises(FileNotFoundError, match="nowhere.json not found"):
        find_model("nowhere.json", BenchConfig())
    with pytest.raises(ValueError, match="encoder_dim is 36"):
        find_model("custom", BenchConfig(encoder_dim=36, encoder_heads=8))


def test_median_and_quartiles():
    assert spread([4, 1, 2, 3, 5]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}


def test_slope():
    assert log_slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert log_slope([1, 2, 4], [5, 10, 20]) == pytest.approx(1)
    assert log_slope([8], [1]) is None
    assert log_slope([1, 2], [-1, 2]) is None


def test_patching_methods_are_timed(folder):
    speeds = bench_patching(job(folder).config)
    assert set(speeds) == {"global", "monotonic", "both", "static", "space", "cumulative"}
    assert all(1e5 < speed["median"] < 1e11 for speed in speeds.values())
    assert speeds["global"]["median"] > speeds["cumulative"]["median"]


def card_flags():
    """Flags for a speed card of TINY alone."""
    sizes = []
    for name, value in vars(TINY).items():
        # TINY has the defaults of the fields of other types.
        if value is None or isinstance(value, (bool, list)):
            continue
        sizes += [f"--{name}", value]
    return [
        *["--models", "custom", *sizes],
        *"--row_bytes 64 --batch_rows 2 --patches static:2 --repeats 2 --warmup 1".split(),
        *"--no_entropy_pass --no_repatching --precision fp32 --device cpu".split(),
    ]


def check_card(out):
    """What bench.json says about TINY."""
    (model,) = out["models"]
    assert out["precision"] == "fp32"
    assert out["threads"] == 1
    assert 1e9 < out["peak_flops"] < 1e13
    assert "measured" in out["peak_source"]

    step_ms = model["step_ms"]
    forward_ms = model["forward_ms"]["median"]
    forward_backward_ms = model["forward_backward_ms"]["median"]
    assert 0 < forward_ms < forward_backward_ms < step_ms["median"]
    assert step_ms["q1"] <= step_ms["median"] <= step_ms["q3"]
    assert step_ms["n"] == 2
    bytes_per_second = 1000 * model["step_bytes"] / step_ms["median"]
    assert model["bytes_per_second"] == pytest.approx(bytes_per_second)
    flops = sum(model["flops_per_byte"].values())
    assert flops == pytest.approx(sum(blt_flops(TINY, model["bytes_per_patch"], 64).values()))
    mfu = 3 * flops * model["bytes_per_second"] / out["peak_flops"]
    assert model["mfu"] == pytest.approx(mfu)
    assert 0 < model["mfu"] < 1
    assert model["parameters"] == sum(p.numel() for p in BLTModel(TINY).parameters())
    assert model["compile_s"] is None


def test_a_speed_card(folder):
    printed = output_of(folder, "bench", *card_flags())
    check_card(json.loads((folder / "bench.json").read_text()))
    for words in ("train custom", "FLOPs/byte", "wrote bench.json"):
        assert words in printed


@pytest.mark.slow
def test_the_script(folder):
    """As a command, with other candidates and the scaling."""
    flags = [
        *"--against transformers loop".split(),
        *"--scaling --scaling_rows 64 128 --scaling_bytes 128 --scaling_patches 2 --scaling_widths 1".split(),
    ]
    printed = run_command(folder, "bench", *card_flags(), *flags)
    out = json.loads((folder / "bench.json").read_text())
    check_card(out)
    against, loop = out["against"]
    scaling = out["scaling"]
    assert loop["kind"] == "loop"
    assert loop["time_ratio"]["step_ms"]["n"] == 2
    assert against["logits_difference"] < 1e-3
    assert against["theirs"]["kind"] == "transformers"
    assert set(against["theirs"]["tried"]) == {"fp32, eager", "fp32, sdpa"}
    assert 0.02 < against["time_ratio"]["step_ms"]["median"] < 100

    equal_bytes = [(point["row_bytes"], point["batch_rows"]) for point in scaling["equal_bytes"]]
    assert equal_bytes == [(64, 2), (128, 1)]
    assert [point["batch_rows"] for point in scaling["one_row"]] == [1, 1]
    assert -1 < scaling["slopes"]["step time of one row"] < 2
    assert (folder / "bench_scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for words in (
        "train custom",
        "FLOPs/byte",
        "custom against transformers",
        "custom against loop",
        "slope of log",
        "wrote bench.json",
    ):
        assert words in printed, words


def test_a_mistake_on_the_command_line_is_one_line(folder):
    assert "unknown preset 'huge'" in error_of(folder, "bench", "--models", "llm:huge")
