"""What CUDA and Apple GPUs need, as far as a CPU can show it: one fp16 decision, fp16 products, TF32, head widths."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_blt

import blt.device
from blt import loop
from blt.attention import slow_attention
from blt.device import allow_tf32, choose_device, restore_matmul_precision, what_triton_lacks
from blt.loop import RunConfig, compile_losses
from blt.metric import add_up
from blt.optimizers import clip_gradients, make_optimizers, orthogonalize, products_dtype, step_optimizers
from blt.training import PatchedDataset
from entropy_patcher import EntropyPatcher

RATES = RunConfig(lr=0.01, adam_lr=0.01, table_lr=1.0)
CUDA = torch.device("cuda")


def card(monkeypatch, capability):
    """Let torch say that there is a CUDA device of this capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def train_rows(patch_size=4):
    """Rows of 64 bytes of letters."""
    documents = [np.random.default_rng(i).integers(97, 110, 200, dtype=np.uint8) for i in range(8)]
    patcher = EntropyPatcher(None, threshold=patch_size, method="static")
    return PatchedDataset.from_documents(documents, documents[:1], patcher, 64, 4).train_rows


# fp16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["decoder.blocks.0.attention.wq", "head", "encoder.hash_embedding.tables"])
def test_a_bad_gradient_in_one_optimizer_stops_all_of_them(part, bad):
    """With fp16 no weight and no optimizer state moves, and the scale falls, whichever optimizer has the bad number."""
    torch.manual_seed(0)
    model = tiny_blt()
    optimizers = make_optimizers(model, RATES)
    assert len(optimizers) == 3
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)

    def step(is_bad):
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1024
        if is_bad:
            model.get_parameter(f"{part}.weight").grad.view(-1)[3] = bad
        scaler.scale(torch.zeros(()))
        norm = clip_gradients(model, optimizers, scaler, 1.0)
        step_optimizers(optimizers, scaler, norm)

    step(is_bad=False)
    before = [p.detach().clone() for p in model.parameters()]
    states = [value.clone() for o in optimizers for state in o.state.values() for value in state.values()]
    step(is_bad=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    after = [value for o in optimizers for state in o.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, states))
    assert scaler.get_scale() == 512
    step(is_bad=False)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    assert all(p.isfinite().all() for p in model.parameters())


def test_without_fp16_a_step_reads_no_number():
    """Nothing waits for the device: a norm that cannot be read is never read."""
    model = tiny_blt()
    optimizers = make_optimizers(model, RATES)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    step_optimizers(optimizers, torch.amp.GradScaler("cpu", enabled=False), torch.empty((), device="meta"))


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_muon_uses_the_products_that_the_card_has(monkeypatch, capability, dtype):
    card(monkeypatch, capability)
    assert products_dtype(CUDA) == dtype


