import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmitp.ops.focal_loss import sigmoid_focal_loss
from mmitp.ops.nms import nms, soft_nms
from mmitp.ops.roi_align import roi_align

BOXES = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30], [0, 0, 10, 5]])


def test_nms_drops_overlaps_above_the_threshold_only():
    scores = torch.tensor([0.5, 0.9, 0.7, 0.6])
    # box 1 leads; IoU with 0 is 80 / 100, with 3 it is 50 / 80
    assert nms(BOXES, scores, 0.79).tolist() == [1, 2, 3]
    assert nms(BOXES, scores, 0.8).tolist() == [1, 2, 3, 0]
    assert nms(BOXES, scores, 0.6).tolist() == [1, 2]


def test_nms_offset_counts_pixels_inclusively():
    boxes = torch.tensor([[0.0, 0, 1, 0], [0, 0, 0, 0]])  # two and one pixels in the inclusive reading, empty otherwise
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.49, offset=1).tolist() == [0]
    assert nms(boxes, scores, 0.5, offset=1).tolist() == [0, 1]
    assert nms(boxes, scores, 0.0, offset=0).tolist() == [0, 1]


def test_nms_of_nothing_and_ties_in_input_order():
    assert nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []
    assert nms(BOXES, torch.ones(4), 0.99).tolist() == [0, 1, 2, 3]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.floats(0.05, 0.95))
def test_nms_keeps_a_maximal_set_without_overlaps(seed, threshold):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 20, (12, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(1, 15, (12, 2))], 1)).float()
    scores = torch.from_numpy(rng.permutation(12).astype(np.float32))
    kept = nms(boxes, scores, threshold).tolist()

    def iou(a, b):
        wh = (torch.min(boxes[a, 2:], boxes[b, 2:]) - torch.max(boxes[a, :2], boxes[b, :2])).clamp(min=0)
        areas = (boxes[[a, b], 2:] - boxes[[a, b], :2]).prod(1).sum()
        return (wh.prod() / (areas - wh.prod())).item()

    assert scores[kept].tolist() == sorted(scores[kept].tolist(), reverse=True)
    for box in range(12):
        stronger = [k for k in kept if scores[k] > scores[box]]
        suppressed = any(iou(box, k) > threshold + 1e-6 for k in stronger)
        clear = all(iou(box, k) < threshold - 1e-6 for k in stronger)
        assert not (suppressed and box in kept)
        assert not (clear and box not in kept)


@pytest.mark.parametrize(
    ("method", "factor"), [(0, 0.0), (1, 0.5), (2, float(np.exp(-(0.5**2) / 0.5)))], ids=["hard", "linear", "gaussian"]
)
def test_soft_nms_lowers_scores_by_overlap(method, factor):
    boxes = torch.tensor([[0.0, 0, 10, 5], [0, 0, 10, 10], [50, 50, 60, 60]])
    kept, indices = soft_nms(boxes, torch.tensor([0.8, 0.9, 0.1]), 0.3, 0.5, 1e-3, method)
    expected = {0: 0.8 * factor, 1: 0.9, 2: 0.1}
    order = sorted((i for i in expected if expected[i] >= 1e-3), key=lambda i: -expected[i])
    assert indices.tolist() == order
    torch.testing.assert_close(kept[:, 4], torch.tensor([expected[i] for i in order]))
    torch.testing.assert_close(kept[:, :4], boxes[order])


def naive_roi_align(x, rois, size, scale, ratio, aligned):
    """Sample by sample after He et al.: a sample within one pixel outside counts as on the border."""
    n, c, h, w = x.shape
    out = torch.zeros(len(rois), c, *size, dtype=x.dtype)

    def bilinear(image, y, x_):
        if y < -1 or y > h or x_ < -1 or x_ > w:
            return torch.zeros(c, dtype=x.dtype)
        y, x_ = min(max(y, 0), h - 1), min(max(x_, 0), w - 1)
        y0, x0 = int(y), int(x_)
        y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
        ly, lx = y - y0, x_ - x0
        m = x[image]
        top = (1 - lx) * m[:, y0, x0] + lx * m[:, y0, x1]
        return (1 - ly) * top + ly * ((1 - lx) * m[:, y1, x0] + lx * m[:, y1, x1])

    for r, (image, *box) in enumerate(rois.tolist()):
        left, top, right, bottom = (v * scale - (0.5 if aligned else 0) for v in box)
        width, height = right - left, bottom - top
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        bin_h, bin_w = height / size[0], width / size[1]
        ny, nx = (ratio, ratio) if ratio else (int(np.ceil(bin_h)), int(np.ceil(bin_w)))
        for i in range(size[0]):
            for j in range(size[1]):
                for a in range(ny):
                    for b in range(nx):
                        value = bilinear(
                            int(image), top + bin_h * (i + (a + 0.5) / ny), left + bin_w * (j + (b + 0.5) / nx)
                        )
                        out[r, :, i, j] += value / (ny * nx)
    return out


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_equals_sampling_one_by_one(ratio, aligned):
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    rois = torch.tensor(
        [[0, 1, 2, 9, 7], [1, -3, -4, 30, 25], [1, 16, 3, 18, 5], [0, 5, 5, 5.1, 5.2], [0, 40, 40, 50, 60]],
        dtype=torch.float64,
    )
    got = roi_align(x, rois, (2, 3), 0.5, ratio, aligned)
    torch.testing.assert_close(got, naive_roi_align(x, rois, (2, 3), 0.5, ratio, aligned))


def test_roi_align_gradient_and_no_regions():
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0, 0.3, 0.2, 4.1, 3.3]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: roi_align(t, rois, (2, 2)), x)
    empty = roi_align(x, rois[:0], (2, 2))
    assert empty.shape == (0, 2, 2, 2)
    assert torch.equal(torch.autograd.grad(empty.sum(), x)[0], torch.zeros_like(x))


def test_sigmoid_focal_loss_of_one_positive_and_background():
    logits = torch.zeros(2, 2, dtype=torch.float64)
    loss = sigmoid_focal_loss(logits, torch.tensor([1, 2]), gamma=2.0, alpha=0.25)
    log2 = float(np.log(2))  # p = 1/2 everywhere: weight (1/2)^2 times alpha or 1 - alpha
    expected = torch.tensor([[0.75, 0.25], [0.75, 0.75]], dtype=torch.float64) * 0.25 * log2
    torch.testing.assert_close(loss, expected)
