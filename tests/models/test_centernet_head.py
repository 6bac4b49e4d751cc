"""Targets, ignored regions and decoding of the CenterNet head."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.dense_heads import CenterNetHead
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData

import mmitp  # noqa: F401
from mmitp.models import centernet_targets as module
from mmitp.models.centernet_head import KittiCenterNetHead
from mmitp.models.centernet_targets import centernet_gaussian_radius

HEIGHT, WIDTH = 96, 160  # input pixels; the map is 24 x 40
META = dict(batch_input_shape=(HEIGHT, WIDTH), scale_factor=(1.0, 1.0))


@pytest.fixture(scope="module")
def head() -> KittiCenterNetHead:
    torch.manual_seed(0)
    built = KittiCenterNetHead(
        num_classes=3,
        in_channels=8,
        feat_channels=8,
        loss_center_heatmap=dict(type="mmdet.GaussianFocalLoss"),
        loss_wh=dict(type="mmdet.L1Loss", loss_weight=0.1),
        loss_offset=dict(type="mmdet.L1Loss"),
        test_cfg=ConfigDict(topk=100, local_maximum_kernel=3, max_per_img=100),
    )
    built.init_weights()
    return built


def instances(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> InstanceData:
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels or [0] * len(boxes), dtype=torch.long),
    )


def targets(head: KittiCenterNetHead, *truths: InstanceData):
    return head.get_targets(
        [t.bboxes for t in truths], [t.labels for t in truths], (len(truths), 3, 24, 40), (HEIGHT, WIDTH)
    )


def predictions(batch: int = 1) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    # Within (0.1, 0.9): away from the clamp, whose gradient is zero.
    maps = [0.1 + 0.8 * torch.rand(batch, channels, 24, 40, generator=generator) for channels in (3, 2, 2)]
    return [[m.requires_grad_()] for m in maps]


def losses(head, maps, truths, ignored=None):
    return head.loss_by_feat(*maps, truths, [META] * len(truths), ignored)


def test_initial_weights(head):
    assert head.heatmap_head[-1].bias.tolist() == pytest.approx([-2.19] * 3)
    for branch in (head.wh_head, head.offset_head):
        assert not branch[0].bias.any()
        assert not branch[-1].bias.any()
        # torch's own start: uniform up to 1 / sqrt(8) for eight inputs of a 1x1 convolution
        assert 0.1 < branch[-1].weight.abs().max() <= 8**-0.5


@pytest.mark.parametrize(
    ("height", "width", "radius"),
    [
        # 0.5 * (-1.4 (h + w) + sqrt((1.4 (h + w))^2 + 3.36 h w)), the smallest of the three solutions
        (10, 10, 2),  # (33.47 - 28) / 2 = 2.73
        (20, 40, 7),  # (98.71 - 84) / 2 = 7.36
        (40, 20, 7),
        (0.5, 0.5, 0),  # rounded up to one cell: (3.35 - 2.8) / 2 = 0.27
        (9.2, 9.9, 2),  # rounded up to ten cells
    ],
)
def test_gaussian_radius(height: float, width: float, radius: int):
    assert centernet_gaussian_radius(torch.tensor([[height, width]])).tolist() == [radius]


def test_targets_of_one_box(head):
    result, count = targets(head, instances((20, 10, 61, 32), labels=[1]))
    # centre (40.5, 21) pixels = (10.125, 5.25) cells, size 10.25 x 5.5 cells
    heatmap = result["center_heatmap_target"]
    assert count == 1
    assert (heatmap == 1).nonzero().tolist() == [[0, 1, 5, 10]]
    assert not heatmap[:, [0, 2]].any()
    weight = result["wh_offset_target_weight"]
    assert weight.nonzero().tolist() == [[0, 0, 5, 10], [0, 1, 5, 10]]
    assert result["wh_target"][0, :, 5, 10].tolist() == [10.25, 5.5]
    assert result["offset_target"][0, :, 5, 10].tolist() == [0.125, 0.25]
    # radius 2 (11 x 6 cells: (28.06 - 23.8) / 2 = 2.13), sigma 5/6
    assert heatmap[0, 1, 5, 11].item() == pytest.approx(torch.tensor(-0.72).exp().item())
    assert heatmap[0, 1, 7, 12].item() == pytest.approx(torch.tensor(-0.72 * 8).exp().item())
    assert (heatmap > 0).sum() == 25


def one_object_at_a_time(truths: list[InstanceData]) -> dict[str, torch.Tensor]:
    """The targets by the definition, cell by cell, on the 24 x 40 map of a 96 x 160 input."""
    batch = len(truths)
    maps = {key: torch.zeros(batch, 2, 24, 40) for key in ("wh_target", "offset_target", "wh_offset_target_weight")}
    heatmap = torch.zeros(batch, 3, 24, 40)
    for image, truth in enumerate(truths):
        for (x1, y1, x2, y2), label in zip((truth.bboxes / 4).tolist(), truth.labels.tolist(), strict=True):
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            if not (0 <= cx < 40 and 0 <= cy < 24 and x1 < x2 and y1 < y2):
                continue
            x, y = int(cx), int(cy)
            radius = int(centernet_gaussian_radius(torch.tensor([[y2 - y1, x2 - x1]])))
            for v in range(max(y - radius, 0), min(y + radius + 1, 24)):
                for u in range(max(x - radius, 0), min(x + radius + 1, 40)):
                    value = math.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * ((2 * radius + 1) / 6) ** 2))
                    heatmap[image, label, v, u] = max(value, heatmap[image, label, v, u].item())
            maps["wh_target"][image, :, y, x] = torch.tensor([x2 - x1, y2 - y1])
            maps["offset_target"][image, :, y, x] = torch.tensor([cx - x, cy - y])
            maps["wh_offset_target_weight"][image, :, y, x] = 1
    return dict(center_heatmap_target=heatmap, **maps)


# Coordinates in quarters of a pixel, so that centres meet in one cell often enough and no rounding decides.
BOXES = st.lists(
    st.tuples(st.integers(-40, 680), st.integers(-40, 400), st.integers(-8, 360), st.integers(-8, 240)).map(
        lambda box: (box[0] / 4, box[1] / 4, (box[0] + box[2]) / 4, (box[1] + box[3]) / 4)
    ),
    max_size=6,
)


def labelled(boxes: list[tuple[float, ...]]) -> InstanceData:
    """The boxes with labels 0, 2, 1, 0, ..."""
    return instances(*boxes, labels=[2 * i % 3 for i in range(len(boxes))])


@settings(max_examples=40, deadline=None)
@given(st.lists(BOXES, min_size=1, max_size=4))
def test_targets_of_a_batch_equal_those_of_one_object_after_the_other(head, images):
    truths = [labelled(boxes) for boxes in images]
    result, count = targets(head, *truths)
    expected = one_object_at_a_time(truths)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert count == max(1, int((expected["center_heatmap_target"] == 1).sum()))


def test_of_two_objects_with_one_cell_the_last_gives_size_and_offset(head):
    """Centres (50, 26) and (51, 27) pixels, both in cell (12, 6); the third box, of another image, is at the same."""
    first, second, other = (30, 16, 70, 36), (41, 22, 61, 32), (46, 24, 54, 28)
    result, count = targets(head, instances(first, second, labels=[0, 1]), instances(other))
    assert result["wh_target"][0, :, 6, 12].tolist() == [5, 2.5]
    assert result["offset_target"][0, :, 6, 12].tolist() == [0.75, 0.75]
    assert result["wh_target"][1, :, 6, 12].tolist() == [2, 1]
    assert result["wh_offset_target_weight"].sum() == 2 * 2
    assert count == 3  # cells of the heat map, which has one for each class


@settings(max_examples=30, deadline=None)
@given(st.lists(BOXES, min_size=1, max_size=3))
def test_targets_equal_mmdets_own(head, images):
    """With our radius in place of its; it draws boxes without area too, and fails on those off the map."""
    truths = []
    for boxes in images:
        truth = labelled(boxes)
        centre = (truth.bboxes[:, :2] + truth.bboxes[:, 2:]) / 8
        extent = truth.bboxes[:, 2:] - truth.bboxes[:, :2]
        seen = (extent > 0).all(1) & (centre >= 0).all(1) & (centre < torch.tensor([40, 24])).all(1)
        truths.append(truth[seen])
    result, count = targets(head, *truths)
    arguments = ([t.bboxes for t in truths], [t.labels for t in truths], (len(truths), 3, 24, 40), (HEIGHT, WIDTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mmdet.models.dense_heads.centernet_head.gaussian_radius",
            lambda size, min_overlap: centernet_gaussian_radius(torch.stack(size)[None]).item(),
        )
        expected, expected_count = CenterNetHead.get_targets(head, *arguments)
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert count == expected_count


def test_a_large_batch_is_drawn_in_parts(head, monkeypatch):
    truths = [labelled([(4 * i, 3 * i, 20 + 9 * i, 15 + 5 * i) for i in range(1, 8)])] * 2
    whole, _ = targets(head, *truths)
    monkeypatch.setattr(module, "_CELLS_AT_ONCE", 3 * 24 * 40)
    parts, _ = targets(head, *truths)
    torch.testing.assert_close(parts, whole, atol=0, rtol=0)


def test_a_label_that_is_no_class_is_an_error(head):
    with pytest.raises(IndexError, match="index 3 is out of bounds"):
        targets(head, instances((20, 10, 61, 32), labels=[3]), instances())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | BOXES, min_size=1, max_size=3))
def test_ignored_cells_are_those_that_a_box_touches(head, images):
    regions = [None if i is None else instances(*i, labels=[n % 4 - 1 for n in range(len(i))]) for i in images]
    expected = torch.zeros(len(images), 3, 24, 40)
    for image, region in enumerate(regions):
        for (x1, y1, x2, y2), label in zip(region.bboxes.tolist(), region.labels, strict=True) if region else ():
            columns = slice(max(math.floor(x1 / 4), 0), max(math.ceil(x2 / 4), 0))
            rows = slice(max(math.floor(y1 / 4), 0), max(math.ceil(y2 / 4), 0))
            expected[image, slice(None) if label < 0 else label, rows, columns] = 1
    assert torch.equal(head.get_ignored_cells(regions, torch.zeros_like(expected), (HEIGHT, WIDTH)), expected)


@pytest.mark.parametrize(
    "box",
    [(-60, 10, 20, 40), (150, 10, 190, 40), (10, -50, 30, 20), (10, 90, 30, 120), (10, 10, 10, 30), (30, 30, 20, 20)],
)
def test_boxes_off_the_map_or_without_area_are_no_targets(head, box):
    result, count = targets(head, instances(box))
    assert not any(value.any() for value in result.values())
    assert count == 1


def test_batch_without_ground_truth(head):
    maps = predictions(2)
    result = losses(head, maps, [instances(), instances()], [None, None])
    assert all(loss.isfinite() for loss in result.values())
    assert result["loss_wh"] == 0
    assert result["loss_offset"] == 0
    sum(result.values()).backward()
    assert (maps[0][0].grad > 0).all()


def test_loss_values(head):
    """One positive cell at 0.5 in a silent map: focal (1 - 0.5)^2 * ln 2; size off by 3 and 1, offset by 0.5."""
    heatmap = torch.zeros(1, 3, 24, 40)
    heatmap[0, 0, 6, 12] = 0.5
    wh, offset = torch.zeros(1, 2, 24, 40), torch.zeros(1, 2, 24, 40)
    wh[0, :, 6, 12] = torch.tensor([7.0, 4.0])
    result = losses(head, ([heatmap], [wh], [offset]), [instances((30, 16, 70, 36))])
    # centre (50, 26) pixels = (12.5, 6.5) cells, size 10 x 5 cells
    assert result["loss_wh"].item() == pytest.approx(0.1 * (3 + 1) / 2)
    assert result["loss_offset"].item() == pytest.approx((0.5 + 0.5) / 2)
    assert result["loss_center_heatmap"].item() == pytest.approx(0.25 * 0.693147, abs=1e-5)


@pytest.mark.parametrize("bias", [-2.19, 7.0])
def test_mixed_precision_has_the_losses_and_gradients_of_float32(head, bias: float):
    """Scores of 0.1, as in the first steps, and of 0.999, which is 1 in bfloat16 and without a gradient there."""
    head = copy.deepcopy(head)
    torch.nn.init.constant_(head.heatmap_head[-1].bias, bias)
    features = torch.randn(2, 8, 24, 40)
    truths = [instances((30, 16, 70, 36), (100, 60, 140, 90), labels=[0, 2]), instances((20, 10, 61, 32))]
    results = []
    for enabled in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            maps = head((features,))
            found = losses(head, maps, truths)
            head.predict_by_feat(*maps, [META] * 2)
        assert maps[0][0].dtype == torch.float32
        assert {loss.dtype for loss in found.values()} == {torch.float32}
        sum(found.values()).backward()
        results.append((found, {name: p.grad for name, p in head.named_parameters()}))
    (exact, gradients), (mixed, mixed_gradients) = results
    for name, loss in mixed.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.01)
    for name, gradient in mixed_gradients.items():
        assert (gradient - gradients[name]).norm() < 0.05 * gradients[name].norm(), name


def test_saturated_heat_map_keeps_the_loss_finite(head):
    heatmap = torch.ones(1, 3, 24, 40)
    heatmap[0, 0, 6, 12] = 0
    zeros = torch.zeros(1, 2, 24, 40)
    loss = losses(head, ([heatmap], [zeros], [zeros]), [instances((30, 16, 70, 36))])["loss_center_heatmap"]
    # each cell is at most -ln(1e-4) = 9.21
    assert 9.21 < loss < 9.22 * 3 * 24 * 40


@pytest.mark.parametrize(("label", "classes"), [(-1, [0, 1, 2]), (1, [1]), (0, [0])])
def test_ignored_region_gives_no_gradient_for_its_classes(head, label: int, classes: list[int]):
    maps = predictions()
    ignored = instances((40, 20, 81, 60), labels=[label])  # cells 10..20 x 5..14
    losses(head, maps, [instances((100, 70, 140, 90), labels=[2])], [ignored])["loss_center_heatmap"].backward()
    gradient = maps[0][0].grad[0]
    inside = torch.zeros(3, 24, 40, dtype=torch.bool)
    inside[classes, 5:15, 10:21] = True
    assert (gradient[inside] == 0).all()
    assert (gradient[~inside] != 0).all()


def test_target_inside_an_ignored_region_keeps_its_loss(head):
    maps = predictions()
    ignored = instances((-50, -50, 500, 500), labels=[-1])
    losses(head, maps, [instances((100, 70, 140, 90), labels=[2])], [ignored])["loss_center_heatmap"].backward()
    # centre (120, 80) pixels = cell (30, 20)
    assert maps[0][0].grad.nonzero().tolist() == [[0, 2, 20, 30]]


def encode(head, truth: InstanceData) -> list[list[torch.Tensor]]:
    result, _ = targets(head, truth)
    return [[result[key]] for key in ("center_heatmap_target", "wh_target", "offset_target")]


def sure(result: InstanceData) -> InstanceData:
    return result[result.scores == 1]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 38), st.integers(1, 22), st.floats(0, 3.99), st.floats(0, 3.99), st.integers(0, 2)),
        min_size=1,
        max_size=8,
        unique_by=lambda box: (box[0], box[1]),
    )
)
def test_decoding_the_targets_returns_the_boxes(head, boxes):
    """Centres in distinct cells; boxes 2 x 1.5 cells: radius 0, so that each centre stays a peak."""
    centres = torch.tensor([[4 * x + dx, 4 * y + dy] for x, y, dx, dy, _ in boxes])
    half = torch.tensor([4.0, 3.0])
    truth = InstanceData(
        bboxes=torch.cat([centres - half, centres + half], dim=1), labels=torch.tensor([box[4] for box in boxes])
    )
    found = sure(head.predict_by_feat(*encode(head, truth), [META])[0])
    order = [sorted(range(len(item)), key=lambda i, item=item: item.bboxes[i].tolist()) for item in (found, truth)]
    torch.testing.assert_close(found.bboxes[order[0]], truth.bboxes[order[1]], atol=1e-4, rtol=0)
    assert found.labels[order[0]].tolist() == truth.labels[order[1]].tolist()


def test_boxes_return_in_coordinates_of_the_original_image(head):
    """An image of 310 x 92 scaled to 155 x 46 lies at the top left of the input; there is no 'border'."""
    meta = dict(batch_input_shape=(HEIGHT, WIDTH), ori_shape=(92, 310), img_shape=(46, 155), scale_factor=(0.5, 0.5))
    original = (100.0, 30.0, 160.0, 70.0)
    maps = encode(head, instances(tuple(0.5 * value for value in original)))
    assert sure(head.predict_by_feat(*maps, [meta])[0]).bboxes.tolist() == [list(original)]
    assert sure(head.predict_by_feat(*maps, [meta], rescale=False)[0]).bboxes.tolist() == [[50, 15, 80, 35]]
    bordered = sure(head.predict_by_feat(*maps, [dict(meta, border=(2, 0, 6, 0))])[0])
    assert bordered.bboxes.tolist() == [[88, 26, 148, 66]]


def test_boxes_are_clipped_to_the_original_image(head):
    meta = dict(META, ori_shape=(80, 150))
    found = sure(head.predict_by_feat(*encode(head, instances((-10, 40, 40, 100))), [meta])[0])
    assert found.bboxes.tolist() == [[0, 40, 40, 80]]


def test_missing_scale_factor_is_an_error_that_says_what_to_do(head):
    maps = encode(head, instances((20, 10, 61, 32)))
    with pytest.raises(ValueError, match="meta_keys"):
        head.predict_by_feat(*maps, [dict(batch_input_shape=(HEIGHT, WIDTH))])
