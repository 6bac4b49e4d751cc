"""Data sets, samplers and transforms; importing the package registers them where OpenMMLab is installed.

:mod:`mmitp.datasets.scenes` needs numpy and OpenCV alone.
"""

from importlib.util import find_spec

if find_spec("mmengine") is not None:
    from mmitp.datasets.cifar import FastCIFAR10, take_batch
    from mmitp.datasets.kitti import KittiDataset
    from mmitp.datasets.samplers import EvenSubset, FewSamples
    from mmitp.datasets.transforms import ScaleShiftCrop

    __all__ = ["EvenSubset", "FastCIFAR10", "FewSamples", "KittiDataset", "ScaleShiftCrop", "take_batch"]
