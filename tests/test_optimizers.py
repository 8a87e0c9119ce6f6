"""GroupedMuon against torch's Muon, RowWiseAdam by hand, clipping, one optimizer a parameter."""

import pytest
import torch
import torch.nn as nn
from helpers import tiny_blt

from blt.layers import zero_outputs
from blt.loop import RunConfig
from blt.optimizers import (
    GroupedMuon,
    RowWiseAdam,
    backward,
    clip_gradients,
    make_optimizers,
    step_optimizers,
)
from blt_model import DENSE_HASH_ROWS, BLTConfig, BLTModel

RATES = RunConfig(lr=0.01, adam_lr=0.01, table_lr=1.0)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_grouped_muon_is_torch_muon(adjust):
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 24), (8, 8), (16, 8)]
    our_matrices = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    their_matrices = [nn.Parameter(p.detach().clone()) for p in our_matrices]
    options = dict(lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    ours = GroupedMuon(our_matrices, **options)
    theirs = torch.optim.Muon(their_matrices, **options)
    for _ in range(4):
        for p, q in zip(our_matrices, their_matrices):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    # The tolerance is for bf16 products, in another order.
    for p, q in zip(our_matrices, their_matrices):
        torch.testing.assert_close(p, q, atol=1e-3, rtol=1e-2)
    # Checkpoints of one are checkpoints of the other.
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("sparse", [True, False])
def test_row_wise_adam_by_hand(sparse, decay):
    table = nn.EmbeddingBag(6, 2, mode="sum", sparse=sparse)
    optimizer = RowWiseAdam([table.weight], lr=0.1, beta=0.5, eps=1e-20, weight_decay=decay)
    wanted = table.weight.detach().clone()
    square = torch.zeros(6)
    count = torch.zeros(6)
    for looked_up, weight in (([0, 3], [3.0, 4.0]), ([3, 3], [1.0, 2.0])):
        optimizer.zero_grad()
        (table(torch.tensor([looked_up])) * torch.tensor(weight)).sum().backward()
        if sparse:
            table.weight.grad = table.weight.grad.coalesce()
        optimizer.step()
        for row in set(looked_up):
            gradient = looked_up.count(row) * torch.tensor(weight)
            square[row] = 0.5 * square[row] + 0.5 * gradient.square().mean()
            count[row] += 1
            without_bias = square[row] / (1 - 0.5 ** count[row])
            # Rows that are not looked up do not decay.
            wanted[row] *= 1 - 0.1 * decay
            wanted[row] -= 0.1 * gradient / without_bias.sqrt()
    torch.testing.assert_close(table.weight.detach(), wanted)


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
    dense = BLTModel(config)
    sparse = BLTModel(config)
    sparse.load_state_dict(dense.state_dict())
    sparse.encoder.hash_embedding.tables.sparse = True
    ids = torch.randint(0, 256, (2, 20))
    lengths = torch.tensor([[1] + [4] * 5] * 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for model in (dense, sparse):
        # Two passes, so that gradients accumulate.
        for _ in range(2):
            backward(model, model(ids, lengths).logsumexp(-1).mean().mul(100), scaler)
    dense_norm = clip_gradients(dense, [], scaler, 0.5)
    sparse_norm = clip_gradients(sparse, [], scaler, 0.5)
    torch.testing.assert_close(dense_norm, sparse_norm)
    gradient = sparse.encoder.hash_embedding.tables.weight.grad
    assert gradient.is_sparse
    assert (gradient._indices()[0].diff() > 0).all()
    dense_gradient = dense.encoder.hash_embedding.tables.weight.grad
    torch.testing.assert_close(gradient.to_dense(), dense_gradient)
    assert torch.nn.utils.get_total_norm([p.grad for p in dense.parameters()]) <= 0.5001


@pytest.mark.parametrize("rows", [50, DENSE_HASH_ROWS + 1])
def test_the_rate_of_the_tables(rows):
    """table_lr multiplies the updates of the tables, exactly, and of nothing else."""

    def after_a_step(table_lr):
        torch.manual_seed(0)
        model = tiny_blt(hash_rows=rows, ngram_sizes=[2, 3])
        # From zero no rounding hides the factor.
        zero_outputs(model)
        optimizers = make_optimizers(model, RunConfig(adam_lr=0.01, table_lr=table_lr))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        ids = torch.randint(0, 256, (2, 20))
        lengths = torch.tensor([[1] + [4] * 5] * 2)
        backward(model, model(ids, lengths).logsumexp(-1).square().mean(), scaler)
        step_optimizers(optimizers, scaler, clip_gradients(model, optimizers, scaler, 1.0))
        return model.state_dict()

    name = "encoder.hash_embedding.tables.weight"
    usual, faster = after_a_step(1.0), after_a_step(4.0)
    assert usual[name].any() and torch.equal(4 * usual.pop(name), faster.pop(name))
    assert all(torch.equal(value, faster[key]) for key, value in usual.items())


def test_the_decay_of_the_tables_is_a_setting():
    model = tiny_blt()
    optimizer = make_optimizers(model, RunConfig(adam_lr=0.01, table_lr=2.0, table_decay=0.3))[-1]
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.3)


def test_each_parameter_is_in_one_optimizer():
    small = dict(
        encoder_dim=4,
        encoder_heads=1,
        global_dim=4,
        global_heads=1,
        decoder_dim=4,
        decoder_heads=1,
        global_layers=1,
    )
    for sizes, rows, number in (([], 8, 2), ([3], 8, 3), ([3], DENSE_HASH_ROWS + 1, 3)):
        model = BLTModel(BLTConfig(hash_rows=rows, ngram_sizes=sizes, **small))
        optimizers = make_optimizers(model, RATES)
        assert len(optimizers) == number
        optimized = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                optimized += [id(p) for p in group["params"]]
        assert sorted(optimized) == sorted(id(p) for p in model.parameters())
        # Muon, the first optimizer, does not get the head.
        muon_ids = [id(p) for p in optimizers[0].param_groups[0]["params"]]
        assert id(model.head.weight) not in muon_ids
