"""The Triton kernels against the code for CPUs: interpreted on a CPU, and compiled for three kinds of GPU.

conftest.py asks Triton to interpret where there is no GPU. Nothing here says how fast the kernels are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import some_words

pytest.importorskip("triton", reason="needs Triton: pip install triton")

import blt_model
from blt import segments
from blt.ids import documents_of
from blt.metric import leak_gate, target_losses
from blt.rows import evaluation_batches
from blt.segments import OpenPatches, PatchMap, attend_to_patches, first_positions
from blt_model import BLTConfig, BLTModel
from entropy_patcher import EntropyPatcher
from generate import generate

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_PATCHES = 9


@pytest.fixture
def kernels(monkeypatch):
    """A function that says whether the kernels run from now on."""

    def switch(is_on):
        monkeypatch.setattr(segments, "runs_triton", lambda device: is_on)

    return switch


def patch_map():
    """Two rows of 40 bytes: documents that end in patches, patches of 1 to 20 bytes, and slots without bytes."""
    ids = torch.full((2, 40), 97, device=DEVICE)
    for row, position in ((0, 0), (0, 13), (1, 0), (1, 25), (1, 26)):
        ids[row, position] = 256
    lengths = torch.tensor([[1, 3, 4, 9, 20, 4, 0, 0, 0], [1, 1, 2, 6, 14, 3, 8, 6, 0]], device=DEVICE)
    return PatchMap(lengths, documents_of(ids, 256))


def results(k, H, K, how, dtype):
    """Pooling, both cross-attentions, and the gradients of their inputs, in this dtype."""
    generator = torch.Generator().manual_seed(k + H + K)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    q, queries = random(2, N_PATCHES, k, H, K), random(2, 40, H, K)
    key, value = random(2, 40, H, K), random(2, 40, H, K)
    patch_key, patch_value = random(2, N_PATCHES, k, H, K), random(2, N_PATCHES, k, H, K)
    patch_both = torch.stack((patch_key, patch_value), 3)
    # Of one large product, as in training: rows at a distance.
    both = torch.stack((key, value), 2)
    x = random(2, 40, H * K)
    # Bytes that share a maximum share its gradient.
    tied = torch.where(torch.arange(40, device=DEVICE)[:, None] % 3 == 0, x[:, 1:2], x)
    mapped = patch_map()
    outputs = [
        mapped.max_or_mean(tied, how),
        mapped.attend(q, both[:, :, 0], both[:, :, 1]),
        attend_to_patches(queries, patch_both[:, :, :, 0], patch_both[:, :, :, 1], mapped.read),
    ]
    loss = sum((out.float() * random(*out.shape).float()).sum() for out in outputs)
    inputs = (x, q, key, value, queries, patch_key, patch_value)
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("k, H, K", [(1, 1, 8), (2, 3, 16), (3, 2, 12), (4, 1, 64), (8, 2, 6)])
def test_kernels_equal_the_code_for_cpus(kernels, k, H, K, how):
    kernels(False)
    want = results(k, H, K, how, torch.float32)
    kernels(True)
    got = results(k, H, K, how, torch.float32)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    # No number is a sum whose order may change.
    for one, other in zip(got, results(k, H, K, how, torch.float32), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_add_up_in_fp32(kernels, dtype):
    """In 16 bits they are nearer to fp32 than one rounding of inputs and outputs."""
    kernels(True)
    for one, other in zip(results(2, 2, 16, "max", dtype), results(2, 2, 16, "max", torch.float32), strict=True):
        torch.testing.assert_close(one.float(), other, atol=0.05, rtol=0.05)


@pytest.mark.slow
def test_a_patch_of_500_bytes(kernels):
    ids = torch.full((1, 600), 97, device=DEVICE)
    x = torch.randn(1, 600, 1, 8, device=DEVICE)
    q = torch.randn(1, 3, 2, 1, 8, device=DEVICE)
    attended = []
    for is_on in (False, True):
        kernels(is_on)
        mapped = PatchMap(torch.tensor([[1, 500, 100]], device=DEVICE), documents_of(ids, 256))
        attended.append((mapped.attend(q, x, x), attend_to_patches(x, q, q, mapped.read)))
    torch.testing.assert_close(attended[1], attended[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_patches_of_text_that_is_written(kernels):
    """Left-out bytes at the ends of rows, a patch without bytes, and a row that completes no patch."""
    into = torch.tensor([[0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 0, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3]], device=DEVICE)
    x = torch.randn(3, 7, 2, 8, device=DEVICE)
    q = torch.randn(3, 3, 2, 2, 8, device=DEVICE)
    found = []
    for is_on in (False, True):
        kernels(is_on)
        patches = OpenPatches(into, 3)
        assert (patches.begins is not None) == is_on
        found.append(
            [patches.attend(q, x, x + 1), *(patches.max_or_mean(x.flatten(2), how) for how in ("max", "mean"))]
        )
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_text_is_written_with_the_kernels(kernels):
    torch.manual_seed(0)
    sizes = dict(encoder_dim=16, global_dim=32, decoder_dim=16, global_layers=1, decoder_layers=1, hash_rows=64)
    model = BLTModel(BLTConfig(**sizes | dict(window=16))).to(DEVICE)
    with torch.no_grad():
        model.head.weight.mul_(4)
    patcher = EntropyPatcher(None, method="space")
    texts = []
    for is_on in (False, True):
        kernels(is_on)
        texts.append(generate(model, patcher, [b"the cat sat on", b"a "], 12))
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_layouts_that_are_not_rows_of_channels(kernels):
    mapped = {}
    for is_on in (False, True):
        kernels(is_on)
        mapped[is_on] = patch_map()
    x = torch.randn(2, 16, 40, device=DEVICE).transpose(1, 2)
    torch.testing.assert_close(mapped[True].max_or_mean(x, "max"), mapped[False].max_or_mean(x, "max"))
    q = torch.randn(2, N_PATCHES, 2, 1, 8, device=DEVICE)
    key, value = torch.randn(2, 40, 1, 8, 2, device=DEVICE).unbind(-1)
    torch.testing.assert_close(mapped[True].attend(q, key, value), mapped[False].attend(q, key, value))
    patch_key, patch_value = torch.randn(2, N_PATCHES, 2, 1, 8, 2, device=DEVICE).unbind(-1)
    read = []
    for is_on in (False, True):
        kernels(is_on)
        read.append(attend_to_patches(key, patch_key, patch_value, mapped[False].read))
    torch.testing.assert_close(read[1], read[0])


def test_the_kernels_can_be_left_out(monkeypatch):
    monkeypatch.setattr(segments, "CAN_COMPILE", True)
    cuda = torch.device("cuda")
    with pytest.raises(KeyError), segments.without_triton():
        assert not segments.runs_triton(cuda)
        raise KeyError
    assert segments.runs_triton(cuda)


def test_first_positions():
    assert first_positions(torch.tensor([0, 0, 2, 2, 2]), 4).tolist() == [0, 2, 2, 5, 5]


OPTIONS = [
    {},
    dict(encoder_layers=2, cross_attn_all_layers_encoder=True, pooling="mean"),
    dict(cross_attn_all_layers_decoder=False, cross_attn_k=3),
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=["as trained", "all layers, mean", "one layer, k = 3"])
def test_the_whole_model_with_its_gradients(kernels, options):
    sizes = dict(encoder_dim=16, global_dim=32, decoder_dim=16, global_layers=1, decoder_layers=2, hash_rows=64)
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**sizes | dict(window=16) | options)).to(DEVICE)
    patcher = EntropyPatcher(None, threshold=5, method="static")
    documents = [np.frombuffer(some_words(n), np.uint8) for n in (9, 4)]
    (batch,) = evaluation_batches(documents, [patcher.starts(text) for text in documents], 128)
    found = []
    for is_on in (False, True):
        kernels(is_on)
        nats_BT, _ = target_losses(model, batch.to(DEVICE))
        found.append([nats_BT, *torch.autograd.grad(nats_BT.sum(), model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_leak_gate_with_kernels(kernels, monkeypatch):
    """It passes, and sees a patch that is read too early through the kernels too."""
    kernels(True)
    sizes = dict(encoder_dim=16, global_dim=16, decoder_dim=16, global_layers=1, decoder_layers=1, hash_rows=64)
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**sizes, window=16)).to(DEVICE)
    patcher = EntropyPatcher(None, threshold=4, method="static")
    document = np.frombuffer(some_words(6), np.uint8)
    assert leak_gate(model, patcher, document) < 1e-4

    def read_the_next_patch(q, key, value, read_N):
        return attend_to_patches(q, key, value, (read_N + 1).clamp(max=key.shape[0] * key.shape[1] - 1))

    monkeypatch.setattr(blt_model, "attend_to_patches", read_the_next_patch)
    with pytest.raises(ValueError, match="leak"):
        leak_gate(model, patcher, document)


# Compiles every kernel for a card that is not there: {kernel: [shared memory in bytes, stack of a thread in bytes]}.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
sys.path.insert(0, {root!r})
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blt import triton_kernels

capability, k, H, K = map(int, sys.argv[1:])
found = dict()
for name, kernel in vars(triton_kernels).items():
    if not isinstance(kernel, triton.JITFunction):
        continue
    sizes = triton_kernels.sizes_of(k, H, K)
    warps = sizes.pop("num_warps")
    if name.startswith("_pool"):
        fixed = dict(IS_MAX=True, BYTES=triton_kernels.BYTES_AT_ONCE, WIDTH=512)
        warps = 2
    else:
        fixed = sizes
    types = dict(begins="*i32", first="*i32", log_sum="*fp32", D="i32")
    types |= dict(q_stride="i32", key_stride="i32", value_stride="i32")
    number = "*fp16" if capability < 80 else "*bf16"
    signature = {{a: "constexpr" if a in fixed else types.get(a, number) for a in kernel.arg_names}}
    source = ASTSource(kernel, signature, fixed)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), dict(num_warps=warps))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run([dump, "--dump-resource-usage", cubin.name], capture_output=True, text=True).stdout
    found[name] = [compiled.metadata.shared, int(re.findall("STACK:([0-9]+)", told)[-1])]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 89, 90])
@pytest.mark.parametrize("k, H, K", [(2, 4, 64), (8, 2, 128)])
def test_kernels_compile_for_cards(tmp_path, capability, k, H, K):
    (tmp_path / "compile.py").write_text(COMPILE.format(root=str(ROOT)))
    # Compiled, not interpreted.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "compile.py"), *map(str, (capability, k, H, K))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 6
    for name, (shared, stack) in found.items():
        # A T4 has 64 KiB. A stack is where registers that do not suffice are spilled to.
        assert shared <= 64 << 10, name
        assert stack <= 64, f"{name}: {found}"
