"""What all tests share: one thread, the same random numbers in every test, and no deadline on a busy machine."""

import os

import pytest
import torch
from hypothesis import settings

import mmitp  # noqa: F401  # first of all, so that OpenMMLab imports on machines without compiled operators

torch.set_num_threads(1)
# In CI the same examples every time: a new one that fails is found, and fixed, by whoever runs the tests at home.
settings.register_profile("mmitp", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("mmitp")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
