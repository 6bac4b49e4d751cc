"""The same computation on the CPU and on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: Length of the difference to the CPU's float32, as part of the length of what it should be. In half precision values
#: next to zero end on the other side of a ReLU.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-1, torch.float16: 1e-1}


def gradients(out: Tensor, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """``out`` and the gradients of a loss that depends on all of its values, each in its own way."""
    weights = torch.linspace(-1, 1, out.numel()).to(out.device).view(out.shape)
    found = torch.autograd.grad((out.float() * weights).sum(), list(parameters.values()), allow_unused=True)
    named = {name: g for name, g in zip(parameters, found, strict=True) if g is not None}
    return {"output": out.detach(), **named}


def compare(one: dict[str, Tensor], two: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Fails where two dicts of tensors differ by more than the precision allows; names the tensor."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        a, b = value.detach().double().cpu(), two[name].detach().double().cpu()
        assert a.shape == b.shape, name
        assert torch.isfinite(b).all(), name
        error = float((a - b).norm()) / (float(a.norm()) or 1.0)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2g}"


def twins(model: nn.Module, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A model on the CPU and its copy on the device."""
    return model, copy.deepcopy(model).to(device)


def under(dtype: torch.dtype, device: torch.device) -> Any:
    """Autocast in ``dtype``, none for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def on_both(
    model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device, dtype: torch.dtype, run: Callable[..., Tensor]
) -> None:
    """Compares a model's output and all gradients on the device, in ``dtype``, with the CPU's in float32."""
    results = []
    for twin, place, precision in zip(twins(model, device), ("cpu", device), (torch.float32, dtype), strict=True):
        tensors = [x.detach().to(place) for x in inputs]
        tensors = [x.requires_grad_() if x.is_floating_point() else x for x in tensors]
        with under(precision, torch.device(place)):
            out = run(twin, *tensors)
        leaves = {f"input {i}": x for i, x in enumerate(tensors) if x.requires_grad}
        results.append(gradients(out, {**leaves, **dict(twin.named_parameters())}))
    compare(*results, dtype)
