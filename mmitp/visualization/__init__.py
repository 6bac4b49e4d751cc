"""Pictures: ground truth beside prediction, the budget over a run, channels kept per layer. No OpenMMLab needed."""

from mmitp.visualization.curves import plot_budget, plot_channels, plot_hw_losses, plot_robustness
from mmitp.visualization.detections import DrawnBox, draw_side_by_side, save_gt_vs_pred

__all__ = [
    "DrawnBox",
    "draw_side_by_side",
    "plot_budget",
    "plot_channels",
    "plot_hw_losses",
    "plot_robustness",
    "save_gt_vs_pred",
]
