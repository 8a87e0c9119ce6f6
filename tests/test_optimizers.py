"""Grouped Muon against torch's, row-wise Adam by hand, clipping with sparse gradients, one optimizer a parameter."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from blt.optimizers import GroupedMuon, RowWiseAdam, backward, clip_gradients, make_optimizers
from blt_model import DENSE_HASH_ROWS, BLTConfig, BLTModel

RATES = SimpleNamespace(lr=0.01, adam_lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_grouped_muon_is_torch_muon(adjust):
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 24), (8, 8), (16, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = [
        make(ps, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
        for make, ps in ((GroupedMuon, ours), (torch.optim.Muon, theirs))
    ]
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-2)  # bf16 products, in another order
    saved = optimizers[1].state_dict()
    optimizers[0].load_state_dict(saved)  # checkpoints of one are checkpoints of the other


@pytest.mark.parametrize("sparse", [True, False])
def test_row_wise_adam_by_hand(sparse):
    table = nn.EmbeddingBag(6, 2, mode="sum", sparse=sparse)
    optimizer = RowWiseAdam([table.weight], lr=0.1, beta=0.5, eps=1e-20)
    before, square, count = table.weight.detach().clone(), torch.zeros(6), torch.zeros(6)
    for looked_up, weight in (([0, 3], [3.0, 4.0]), ([3, 3], [1.0, 2.0])):
        optimizer.zero_grad()
        (table(torch.tensor([looked_up])) * torch.tensor(weight)).sum().backward()
        table.weight.grad = table.weight.grad.coalesce() if sparse else table.weight.grad
        optimizer.step()
        for row in set(looked_up):
            gradient = looked_up.count(row) * torch.tensor(weight)
            square[row] = 0.5 * square[row] + 0.5 * gradient.square().mean()
            count[row] += 1
            before[row] -= 0.1 * gradient / (square[row] / (1 - 0.5 ** count[row])).sqrt()
    torch.testing.assert_close(table.weight.detach(), before)


def test_sparse_tables_train_and_clip_like_dense_ones():
    config = BLTConfig(
        encoder_dim=16,
        global_dim=16,
        decoder_dim=16,
        global_layers=1,
        decoder_layers=1,
        hash_rows=50,
        ngram_sizes=[3, 4],
        window=8,
    )
    torch.manual_seed(0)
    dense, sparse = BLTModel(config), BLTModel(config)
    sparse.load_state_dict(dense.state_dict())
    sparse.encoder.hash_embedding.tables.sparse = True
    ids, lengths = torch.randint(0, 256, (2, 20)), torch.tensor([[1] + [4] * 5] * 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for model in (dense, sparse):
        for _ in range(2):  # accumulated
            backward(model, model(ids, lengths).logsumexp(-1).mean().mul(100), scaler)
    norms = [clip_gradients(model, [], scaler, 0.5) for model in (dense, sparse)]
    torch.testing.assert_close(norms[0], norms[1])
    table = sparse.encoder.hash_embedding.tables.weight.grad
    assert table.is_sparse and table.is_coalesced()
    torch.testing.assert_close(table.to_dense(), dense.encoder.hash_embedding.tables.weight.grad)
    assert torch.nn.utils.get_total_norm([p.grad for p in dense.parameters()]) <= 0.5001


def test_each_parameter_is_in_one_optimizer():
    small = dict(
        encoder_dim=4, encoder_heads=1, global_dim=4, global_heads=1, decoder_dim=4, decoder_heads=1, global_layers=1
    )
    for sizes, rows, number in (([], 8, 2), ([3], 8, 3), ([3], DENSE_HASH_ROWS + 1, 3)):
        model = BLTModel(BLTConfig(hash_rows=rows, ngram_sizes=sizes, **small))
        optimizers = make_optimizers(model, RATES)
        assert len(optimizers) == number
        held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert id(model.head.weight) not in [id(p) for p in optimizers[0].param_groups[0]["params"]]
