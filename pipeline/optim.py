"""Muon for the matrices, AdamW for the rest: fewer tokens to the same loss when training from scratch. Or AdamW alone.

torch's own `torch.optim.Muon` orthogonalises in bf16, which a CPU without bf16 units emulates
(0.9 s for one 320 x 1280 matrix, against 0.02 s in FP32), and takes matrices only.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

# Quintic Newton-Schulz coefficients (Jordan et al. 2024, "Muon: an optimizer for hidden layers").
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values land in about 0.7..1.2.

    `[..., rows, columns]`, any float dtype; computed in FP32 on a CPU and in bf16 on a GPU.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon where a group says `muon: True`, AdamW (Loshchilov and Hutter 2019) elsewhere.

    A Muon group's `split` cuts each matrix into that many blocks of rows, so that q, k and v of a
    fused projection are orthogonalised apart.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        defaults = {
            "lr": 1e-3,
            "muon": False,
            "split": 1,
            "momentum": 0.95,
            "betas": (0.9, 0.95),
            "eps": 1e-8,
            "weight_decay": 0.0,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    update(parameter, parameter.grad, self.state[parameter], group)
        return loss

    @staticmethod
    def _muon(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(state["momentum"], group["momentum"])
        blocks = orthogonalize(direction.view(group["split"], -1, direction.shape[-1]))
        scale = max(1.0, blocks.shape[-2] / blocks.shape[-1]) ** 0.5
        parameter.add_(blocks.reshape_as(parameter), alpha=-group["lr"] * scale)

    @staticmethod
    def _adamw(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["step"], state["mean"], state["square"] = 0, torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        state["mean"].lerp_(grad, 1 - first)
        state["square"].lerp_(grad.square(), 1 - second)
        mean = state["mean"] / (1 - first ** state["step"])
        square = state["square"] / (1 - second ** state["step"])
        parameter.addcdiv_(mean, square.sqrt_().add_(group["eps"]), value=-group["lr"])


class SplitOptimizer(ZeroRedundancyOptimizer):
    """ZeRO-1 (Rajbhandari et al. 2020): each process keeps and updates its part of the optimiser's state."""

    def state_dict(self) -> dict[str, Any]:
        """The whole state where `consolidate_state_dict` brought it together; elsewhere the groups alone."""
        try:
            return super().state_dict()
        except RuntimeError:  # accelerate asks once before there is any state
            return torch.optim.Optimizer.state_dict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a whole state."""
        super().load_state_dict(state_dict)
        self.state.clear()  # the part that counts is the inner optimiser's; this would be a second copy
        for parameter, state in self.optim.state.items():
            if "step" in state and self.optim.defaults.get("fused"):
                state["step"] = state["step"].to(parameter.device)


def adamw(model: nn.Module, *, lr: float, weight_decay: float, split: bool = False) -> torch.optim.Optimizer:
    """AdamW with one fused kernel; embeddings and matrices decay, biases and norms do not.

    With `split`, each process of the group keeps a part of its state.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    how: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    if split:
        return SplitOptimizer(groups, torch.optim.AdamW, **how)
    return torch.optim.AdamW(groups, **how)


def pretraining_groups(
    model: nn.Module, *, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of a CompactGPT2: hidden matrices to Muon, embeddings, biases and norms to AdamW."""
    fused, matrices, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("c_attn.weight"):
            fused.append(parameter)
        elif parameter.ndim == 2 and ".h." in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    muon = {"muon": True, "lr": muon_lr, "weight_decay": weight_decay}
    return [
        {"params": fused, "split": 3, **muon},
        {"params": matrices, **muon},
        {"params": rest, "lr": adam_lr},
    ]
