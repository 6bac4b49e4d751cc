"""What all tests share: one thread, and the same random numbers in every test."""

import pytest
import torch

import mmitp  # noqa: F401  # first of all, so that OpenMMLab imports on machines without compiled operators

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
