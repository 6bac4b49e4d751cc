"""Self-distillation in the core: the loss by hand, and the network with its masks open as its own teacher."""

import math

import pytest
import torch
from torch import nn

from mmitp.pruning import InTrainPruner, distillation_loss, freeze_masks, mask_model, open_masks


def test_the_loss_is_the_divergence_times_the_square_of_the_temperature():
    """Teacher (3/4, 1/4) against an even student: 3/4 ln(3/2) + 1/4 ln(1/2); at T = 2 the teacher's odds are sqrt 3."""
    even, teacher = torch.zeros(2, 2), torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(distillation_loss(even, teacher, 1.0)) == pytest.approx(expected, rel=1e-5)
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 - 2 * p))
    assert float(distillation_loss(even, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_is_the_difference_of_the_probabilities_and_none_flows_to_the_teacher():
    student = torch.zeros(1, 2, requires_grad=True)
    teacher = torch.tensor([[3.0, 1.0]]).log().requires_grad_()
    distillation_loss(student, teacher, 1.0).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25]]))
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("shapes", "temperature", "message"),
    [
        (((2, 3), (2, 4)), 2.0, r"\(2, 3\) of the student and \(2, 4\)"),
        (((2, 3, 4, 4), (2, 3, 4, 4)), 2.0, r"one shape \(N, K\)"),
        (((2, 3), (2, 3)), 0.0, "temperature must be a positive"),
    ],
)
def test_what_has_no_class_scores_is_refused(shapes, temperature, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), temperature)


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1), nn.Flatten()
    return mask_model(nn.Sequential(*layers))


def test_the_open_network_is_the_dense_one_and_leaves_no_trace():
    model, dense, x = net(), net(), torch.randn(6, 3, 1, 1)
    model[2].prune_mask.data[:5] = -0.5
    InTrainPruner(model, x, 0.5, steps=5)  # its MaskBank reads the masks at every pass
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with open_masks(model), torch.no_grad():
        opened = model(x)
    assert torch.equal(opened, dense(x))
    assert not torch.equal(model.eval()(x), opened)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key  # running statistics too
    assert not model[2].mask_frozen
    assert model[1].track_running_stats


def test_frozen_masks_stay_closed_and_an_error_closes_the_others():
    model, x = net(), torch.randn(6, 3, 1, 1)
    model[2].prune_mask.data[:5] = -0.5
    with pytest.raises(RuntimeError, match="channels"), open_masks(model):
        model(torch.randn(6, 4, 1, 1))
    assert not model[2].mask_frozen
    assert int(model[2].binary_mask().sum()) == 3
    freeze_masks(model)
    model.eval()
    with open_masks(model):
        assert int(model[2].binary_mask().sum()) == 3
        inside = model(x)
    assert torch.equal(inside, model(x))
