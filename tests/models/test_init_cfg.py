"""mmengine's initialisers find masked and slimmed layers as they find dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from mmengine.model import BaseModule
from torch import Tensor, nn

import mmitp.models.masked  # noqa: F401  makes the types known
from mmitp.pruning import MaskedLayer, mask_model, masked_layers
from mmitp.pruning.layers import _KINDS, _SLIM, CountedKind

PAIRS = [
    *(
        (dense, kind.masked)
        for dense, kind in _KINDS.items()
        if not (isinstance(kind, CountedKind) or issubclass(dense, MaskedLayer))
    ),
    *_SLIM.items(),
]


@pytest.mark.parametrize(("dense", "ours"), PAIRS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_a_type_bears_the_names_that_its_dense_type_is_found_by(dense: type, ours: type) -> None:
    def names(cls: type) -> set[str]:
        return {cls.__name__, *(base.__name__ for base in cls.__bases__)} - {"Module"}

    assert names(dense) <= names(ours)


class Net(BaseModule):
    def __init__(self, layer: str) -> None:
        super().__init__(init_cfg=[dict(type="Constant", layer=layer, val=3.0)])
        self.stem, self.padded = nn.Conv2d(3, 4, 1), Conv2dAdaptivePadding(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.padded(self.stem(x))


@pytest.mark.parametrize("layer", ["Conv2d", "Conv2dAdaptivePadding", "_ConvNd"])
def test_init_cfg_reaches_what_it_reaches_without_masks(layer: str) -> None:
    dense = Net(layer)
    masked = mask_model(copy.deepcopy(dense), include=["stem", "padded"])
    assert len(masked_layers(masked)) == 2
    for net in (dense, masked):
        torch.manual_seed(0)
        net.init_weights()
    for name, value in dense.named_parameters():
        assert torch.equal(dict(masked.named_parameters())[name], value), name
    reached = [name for name in ("stem", "padded") if bool((getattr(dense, name).weight == 3).all())]
    assert reached == {"Conv2d": ["stem", "padded"], "Conv2dAdaptivePadding": ["padded"], "_ConvNd": ["stem"]}[layer]
