"""mmengine metrics around the cores of :mod:`mmitp.evaluation`."""

from mmitp.evaluation.metrics.kitti_metric import KittiMetric

__all__ = ["KittiMetric"]
