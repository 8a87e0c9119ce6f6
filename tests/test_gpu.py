"""Checks on a CUDA device; skipped where there is none."""

import numpy as np
import pytest
import torch

from blt_model import BLTConfig, BLTModel
from entropy_patcher import EntropyPatcher
from rows import evaluation_batches
from train_blt import PatchedDataset, TrainingConfig, train_blt
from training import leak_gate

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CONFIG = dict(encoder_dim=64, global_dim=64, decoder_dim=64, global_layers=2, decoder_layers=2, hash_rows=64, window=16)


def documents(n):
    return [np.random.default_rng(i).integers(97, 110, 300, dtype=np.uint8) for i in range(n)]


def test_gpu_equals_cpu():
    torch.manual_seed(0)
    model, patcher = BLTModel(BLTConfig(**CONFIG)).eval(), EntropyPatcher(None, threshold=4, method="static")
    (batch,) = evaluation_batches(documents(2), [patcher.starts(d) for d in documents(2)], 1024)
    with torch.no_grad():
        cpu = model(batch.ids[:, :-1], batch.patch_lengths)
        batch = batch.to("cuda")
        gpu = model.cuda()(batch.ids[:, :-1], batch.patch_lengths)
    torch.testing.assert_close(gpu.cpu(), cpu, atol=1e-4, rtol=0)
    assert leak_gate(model, patcher, documents(1)[0]) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("compile", ["yes", "no"])
def test_training_on_the_gpu(tmp_path, precision, compile):
    data = PatchedDataset.from_documents(documents(20), documents(1), EntropyPatcher(None, threshold=4, method="static"), 256, 4)
    config = TrainingConfig(row_bytes=256, batch_rows=4, steps=20, eval_every=10, precision=precision, compile=compile, output=str(tmp_path))
    torch.manual_seed(0)
    assert train_blt(BLTModel(BLTConfig(**CONFIG)).cuda(), data, config)["val_bpb"] < 6
