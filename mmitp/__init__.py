"""mmitp: in-train pruning and adversarial robustness for OpenMMLab models.

Importing this package imports neither torch nor OpenMMLab. It only installs the import hooks of :mod:`mmitp.compat`,
so that a later ``import mmcv``, ``import mmdet`` or ``import torchvision`` works where compiled operators are missing.
"""

from mmitp import compat

__version__ = "0.1.0"
__all__ = ["__version__"]

compat.install()
