"""InTrainPruner in plain torch loops: its equation, its window, its promises, its checkpoints."""

import copy
import io
import json
import math

import pytest
import torch
from torch import nn

from mmitp.pruning import InTrainPruner, MacBudget, SlimPlan, apply_plan, mask_model, masked_layers, share_masks

IMAGE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A stem, a residual block and a classifier."""

    def __init__(self, width=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 2)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.fc(x.mean((2, 3)))


def start(target=0.5, width=16, steps=24, decay=0.0, granularity="channel", **kwargs):
    torch.manual_seed(0)
    net = mask_model(Net(width), granularity)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=decay)
    pruner = InTrainPruner(net, IMAGE, target, steps=steps, **kwargs)
    pruner.attach(optimizer)
    return net, optimizer, pruner


def train(net, optimizer, steps, seed=0, poison=None):
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        y = (x[:, :, :4].mean((1, 2, 3)) > x[:, :, 4:].mean((1, 2, 3))).long()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        (loss * math.nan if step == poison else loss).backward()
        optimizer.step()


def test_optimizer_2_is_the_equation_of_the_method():
    """M <- M - lr (dL_task/dM + b dL_HW/dM), with the gradients of the step that Optimizer 1 has just made."""
    net, optimizer, pruner = start(b=5.0, lr=0.1, min_keep=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # Optimizer 1 leaves the masks alone here
    pruner.active = True
    before = {name: layer.prune_mask.detach().clone() for name, layer in masked_layers(net).items()}
    pruner.hw_loss().backward()
    push = {name: layer.prune_mask.grad.clone() for name, layer in masked_layers(net).items()}
    train(net, optimizer, 1)
    for name, layer in masked_layers(net).items():
        expected = before[name] - 0.1 * (layer.prune_mask.grad + 5 * push[name])
        torch.testing.assert_close(layer.prune_mask.detach(), expected)


def test_the_hinge_is_closed_at_the_target():
    net, optimizer, pruner = start(target=0.9, b=1e3, lr=1.0)
    with torch.no_grad():
        for layer in masked_layers(net).values():
            layer.prune_mask[8:] = -0.3
    assert pruner.ratio() < 0.9
    assert float(pruner.hw_loss().detach()) == 0.0
    assert bool((pruner._push() == 0).all())


def test_it_acts_while_active_only():
    net, optimizer, pruner = start()
    train(net, optimizer, 3)
    assert (pruner.count, pruner.ratio()) == (0, 1.0)
    pruner.active = True
    train(net, optimizer, 3)
    assert pruner.count == 3
    assert pruner.ratio() < 1
    pruner.detach()
    train(net, optimizer, 3)
    assert pruner.count == 3


@pytest.mark.parametrize("target", [0.9, 0.7, 0.5, 0.3])
@pytest.mark.parametrize("how", [dict(), dict(b=2000.0), dict(b=2000.0, push="balanced", decay=0.05)])
def test_the_default_ends_within_one_per_cent_below_the_target_where_a_channel_allows(target, how):
    net, optimizer, pruner = start(target, width=32, **how)
    pruner.active = True
    train(net, optimizer, 24)
    report = pruner.freeze()
    on = pruner.budget.flat_pattern()
    more = []
    for i in (~on).nonzero().flatten():
        with_it = on.clone()
        with_it[i] = True
        more.append(pruner.budget.macs_of(with_it) / pruner.budget.dense_macs)
    assert report.ratio <= target
    assert report.ratio >= 0.99 * target or min(more) > target
    assert report.macs_kept == pruner.budget.kept_macs()


def test_auto_ends_at_the_target_without_a_freeze_that_cuts_or_fills():
    net, optimizer, pruner = start(0.5, width=32, fill=False)
    pruner.active = True
    train(net, optimizer, 24)
    report = pruner.freeze()
    assert report.switched_off == report.switched_on == 0
    assert 0.47 < report.ratio <= 0.5  # a channel of this net costs up to 3 %


@pytest.mark.parametrize("push", ["plain", "balanced"])
def test_no_layer_falls_below_its_floor_in_any_mode(push):
    net, optimizer, pruner = start(0.3, b=1e5, lr=0.1, push=push, min_keep=0.25)
    pruner.active = True
    train(net, optimizer, 20)
    assert min(int(layer.binary_mask().sum()) for layer in masked_layers(net).values()) >= 4
    pruner.freeze()
    assert min(int(layer.binary_mask().sum()) for layer in masked_layers(net).values()) >= 4


def test_a_balanced_push_is_as_strong_as_the_plain_one():
    pushes = []
    for push in ("plain", "balanced"):
        _, _, pruner = start(b=1.0, push=push)
        pushes.append(pruner._push())
    assert float(pushes[0].sum()) == pytest.approx(float(pushes[1].sum()), rel=1e-5)
    sums = [[float(part.mean()) for part in pruner.budget.split(push).values()] for push in pushes]
    assert sums[1][0] == pytest.approx(sums[1][1], rel=1e-5)  # the same in every full layer
    assert sums[0][0] != pytest.approx(sums[0][1], rel=0.1)


@pytest.mark.parametrize("how", [dict(), dict(b=500.0)])
def test_resuming_in_the_window_is_exact(how):
    net, optimizer, pruner = start(**how)
    pruner.active = True
    train(net, optimizer, 10)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(net, optimizer, 10, seed=1)
    again, optimizer2, pruner2 = start(**how)
    again.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[1])
    pruner2.load_state_dict(saved[2])
    pruner2.active = True
    train(again, optimizer2, 10, seed=1)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert pruner2.count == 20


def test_changed_settings_are_obeyed_while_masks_train_and_said(caplog):
    _, _, pruner = start(target=0.7)
    said = []
    _, _, other = start(target=0.4, warn=said.append)
    other.load_state_dict(pruner.state_dict())
    assert len(said) == 1
    assert "target: 0.7 -> 0.4" in said[0]


@pytest.mark.parametrize("change", [dict(target=0.4), dict(divisor=4), dict(fill=False), dict(cost="params")])
def test_changed_settings_are_refused_once_masks_are_frozen(change):
    net, _, pruner = start()
    pruner.freeze()
    _, _, other = start(**change)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*load_from"):
        other.load_state_dict(pruner.state_dict())


def test_other_masks_than_the_checkpoints_are_named():
    state = start(0.8)[2].state_dict()
    torch.manual_seed(0)
    for net, text in (
        (mask_model(Net(), exclude="b"), r"only in the checkpoint: \['b'\]"),
        (mask_model(Net(), "weight"), r"of shape \(16,\) in the checkpoint.*\(16, 16, 3, 3\) in the model"),
        (mask_model(Net(), linear=True), r"only in the model: \['fc'\]"),
    ):
        with pytest.raises(ValueError, match=text):
            InTrainPruner(net, IMAGE, 0.8, steps=8).load_state_dict(state)
    shared = mask_model(Net(), linear=True)
    separate = InTrainPruner(copy.deepcopy(shared), IMAGE, 0.8, steps=8).state_dict()
    assert share_masks(shared, IMAGE) == [["a", "fc"]]
    with pytest.raises(ValueError, match="shared otherwise"):
        InTrainPruner(shared, IMAGE, 0.8, steps=8).load_state_dict(separate)


def test_what_is_not_finite_is_named_at_once_and_never_frozen():
    net, optimizer, pruner = start()
    pruner.active = True
    with pytest.raises(ValueError, match=r"layer 'a' \(2 in all\): its mask holds values that are not finite"):
        train(net, optimizer, 8, poison=3)
    assert pruner.count == 3
    with pytest.raises(ValueError, match="not finite"):
        pruner.freeze()
    assert not pruner.frozen
    assert not any(layer.mask_frozen for layer in masked_layers(net).values())


@pytest.mark.parametrize("how", [dict(), dict(b=30.0)])
def test_what_is_found_between_two_readings_of_the_device_is_told_with_its_step(how):
    """A window of 1000 steps is read once in 20; what is frozen or saved is looked at in any case."""
    for end, ago in (("freeze", 3), ("state_dict", 3), ("train", 16)):
        net, optimizer, pruner = start(steps=1000, **how)
        pruner.active = True
        train(net, optimizer, 8, poison=4)
        with pytest.raises(ValueError, match=rf"layer 'a' \(2 in all\), {ago} optimizer step\(s\) ago: its mask holds"):
            train(net, optimizer, 20, seed=1) if end == "train" else getattr(pruner, end)()
        assert not any(layer.mask_frozen for layer in masked_layers(net).values())
        assert pruner.count == 4  # Optimizer 2 has not moved the masks since


def test_two_nan_masks_do_not_stop_it_without_a_word():
    net, optimizer, pruner = start()
    net.b.prune_mask.data[3:5] = math.nan
    with pytest.raises(ValueError, match=r"layer 'b' \(1 in all\): its mask holds values"):
        train(net, optimizer, 1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(target=math.nan), "target"),
        (dict(b=math.inf), "b must be a finite number"),
        (dict(b=-1.0), "b must be"),
        (dict(lr=math.nan), "lr"),
        (dict(steps=None), "steps"),
        (dict(push="hard"), "push"),
        (dict(min_keep=1.0), "min_keep"),
        (dict(divisor=8.5), "divisor"),
        (dict(on_miss="ignore"), "on_miss"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        InTrainPruner(mask_model(Net()), IMAGE, **(dict(target=0.5, steps=8) | arguments))


def test_targets_that_the_freeze_could_not_meet_are_refused_at_the_start():
    with pytest.raises(ValueError, match="cannot be reached"):
        start(target=0.06)
    with pytest.raises(ValueError, match="0.5 of all it has"):
        start(target=0.2, min_keep=0.5)


def test_masks_of_which_none_counts_are_refused_by_name():
    net = mask_model(Net(), include=["a"])
    net.forward = lambda x: net.fc(net.norm(net.stem(x)).relu().mean((2, 3)))
    with pytest.raises(ValueError, match=r"no mask counts: of the masked layers \(a\) none runs"):
        InTrainPruner(net, IMAGE, 0.5, steps=8)


def test_an_optimizer_without_the_masks_is_refused():
    net = mask_model(Net())
    weights = [p for name, p in net.named_parameters() if "prune_mask" not in name]
    with pytest.raises(ValueError, match="does not hold the mask of 'a'"):
        InTrainPruner(net, IMAGE, 0.5, steps=8).attach(torch.optim.SGD(weights, lr=0.1))


def test_the_live_network_is_slimmed_with_its_optimizer_and_trains_on():
    net, optimizer, pruner = start(width=32)
    pruner.active = True
    train(net, optimizer, 24)
    report = pruner.freeze()
    x = torch.randn(2, 3, 8, 8)
    small = pruner.slim()
    assert pruner.slim(optimizer) is net
    torch.testing.assert_close(small.eval()(x), net.eval()(x))
    assert MacBudget(net, IMAGE).dense_macs == report.macs_kept
    assert sum(p.numel() for p in net.parameters()) == report.params_kept
    train(net.train(), optimizer, 3)


def slimmed_and_saved(cut=None):
    """A run slimmed after its window and trained on, with the checkpoint of then (as a file gives it)."""
    net, optimizer, pruner = start(width=32, slim_every=cut)
    pruner.active = True
    train(net, optimizer, 24)
    if cut:
        assert pruner.cut(optimizer)
    report = pruner.freeze()
    pruner.slim(optimizer)
    train(net, optimizer, 3)
    file = io.BytesIO()
    torch.save(dict(net=net.state_dict(), optimizer=optimizer.state_dict(), pruner=pruner.state_dict()), file)
    file.seek(0)
    return net, optimizer, report, torch.load(file, weights_only=True)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("cut", [None, 1])
def test_resuming_a_slimmed_network_is_exact(cut, attached):
    net, optimizer, report, saved = slimmed_and_saved(cut)
    net2, optimizer2, pruner2 = start(width=32, slim_every=cut)
    if not attached:
        pruner2.detach()
    pruner2.load_state_dict(saved["pruner"])
    if not attached:
        optimizer2 = torch.optim.SGD(net2.parameters(), lr=0.05, momentum=0.9)
        pruner2.attach(optimizer2)
    assert not masked_layers(net2) and pruner2.frozen
    assert pruner2.report() == report == pruner2.freeze()
    net2.load_state_dict(saved["net"])
    optimizer2.load_state_dict(saved["optimizer"])
    for each in (net, optimizer), (net2, optimizer2):
        train(*each, 3, seed=1)
    for name, value in net.state_dict().items():
        assert torch.equal(net2.state_dict()[name], value), name
    assert pruner2.state_dict()["slimmed"] == saved["pruner"]["slimmed"]


def test_a_small_network_is_rebuilt_from_plain_numbers():
    net, _, _, saved = slimmed_and_saved()
    spec = json.loads(json.dumps(saved["pruner"]["slimmed"]["spec"]))
    small = apply_plan(Net(width=32), SlimPlan.from_spec(spec))
    small.load_state_dict(saved["net"])
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(small.eval()(x), net.eval()(x))


def test_the_plan_slims_an_average_of_the_network():
    net, optimizer, pruner = start(width=32)
    average = copy.deepcopy(net)
    assert pruner.plan is None
    pruner.active = True
    train(net, optimizer, 24)
    pruner.freeze()
    average.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 8, 8)
    expected = average.eval()(x)
    pruner.slim(optimizer)
    torch.testing.assert_close(apply_plan(average, pruner.plan)(x), expected)


def test_a_slimmed_networks_state_that_does_not_fit_is_refused():
    saved = slimmed_and_saved()[3]["pruner"]
    with pytest.raises(ValueError, match="masks are frozen.*target"):
        start(width=32, target=0.4)[2].load_state_dict(saved)
    with pytest.raises(ValueError, match="it was made from another model"):
        start(width=8)[2].load_state_dict(saved)
    damaged = copy.deepcopy(saved)
    del damaged["slimmed"]["report"]["ratio"]
    with pytest.raises(ValueError, match="slimmed.report lacks 'ratio'"):
        start(width=32)[2].load_state_dict(damaged)


def test_a_loss_that_is_still_alive_is_named_before_the_live_network_is_slimmed():
    net, optimizer, pruner = start(b=0.0)
    loss = net(torch.randn(2, 3, 8, 8)).sum()
    pruner.freeze()
    with pytest.raises(ValueError, match=r"still alive.*del loss"):
        pruner.slim(optimizer)
    assert masked_layers(net)
    del loss
    pruner.slim(optimizer)
    train(net, optimizer, 2)


def test_single_weights_reach_the_target_too():
    net, optimizer, pruner = start(0.5, granularity="weight")
    pruner.active = True
    train(net, optimizer, 24)
    report = pruner.freeze()
    assert 0.495 <= report.ratio <= 0.5
    assert report.granularity == "weight"


def test_a_pace_that_will_not_do_is_said_again_after_a_fifth_of_the_window():
    said = []
    net, optimizer, pruner = start(b=1e-6, steps=100, lr=0.01, warn=lambda _: said.append(pruner.position))
    pruner.active = True
    train(net, optimizer, 100)
    assert 0 < said[0] <= 20
    assert [later - earlier for earlier, later in zip(said, said[1:], strict=False)] == [20] * (len(said) - 1)
    assert len(said) >= 4


def test_a_step_that_a_fused_optimizer_skips_moves_no_mask_with_a_fixed_b_either():
    """The gradient scaler leaves it to a fused optimizer to skip the step; nothing is read on the way."""
    net = mask_model(Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, fused=True)
    pruner = InTrainPruner(net, IMAGE, 0.5, steps=1000, b=30.0)
    pruner.attach(optimizer)
    pruner.active = True
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflow in (False, True):
        before = pruner.budget.flat_masks().detach().clone()
        optimizer.zero_grad()
        loss = net(torch.randn(8, 3, 8, 8)).square().mean()
        scaler.scale(loss * math.inf if overflow else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(pruner.budget.flat_masks(), before) == overflow
    assert pruner.count == 1