@pytest.mark.parametrize("has_bf16, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_uses_the_products_that_the_cpu_has(monkeypatch, has_bf16, dtype):
    """Where a CPU only emulates bf16, Muon in bf16 took two thirds of a training step."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert products_dtype(torch.device("cpu")) == dtype


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_fp16_orthogonalizes_gradients_of_any_size(scale, shape):
    """fp16 has neither 1e-12 nor 1e6. It gives what fp32 gives, as closely as bf16 does or closer."""
    torch.manual_seed(0)
    x = torch.randn(3, *shape) * scale
    coefficients = (3.4445, -4.775, 2.0315)
    wanted, by_bf16, by_fp16 = [
        orthogonalize(x, coefficients, 5, 1e-30, dtype).float()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert (by_fp16 - wanted).abs().max() < 5e-3
    assert (by_fp16 - wanted).norm() <= (by_bf16 - wanted).norm()


# TF32


def test_tf32_is_for_fp32_on_cuda_and_ends_with_training():
    assert torch.get_float32_matmul_precision() == "highest"
    for device, precision, wanted in (
        ("cuda", "fp32", "high"),
        ("cuda", "bf16", "highest"),
        ("cpu", "fp32", "highest"),
    ):
        with restore_matmul_precision():
            allow_tf32(torch.device(device), precision)
            assert torch.get_float32_matmul_precision() == wanted
    with pytest.raises(ZeroDivisionError), restore_matmul_precision():
        allow_tf32(CUDA, "fp32")
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


def test_training_restores_how_products_are_made(monkeypatch, tmp_path):
    """An error inside `fit` does not leave TF32 on for the leak gate of the next run."""
    seen = []

    def stop(*_):
        seen.append(torch.get_float32_matmul_precision())
        raise ValueError("stopped")

    monkeypatch.setattr(loop, "allow_tf32", lambda device, precision: torch.set_float32_matmul_precision("high"))
    monkeypatch.setattr(loop, "compile_losses", stop)
    with pytest.raises(ValueError, match="stopped"):
        loop.fit(tiny_blt(), RunConfig(batch_rows=4), train_rows(), [], tmp_path)
    assert seen == ["high"] and torch.get_float32_matmul_precision() == "highest"


# torch.compile


class Counter:
    """In place of torch.compile: runs the model, and counts its passes and backward passes."""

    def __init__(self, monkeypatch):
        self.forwards = 0
        self.backwards = 0
        self.dynamic = None
        monkeypatch.setattr(torch, "compile", self.compile)

    def compile(self, model, dynamic=None):
        self.dynamic = dynamic

        def run(*inputs):
            logits = model(*inputs)
            self.forwards += 1
            logits.register_hook(self.count)
            return logits

        return run

    def count(self, gradient):
        self.backwards += 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_everything_is_compiled_before_the_clock_starts(monkeypatch, capsys, dropout):
    """With dropout too; and the random numbers that training draws stay those of a run without torch.compile."""
    counter = Counter(monkeypatch)
    model = tiny_blt(dropout=dropout).train()
    torch.manual_seed(7)
    random_state = torch.get_rng_state()
    compile_losses(model, RunConfig(compile="yes", batch_rows=4), train_rows(), torch.device("cpu"), "fp32")
    assert (counter.forwards, counter.backwards, counter.dynamic) == (1, 1, False)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert "compiled in" in capsys.readouterr().out


def test_a_process_compiles_for_each_run_again(monkeypatch):
    resets = []
    Counter(monkeypatch)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    for patch_size in (4, 6):
        settings = RunConfig(compile="yes", batch_rows=4)
        compile_losses(tiny_blt(), settings, train_rows(patch_size), torch.device("cpu"), "fp32")
    assert len(resets) == 2


@pytest.mark.slow
def test_a_machine_that_cannot_compile_gets_one_clear_line(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    with pytest.raises(ValueError, match="torch.compile does not work here .*--compile no"):
        compile_losses(
            tiny_blt().train(),
            RunConfig(compile="yes", batch_rows=4),
            train_rows(),
            torch.device("cpu"),
            "fp32",
        )


# Attention


@pytest.mark.parametrize(
    "capability, head_dim, wanted",
    [
        ((9, 0), 64, None),
        ((9, 0), 256, None),
        ((9, 0), 264, "16 to 256"),
        ((8, 9), 128, None),
        ((8, 9), 256, "16 to 128"),
        ((12, 0), 256, "16 to 128"),
        ((8, 0), 8, "16 to 128"),
        ((8, 0), 12, "no multiple of 8"),
        ((7, 5), 64, None),
        ((7, 5), 50, "no multiple of 8"),
    ],
)
def test_slow_attention_is_named(monkeypatch, capability, head_dim, wanted):
    card(monkeypatch, capability)
    reason = slow_attention(CUDA, "bf16", head_dim, is_compiled=True)
    assert reason is None if wanted is None else wanted in reason
    assert slow_attention(torch.device("cpu"), "bf16", head_dim, is_compiled=True) is None


@pytest.mark.parametrize("lacking", ["triton", "compiler", "headers", None])
def test_what_triton_lacks(monkeypatch, tmp_path, lacking):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(blt.device.importlib.util, "find_spec", lambda name: None if lacking == "triton" else name)
    monkeypatch.setattr(blt.device.shutil, "which", lambda name: None if lacking == "compiler" else "/usr/bin/gcc")
    if lacking != "headers":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(blt.device.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    named = what_triton_lacks()
    assert named is None if lacking is None else lacking in named


def test_slow_attention_is_printed(monkeypatch, capsys):
    card(monkeypatch, (8, 9))
    loop.print_slow_attention(tiny_blt(global_dim=256, global_heads=1), CUDA, "bf16", is_compiled=True)
    printed = capsys.readouterr().out
    assert printed.count("heads of 256 channels") == 1 and printed.count("attention:") == len(printed.splitlines())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recompute_changes_no_gradient(dropout):
    """Masks are made ahead of the layers that run in a checkpoint: in the dtype of their queries."""
    batch = train_rows().shuffled_batch(0, 4, 0)
    gradients = []
    for recompute in (False, True):
        model = tiny_blt(recompute=recompute, dropout=dropout).train()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch.ids[:, :-1], batch.patch_lengths)
        logits.float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# Devices


@pytest.mark.parametrize("name", ["mps", "cuda", "cuda:3", "meta", "xpu", "gpu", ""])
def test_a_device_that_is_not_there_gets_one_clear_line(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is .*(auto, cpu, cuda, cuda:N or mps|use --device cpu)"):
        choose_device(name)


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert choose_device("mps") == torch.device("mps")
    # What Triton and CUDA graphs launch, they launch on the current device.
    assert choose_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="2 CUDA device"):
        choose_device("cuda:2")


class AppleNats:
    """Losses on a device without float64, as Apple's GPUs are."""

    device = torch.device("mps")

    def __init__(self, nats):
        self.nats = nats

    def cpu(self):
        return self.nats

    def sum(self, dtype=None):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def test_evaluation_adds_up_on_apple_gpus():
    batch = SimpleNamespace(targets=3, bytes=3)
    is_right = torch.tensor([[True, False, True]])
    totals = add_up([(batch, AppleNats(torch.tensor([[1.0, 2.0, 3.5]])), is_right)])
    assert totals == {"nats": 6.5, "right": 2, "targets": 3, "bytes": 3}
