"""mmdet's CenterNet head with CenterNet's own training details and KITTI's regions that do not count."""

from typing import Any

import torch
from mmdet.models.dense_heads import CenterNetHead
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData
from torch import Tensor

from mmitp.models.centernet_targets import centernet_targets, ignored_cells
from mmitp.registry import MODELS


@MODELS.register_module()
class KittiCenterNetHead(CenterNetHead):
    """mmdet's ``CenterNetHead``, trained and read out as CenterNet does it, with ignored regions.

    Differences from mmdet's:

    - The heat map is clamped to [1e-4, 1 - 1e-4] in the loss. Its sigmoid and the losses are taken in float32 under
      automatic mixed precision: between 0.996 and 1 bfloat16 knows no number.
    - Heat-map bias -2.19, biases of the size and offset branches 0; weights as torch initialises them.
    - Targets: :func:`~mmitp.models.centernet_targets.centernet_targets`. A box without area, or whose centre is off the
      map, is no target.
    - ``ignored_instances`` count: inside such a box the heat-map loss does not punish a response of the classes it
      concerns. Its label is the class index for which it is ignored (Van for Car), or a negative number for all
      classes (DontCare). Targets inside keep their loss.
    - Prediction needs no ``border`` in the image's meta data (absent: padding at the right and bottom only), and
      clips boxes to the image.

    The arguments are those of ``CenterNetHead``. Sizes are in cells of the output map (stride 4 with ``mmitp.DLAUp``).
    """

    def init_weights(self) -> None:
        """CenterNet's biases; the weights keep torch's initialisation."""
        self.heatmap_head[-1].bias.data.fill_(-2.19)
        for branch in (self.wh_head, self.offset_head):
            for layer in (branch[0], branch[-1]):
                layer.bias.data.zero_()

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heat map after the sigmoid, sizes and offsets of one map of features ``(N, in_channels, H, W)``."""
        logits = self.heatmap_head(x)
        heatmap = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        return heatmap, self.wh_head(x), self.offset_head(x)

    def loss_by_feat(
        self,
        center_heatmap_preds: list[Tensor],
        wh_preds: list[Tensor],
        offset_preds: list[Tensor],
        batch_gt_instances: list[InstanceData],
        batch_img_metas: list[dict[str, Any]],
        batch_gt_instances_ignore: list[InstanceData | None] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch of N images.

        Args:
            center_heatmap_preds: one map (N, classes, H, W), after the sigmoid.
            wh_preds: one map (N, 2, H, W), widths and heights in cells.
            offset_preds: one map (N, 2, H, W), x and y in cells.
            batch_gt_instances: N times ``bboxes`` (x1, y1, x2, y2 in input pixels) and ``labels``.
            batch_img_metas: N dicts with ``batch_input_shape``.
            batch_gt_instances_ignore: N times the same fields, or None; labels as in the class's description.

        Returns:
            ``loss_center_heatmap``, ``loss_wh`` and ``loss_offset``, each a 0-dim tensor.
        """
        heatmap = center_heatmap_preds[0].float().clamp(1e-4, 1 - 1e-4)
        targets, count = self.get_targets(
            [instances.bboxes for instances in batch_gt_instances],
            [instances.labels for instances in batch_gt_instances],
            heatmap.shape,
            batch_img_metas[0]["batch_input_shape"],
        )
        heatmap_target = targets["center_heatmap_target"]
        weight = 1 - self.get_ignored_cells(
            batch_gt_instances_ignore or [None] * len(batch_gt_instances),
            heatmap_target,
            batch_img_metas[0]["batch_input_shape"],
        )
        weight = weight.masked_fill(heatmap_target == 1, 1)
        box_weight = targets["wh_offset_target_weight"]
        return dict(
            loss_center_heatmap=self.loss_center_heatmap(heatmap, heatmap_target, weight=weight, avg_factor=count),
            # Two numbers a target, x and y. Cells without one are 0 in both: given a weight, mmdet's losses ask the
            # device whether any of it is positive.
            loss_wh=self.loss_wh(wh_preds[0] * box_weight, targets["wh_target"], avg_factor=2 * count),
            loss_offset=self.loss_offset(offset_preds[0] * box_weight, targets["offset_target"], avg_factor=2 * count),
        )

    def get_targets(
        self,
        gt_bboxes: list[Tensor],
        gt_labels: list[Tensor],
        feat_shape: tuple[int, ...],
        img_shape: tuple[int, ...],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """:func:`~mmitp.models.centernet_targets.centernet_targets`, in place of mmdet's."""
        return centernet_targets(gt_bboxes, gt_labels, feat_shape, img_shape)

    def get_ignored_cells(
        self, ignored: list[InstanceData | None], heatmap: Tensor, img_shape: tuple[int, ...]
    ) -> Tensor:
        """:func:`~mmitp.models.centernet_targets.ignored_cells` of mmdet's ``ignored_instances``."""
        regions = [None if image is None else (image.bboxes, image.labels) for image in ignored]
        return ignored_cells(regions, heatmap, img_shape)

    def _predict_by_feat_single(
        self,
        center_heatmap_pred: Tensor,
        wh_pred: Tensor,
        offset_pred: Tensor,
        img_meta: dict[str, Any],
        rescale: bool = True,
        with_nms: bool = False,
    ) -> InstanceData:
        if rescale and "scale_factor" not in img_meta:
            raise ValueError(
                "boxes cannot be brought back to the original image: the meta data has no 'scale_factor'; "
                "add it to meta_keys of PackDetInputs"
            )
        results = super()._predict_by_feat_single(
            center_heatmap_pred,
            wh_pred,
            offset_pred,
            {"border": (0.0, 0.0, 0.0, 0.0), **img_meta},
            rescale=rescale,
            with_nms=with_nms,
        )
        shape = img_meta.get("ori_shape" if rescale else "img_shape")
        if shape is not None:
            HorizontalBoxes(results.bboxes, clone=False).clip_(shape)
        return results
