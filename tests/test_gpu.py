"""Checks on a CUDA device; skipped where there is none.

They import no package that a machine with torch may lack: `make gpu` runs them there without conftest.py.
"""

import numpy as np
import pytest
import torch
import torch._dynamo

from blt.device import autocast
from blt.metric import RowLosses, leak_gate
from blt.optimizers import clip_gradients, make_optimizers, step_optimizers
from blt.rows import evaluation_batches
from blt.training import PatchedDataset, TrainingConfig, train_blt
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher
from generate import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIG = dict(
    encoder_dim=64,
    global_dim=64,
    decoder_dim=64,
    global_layers=2,
    decoder_layers=2,
    hash_rows=64,
    window=16,
)


def documents(n):
    """n random documents of 300 letters."""
    return [np.random.default_rng(i).integers(97, 110, 300, dtype=np.uint8) for i in range(n)]


def static_patcher():
    return EntropyPatcher(None, threshold=4, method="static")


def training_data():
    """20 documents to train on and one to validate, in batches of 4 rows of 256 bytes."""
    return PatchedDataset.from_documents(documents(20), documents(1), static_patcher(), 256, 4)


def test_gpu_equals_cpu():
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**CONFIG)).eval()
    patcher = static_patcher()
    texts = documents(2)
    (batch,) = evaluation_batches(texts, [patcher.starts(text) for text in texts], 1024)
    with torch.no_grad():
        cpu = model(batch.ids[:, :-1], batch.patch_lengths)
        batch = batch.to("cuda")
        gpu = model.cuda()(batch.ids[:, :-1], batch.patch_lengths)
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-4, rtol=0)
    assert leak_gate(model, patcher, texts[0]) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("compile", ["yes", "no"])
def test_training_on_the_gpu(tmp_path, precision, compile):
    config = TrainingConfig(
        row_bytes=256,
        batch_rows=4,
        steps=20,
        eval_every=10,
        precision=precision,
        compile=compile,
        output=str(tmp_path),
    )
    data = training_data()
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**CONFIG)).cuda()
    assert train_blt(model, data, config)["val_bpb"] < 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_do_not_wait(precision):
    """After three steps the compiled model neither compiles nor makes the CPU wait for the GPU."""
    data = training_data()
    config = TrainingConfig(row_bytes=256, batch_rows=4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**CONFIG)).cuda()
    compiled = torch.compile(RowLosses(model), fullgraph=True, dynamic=False)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    batches = []
    for step in range(6):
        batches.append(data.train_rows.shuffled_batch(step, config.batch_rows, config.seed).pin())
    try:
        for step, batch in enumerate(batches):
            if step == 3:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            with torch.compiler.set_stance("default" if step < 3 else "fail_on_recompile"):
                with autocast(torch.device("cuda"), precision):
                    loss = compiled(*batch.to("cuda").for_losses()).sum() / batch.targets
                loss.backward()
                norm = clip_gradients(model, optimizers, scaler, config.clip)
                step_optimizers(optimizers, scaler, norm)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_two_runs_of_one_process_with_recompute(tmp_path):
    """The second run's rows have another number of patches; its layers run in checkpoints, in one graph."""
    for patch_size, recompute in ((4, False), (7, True)):
        patcher = EntropyPatcher(None, threshold=patch_size, method="static")
        data = PatchedDataset.from_documents(documents(20), documents(1), patcher, 256, 4)
        output = str(tmp_path / str(patch_size))
        config = TrainingConfig(row_bytes=256, batch_rows=4, steps=4, eval_every=4, compile="yes", output=output)
        torch._dynamo.utils.counters.clear()
        train_blt(BLTModel(BLTConfig(**CONFIG, recompute=recompute)).cuda(), data, config)
        assert not torch._dynamo.utils.counters["graph_break"]


def writer():
    """A random model, and a patcher with a random entropy model, in the same precision on CPU and GPU."""
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**CONFIG | dict(encoder_dim=32, decoder_dim=32))).eval()
    entropy_model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=9)).eval()
    # Larger logits give entropies that differ from byte to byte.
    with torch.no_grad():
        entropy_model.head.weight.mul_(3)
    return model, EntropyPatcher(entropy_model, threshold=2.93, method="global")


TEXT = ("Ein Buch, two books; 3 bücher... " * 20).encode()


def test_writing_on_the_gpu():
    """Text written on the GPU is the CPU's, cached or not."""
    model, patcher = writer()
    prompts = [TEXT[:200], b"two books", b""]
    on_cpu = generate(model, patcher, prompts, 20)
    model.cuda()
    patcher.entropy_model.cuda()
    assert generate(model, patcher, prompts, 20) == on_cpu
    assert generate(model, patcher, prompts, 20, cached=False) == on_cpu
    assert generate(model, patcher, prompts, 20, draft_bytes=4, draft_confidence=0.0) == on_cpu


def test_compressing_on_the_gpu():
    """What the GPU codes the GPU decodes."""
    pytest.importorskip("constriction")
    from compress import decode, encode

    model, patcher = writer()
    model.cuda()
    patcher.entropy_model.cuda()
    for streams in (1, 5):
        # compress() would store this text, because an untrained model cannot predict it.
        code, _ = encode(model, patcher, TEXT[:500], streams, 128)
        assert decode(model, patcher, code, 500, streams, 128) == TEXT[:500]
