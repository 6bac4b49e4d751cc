"""Norms folded into the layers before them: the same outputs, fewer operations, and no guess."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmitp.pruning import MacBudget, fold_norms, mask_model, randomize_masks, slim


class Net(nn.Module):
    def __init__(self, body, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body
        generator = torch.Generator().manual_seed(0)
        for m in self.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
                for t in (m.weight, m.bias, m.running_mean, m.running_var):
                    t.data.uniform_(0.5, 1.5, generator=generator)

    def forward(self, x):
        return self.body(self, x)


def norms(net):
    return [n for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def folds(net, *left, x=None):
    """Folds, compares to 1e-5 in float64, and says that the norms named (and no others) stay."""
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64) if x is None else x
    net = net.double().eval()
    before = copy.deepcopy(net.state_dict())
    small = fold_norms(net, x)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert norms(small) == list(left)
    return small


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2, bias=False),
    ],
)
def test_a_norm_goes_into_the_convolution_before_it(layer):
    small = folds(Net(lambda m, x: F.relu(m.bn(m.conv(x))), conv=layer, bn=nn.BatchNorm2d(6)))
    assert small.conv.bias is not None


def test_the_fold_by_hand():
    conv, bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)
    for value, t in zip(
        (2.0, 1.0, 3.0, 5.0, 4.0, 0.25),
        (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var),
        strict=True,
    ):
        t.data.fill_(value)
    small = fold_norms(nn.Sequential(conv, bn).eval(), torch.ones(1, 1, 1, 1))
    # s = 3 / 0.5 = 6: weight 6 * 2, bias 6 * (1 - 4) + 5
    assert (small[0].weight.item(), small[0].bias.item()) == (12.0, -13.0)


def test_linear_layers_fold_too():
    net = Net(lambda m, x: m.bn(m.fc(x.flatten(1))), fc=nn.Linear(144, 5), bn=nn.BatchNorm1d(5))
    folds(net)


def test_a_convolution_that_runs_twice_folds_if_its_norm_always_follows():
    def body(m, x):
        return m.bn(m.conv(x)).sum() + m.bn(m.conv(x[..., :4])).sum()

    folds(Net(body, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))


@pytest.mark.parametrize(
    "body",
    [
        lambda m, x: m.bn(y := m.conv(x)) + y,
        lambda m, x: (m.bn(y := m.conv(x)), y),
        lambda m, x: m.bn(F.relu(m.conv(x))),
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)),
        lambda m, x: m.bn(m.conv(x)) + m.conv(x),
        lambda m, x: m.bn(m.conv(x)[:, [1, 0, 2, 3]]),
    ],
    ids=["read twice", "an output", "an operation between", "two layers, one norm", "once without", "shuffled"],
)
def test_anything_else_stays(body):
    folds(Net(body, conv=nn.Conv2d(4, 4, 3), other=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)), "bn")


def test_norms_without_running_statistics_stay():
    folds(
        Net(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4, track_running_stats=False)),
        "bn",
    )


def test_masked_and_slimmed_networks_fold():
    def body(m, x):
        x = F.relu(m.bn1(m.conv1(x)))
        x = F.relu(x + m.bn2(m.conv2(x)))
        return m.conv3(F.relu(x + m.bn4(m.conv4(x))))

    modules = {f"conv{i}": nn.Conv2d(4 if i == 1 else 8, 8, 3, padding=1) for i in (1, 2, 3, 4)}
    net = Net(body, **modules, **{f"bn{i}": nn.BatchNorm2d(8) for i in (1, 2, 4)}).eval()
    mask_model(net, include=["conv2", "conv3", "conv4"])
    x = torch.randn(2, 4, 6, 6)
    randomize_masks(net, 0.4, torch.Generator().manual_seed(1))
    small = slim(net, x, MacBudget(net, x))
    assert any(getattr(m, "out_index", None) is not None for m in small.modules())  # a scatter is among them
    expected = net(x)
    folds(net, x=x.double())
    folds(small, x=x.double())
    torch.testing.assert_close(fold_norms(small.float(), x)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_reads_behind_our_back_is_refused():
    class Sly(nn.Module):
        def forward(self, x):
            with torch._C.DisableTorchFunction():
                return x * 1.0

    net = Net(lambda m, x: m.bn(y := m.conv(x)) + m.sly(y), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4), sly=Sly())
    with pytest.raises(RuntimeError, match="does not compute the same"):
        fold_norms(net.eval(), torch.randn(1, 4, 6, 6))


@pytest.mark.parametrize("length", [10, 32])
def test_a_norm_over_the_positions_of_a_sequence_stays(length):
    net = Net(
        lambda m, x: m.out(F.relu(m.bn(m.fc(x)))), fc=nn.Linear(16, 32), bn=nn.BatchNorm1d(length), out=nn.Linear(32, 4)
    )
    folds(net, "bn", x=torch.randn(2, length, 16, dtype=torch.float64))


def test_inputs_passed_by_name_are_seen():
    def body(m, x):
        return m.bn(input=m.conv(input=x))

    folds(Net(body, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)))
    net = mask_model(Net(body, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)).eval(), include=["conv"])
    randomize_masks(net, 0.5, torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 6, 6)
    assert MacBudget(net, x).unfollowed == {}
    torch.testing.assert_close(slim(net, x)(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_fold(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    nn.init.uniform_(net[1].running_var, 0.2, 4)
    nn.init.uniform_(net[1].weight, 0.5, 2)
    net, x = net.to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    folded = fold_norms(net, x)
    assert isinstance(folded[1], nn.Identity)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    torch.testing.assert_close(folded(x), net(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("place", ["conv", "bn", "bn before"])
@pytest.mark.parametrize("changes", [False, True])
def test_what_a_hook_reads_or_changes_stays(place, changes):
    seen = []

    def hook(module, args, out=None):
        value = args[0] if out is None else out
        seen.append(value)
        return value * 2 if changes else None

    net = Net(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)).eval()
    if place == "bn before":
        net.bn.register_forward_pre_hook(hook)
    else:
        getattr(net, place).register_forward_hook(hook)
    x = torch.randn(1, 4, 6, 6)
    folded = fold_norms(net, x)
    assert isinstance(folded.bn, nn.BatchNorm2d)
    seen.clear()
    assert torch.equal(folded(x), net(x))
    assert torch.equal(*seen)


def test_a_network_without_storage_folds():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).to("meta")
    small = fold_norms(net, torch.empty(1, 3, 8, 8, device="meta"))
    assert norms(small) == []
    assert small[0].bias.is_meta
