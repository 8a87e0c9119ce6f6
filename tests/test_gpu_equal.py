"""What must be equal on a CUDA device: gradients to a CPU's, a run to its repetition; skipped where there is none.

`make gpu` runs them beside test_gpu.py, because they compile for a minute.
"""

import numpy as np
import pytest
import torch
from test_gpu import CONFIG, documents, static_patcher, training_data

from blt import loop
from blt.entropies import compiled_entropies, stream_entropies
from blt.incremental import IncrementalBLT
from blt.metric import target_losses
from blt.rows import DocumentStream, evaluation_batches
from blt.training import TrainingConfig, train_blt
from blt_model import BLTConfig, BLTModel
from entropy_llm import EntropyConfig, MinimalLLM
from entropy_patcher import EntropyPatcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_gradients_equal_a_cpus():
    """Those of the Triton kernels, too."""
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**CONFIG))
    patcher = static_patcher()
    texts = documents(2)
    (batch,) = evaluation_batches(texts, [patcher.starts(text) for text in texts], 1024)
    gradients = []
    for device in ("cpu", "cuda"):
        nats_BT, _ = target_losses(model.to(device), batch.to(device))
        gradients.append([gradient.cpu() for gradient in torch.autograd.grad(nats_BT.mean(), model.parameters())])
    for cpu, gpu in zip(*gradients, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-3)


class Stopped(Exception):
    """A run that ends in the middle."""


def test_runs_repeat(tmp_path, monkeypatch):
    """Two runs give equal weights to the last bit, and so does a run that was stopped and resumed."""

    def train(name, **changes):
        torch.manual_seed(0)
        model = BLTModel(BLTConfig(**CONFIG | dict(ngram_dropout=0.1))).cuda()
        rows = dict(row_bytes=256, batch_rows=4, steps=12, eval_every=12, checkpoint_minutes=1e-6)
        config = TrainingConfig(**rows, precision="bf16", compile="yes", output=str(tmp_path / name), **changes)
        train_blt(model, training_data(), config)
        return {name: p.cpu() for name, p in model.state_dict().items()}

    straight = train("one")
    runs = [train("other")]
    with monkeypatch.context() as patch:
        steps = iter(range(100))
        original = loop.set_learning_rates

        def stop_in_step_6(*arguments):
            if next(steps) == 6:
                raise Stopped
            return original(*arguments)

        patch.setattr(loop, "set_learning_rates", stop_in_step_6)
        with pytest.raises(Stopped):
            train("stopped")
    runs.append(train("stopped", resume=True))
    for run in runs:
        assert all(torch.equal(run[name], straight[name]) for name in straight)


def test_a_compiled_entropy_pass():
    torch.manual_seed(0)
    model = MinimalLLM(EntropyConfig(d_model=32, n_heads=2, n_layers=2, max_seq_len=9)).cuda().eval()
    stream = DocumentStream.of_documents(documents(20))
    compiled = compiled_entropies(model, (4, 256), "fp32")
    assert compiled is not None
    with torch.compiler.set_stance("fail_on_recompile"):
        got = stream_entropies(model, stream, 4, 256, compiled=compiled)
    want = stream_entropies(model, stream, 4, 256)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def test_steps_through_texts_repeat():
    """With several streams and long patches: compress.py decodes with the very probabilities that it coded with."""
    torch.manual_seed(0)
    model = BLTModel(BLTConfig(**CONFIG)).cuda().eval()
    patcher = EntropyPatcher(None, threshold=20, method="static")
    texts_BT = np.stack(documents(8))[:, :90].astype(np.int64)

    def read():
        reader = IncrementalBLT(model, patcher, 8)
        logits = [reader.prefill([np.array([256])] * 8)]
        # The next step may overwrite what one has returned.
        logits += [reader.extend(texts_BT[:, t : t + 1])[:, 0].clone() for t in range(texts_BT.shape[1])]
        return torch.stack(logits)

    assert torch.equal(read(), read())
