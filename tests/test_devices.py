"""The labels of tests/devices.py: what CUDA refuses is refused, what it allows is not, and every wait is seen."""

import copy

import pytest
import torch
from torch import nn


@pytest.fixture
def gpu(devices):
    with devices.LogicalGpu() as gpu:
        yield gpu


def test_tensors_are_where_they_were_made_moved_or_computed(gpu, devices):
    x, host = torch.zeros(3, device=gpu.device), torch.ones(3)
    there = [x * 2, x[1:], x.new_zeros(2), torch.zeros_like(x), x.double(), x.clone(), torch.arange(3, device=x.device)]
    there += [
        host.to(gpu.device),
        host.to(x),
        host.to(x.device),
        x.new_tensor([1.0]),
        torch.tensor([1.0], device=x.device),
    ]
    assert {tensor.device for tensor in there} == {devices.GPU}
    here = [host * 2, x.cpu(), x.to("cpu"), x.new_zeros(2, device="cpu"), torch.tensor([1.0]), torch.rand(2)]
    assert {tensor.device for tensor in here} == {devices.HOST}
    assert x.to(gpu.device) is x
    layers = copy.deepcopy(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).to(gpu.device))
    layers(torch.ones(1, 3, 2, 2, device=gpu.device)).sum().backward()
    assert {p.grad.device for p in layers.parameters()} == {devices.GPU}
    assert {value.device for value in layers.state_dict().values()} == {devices.GPU}
    assert not gpu.mismatches


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x, host: x + host,
        lambda x, host: torch.where(x > 0, host, x),
        lambda x, host: torch.stack([x.sum(), host.sum()]),
        lambda x, host: host[x.long()],
        lambda x, host: x.index_copy(0, torch.tensor([0]), x[:1]),
        lambda x, host: x.numpy(),
        lambda x, host: torch.cat([x, torch.zeros(1)]),
    ],
)
def test_what_mixes_both_is_an_error_that_names_the_place(gpu, devices, mistake):
    with pytest.raises(devices.DeviceMismatch, match=r"at tests/test_devices\.py:\d+ \(<lambda>\)|at .*test_devices"):
        mistake(torch.zeros(3, device=gpu.device), torch.ones(3))
    assert len(gpu.mismatches) == 1


def test_what_cuda_allows_is_no_error(gpu):
    x, host = torch.zeros(3, device=gpu.device), torch.ones(3)
    x + host.sum()
    x[host.long()]
    x.copy_(host)
    x.masked_fill_(x > 0, host.sum())


def test_a_mistake_in_a_backward_pass_is_seen(gpu, devices):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones(3)

    x = torch.zeros(3, device=gpu.device, requires_grad=True)
    with pytest.raises(devices.DeviceMismatch):
        Wrong.apply(x).sum().backward()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool((x > 0).any()),
        lambda x: float(x.sum()),
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.unique(),
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x[torch.tensor([0])],
    ],
)
def test_every_wait_counts_once_and_not_on_the_host(gpu, wait):
    wait(torch.ones(3, device=gpu.device))
    assert sum(gpu.syncs.values()) == 1
    gpu.syncs.clear()
    wait(torch.ones(3))
    assert not gpu.syncs


def test_what_needs_no_value_waits_for_nothing(gpu):
    x = torch.ones(3, device=gpu.device)
    x[x > 0] = 0
    x[x.long()] += 1
    torch.ones(3).to(x.device, non_blocking=True)
    (x.sum() / 3).clamp(min=1)
    assert not gpu.syncs


def test_afterwards_torch_is_as_it_was(devices):
    before = (torch.Tensor.to, torch.Tensor.cpu, torch.zeros, torch.tensor)
    with devices.LogicalGpu():
        assert torch.Tensor.to is not before[0]
    assert (torch.Tensor.to, torch.Tensor.cpu, torch.zeros, torch.tensor) == before
    assert torch.zeros(2, device="cpu:0").device == torch.device("cpu")
