"""Muon and AdamW against torch's own, and what they leave in a checkpoint."""

import copy
import io

import pytest
import torch

from pipeline.optim import MuonAdamW, orthogonalize, pretraining_groups


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (33, 101), (3, 24, 40), (7, 1), (1, 1), (320, 960)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_orthogonalized_singular_values_are_near_one(shape, scale):
    result = orthogonalize(_noise(*shape) * scale)
    assert result.shape == shape and result.dtype == torch.float32
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6 and values.max() < 1.3


def test_orthogonalizing_keeps_the_singular_vectors():
    matrix = _noise(24, 40)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonalize(matrix) @ vh.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4
    assert turned.diagonal().min() > 0.6


def test_orthogonalizing_takes_any_dtype_and_zeros():
    assert orthogonalize(_noise(5, 9).bfloat16()).dtype == torch.bfloat16
    assert not orthogonalize(torch.zeros(5, 9)).any()


def _steps(parameters, optimizer, count: int = 10, start: int = 0) -> None:
    for step in range(start, start + count):
        for i, parameter in enumerate(parameters):
            parameter.grad = _noise(*parameter.shape, seed=100 * step + i)
        optimizer.step()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_agrees_with_torch(decay):
    ours = [_noise(3, 5).requires_grad_(), _noise(7).requires_grad_(), _noise(2, 3, 4).requires_grad_()]
    theirs = copy.deepcopy(ours)
    how = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": decay}
    _steps(ours, MuonAdamW([{"params": ours, **how}]))
    _steps(theirs, torch.optim.AdamW(theirs, **how))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(48, 16), (16, 48)])
def test_muon_agrees_with_torch_to_bf16(shape):
    """torch orthogonalises in bf16: its updates carry about three digits."""
    start = _noise(*shape)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    how = {"lr": 0.02, "weight_decay": 0.05}
    _steps([ours], MuonAdamW([{"params": [ours], "muon": True, **how}]), count=4)
    _steps([theirs], torch.optim.Muon([theirs], momentum=0.95, nesterov=True, **how), count=4)
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_split_treats_blocks_of_rows_as_matrices_of_their_own():
    fused = _noise(3 * 16, 24).requires_grad_()
    parts = [part.detach().clone().requires_grad_() for part in fused.chunk(3)]
    together = fused.detach().clone().requires_grad_()
    split = MuonAdamW([{"params": [fused], "muon": True, "split": 3}])
    apart = MuonAdamW([{"params": parts, "muon": True}])
    whole = MuonAdamW([{"params": [together], "muon": True}])
    gradient = _noise(3 * 16, 24, seed=5) * torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(16)[:, None]
    for _ in range(3):
        fused.grad, together.grad = gradient.clone(), gradient.clone()
        for part, rows in zip(parts, gradient.chunk(3), strict=True):
            part.grad = rows.clone()
        for optimizer in (split, apart, whole):
            optimizer.step()
    torch.testing.assert_close(fused, torch.cat(parts), atol=1e-6, rtol=0)
    assert (fused - together).abs().max() > 1e-4


def _mixed(seed: int) -> tuple[list[torch.Tensor], MuonAdamW]:
    parameters = [_noise(9, 5, seed=seed).requires_grad_(), _noise(6, 8, seed=seed).requires_grad_(), _noise(4)]
    parameters[2].requires_grad_()
    groups = [
        {"params": parameters[:1], "muon": True, "split": 3},
        {"params": parameters[1:2], "muon": True, "weight_decay": 0.1},
        {"params": parameters[2:], "lr": 0.01},
    ]
    return parameters, MuonAdamW(groups)


def test_a_loaded_state_continues_identically():
    parameters, optimizer = _mixed(1)
    _steps(parameters, optimizer, count=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, resumed = _mixed(2)
    with torch.no_grad():
        for other, parameter in zip(others, parameters, strict=True):
            other.copy_(parameter)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    _steps(parameters, optimizer, count=3, start=3)
    _steps(others, resumed, count=3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_parameters_without_a_gradient_rest_and_a_closure_is_called():
    parameters, optimizer = _mixed(1)
    before = [parameter.detach().clone() for parameter in parameters]

    def closure() -> float:
        optimizer.zero_grad()
        loss = (parameters[1] * parameters[1]).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(before[1].square().sum().item())
    assert torch.equal(parameters[0], before[0]) and torch.equal(parameters[2], before[2])
    assert not torch.equal(parameters[1], before[1])


def test_pretraining_groups_hold_each_parameter_once(tiny_model):
    fused, matrices, rest = pretraining_groups(tiny_model, muon_lr=0.02, adam_lr=0.003, weight_decay=0.01)
    held = [id(parameter) for group in (fused, matrices, rest) for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, tiny_model.parameters()))
    block = tiny_model.transformer.h[1]
    assert len(fused["params"]) == 3 and fused["split"] == 3 and fused["muon"]
    assert id(block.attn.c_attn.weight) in map(id, fused["params"])
    assert len(matrices["params"]) == 9 and matrices["muon"] and matrices["weight_decay"] == 0.01
    body = tiny_model.transformer
    apart = {id(p) for p in (body.wte.weight, body.wpe.weight, body.ln_f.bias, block.mlp.c_fc.bias)}
    assert apart <= {id(parameter) for parameter in rest["params"]} and rest["lr"] == 0.003


def test_training_lowers_the_loss(tiny_model, tiny_blocks):
    optimizer = MuonAdamW(pretraining_groups(tiny_model, muon_lr=0.02, adam_lr=3e-3, weight_decay=0.01))
    ids = torch.from_numpy(tiny_blocks.tokens)
    losses = []
    for _ in range(30):
        loss = tiny_model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
