"""One optimiser for all of the training: float32 masters of bf16 parameters, Muon and AdamW.

The modules are trained in bf16, as they are served, so that rounding is part of what they learn;
the masters keep the small steps that bf16 would lose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.01


class Optimiser:
    """Muon for `matrices` (kernels of convolutions too, as matrices), AdamW for `others`.

    The rate lies on the card, and is set before a step, so that a step can be in a CUDA graph.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> None:
        matrices, others = list(matrices), list(others)
        self._params: list[Tensor] = [*matrices, *others]
        self._masters = [param.detach().float().clone() for param in self._params]
        self._grads = [torch.zeros_like(master) for master in self._masters]
        for master, grad in zip(self._masters, self._grads, strict=True):
            master.grad = grad
        self._rate = torch.zeros((), device=self._params[0].device)
        self._muon = _Muon(self._masters[: len(matrices)])
        self._adam = torch.optim.AdamW(
            self._masters[len(matrices) :],
            lr=self._rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
            capturable=self._rate.is_cuda,
        )

    @torch.no_grad()
    def step(self) -> None:
        """Takes the gradients of the parameters, and leaves them without."""
        found = [  # there are none of the last block's text, which nothing reads
            torch.zeros_like(param) if param.grad is None else param.grad for param in self._params
        ]
        torch._foreach_copy_(self._grads, found)
        nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adam.step()
        self._muon.step(self._rate)
        self.write()
        for param in self._params:
            param.grad = None

    @torch.no_grad()
    def write(self) -> None:
        """Sets the parameters to the masters' values."""
        torch._foreach_copy_(self._params, self._masters)

    def set_rate(self, peak: float, step: int, steps: int) -> None:
        """For a step of `steps`: up to the peak in the first hundredth, then straight to zero."""
        self._rate.fill_(peak * min(1, 100 * (step + 1) / steps, 1 - step / steps))

    def state(self) -> dict[str, Any]:
        """Everything that `load` needs, for a checkpoint."""
        return {
            "masters": self._masters,
            "adam": self._adam.state_dict(),
            "momenta": self._muon.momenta,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, the parameters' values included."""
        for ours, saved in (
            (self._masters, state["masters"]),
            (self._muon.momenta, state["momenta"]),
        ):
            if ours:
                torch._foreach_copy_(ours, saved)
        self._adam.load_state_dict(state["adam"])
        for group in self._adam.param_groups:
            group["lr"] = self._rate
        self.write()


class _Muon:
    """Momentum whose steps are made orthogonal (Jordan et al., 2024), matrices of a shape at once.

    Steps are scaled to AdamW's size (Liu et al., 2025, section 2.2), so both share a rate.
    """

    def __init__(self, matrices: list[Tensor]) -> None:
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]
        by_shape = defaultdict(list)
        for matrix, momentum in zip(matrices, self.momenta, strict=True):
            by_shape[matrix.shape].append((matrix, momentum))
        self._groups = [tuple(zip(*pairs, strict=True)) for pairs in by_shape.values()]

    def step(self, rate: Tensor) -> None:
        for matrices, momenta in self._groups:
            grads = [matrix.grad for matrix in matrices]
            torch._foreach_lerp_(momenta, grads, 1 - _MOMENTUM)
            ahead = torch.stack(torch._foreach_lerp(grads, momenta, _MOMENTUM))
            flat = ahead.flatten(2)  # a kernel is a matrix of (out, in · height · width)
            scale = 0.2 * max(flat.shape[1:]) ** 0.5
            steps = (rate * scale * _orthogonal(flat).float()).view_as(ahead)
            torch._foreach_mul_(matrices, 1 - rate * _WEIGHT_DECAY)
            torch._foreach_sub_(matrices, list(steps.unbind(0)))


def _orthogonal(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with all singular values near 1: five Newton-Schulz rounds."""
    wide = x.shape[1] <= x.shape[2]
    x = x.bfloat16() if wide else x.bfloat16().mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide else x.mT
