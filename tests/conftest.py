"""What all tests share: one thread, the same random numbers in every test, and no deadline on a busy machine."""

import functools
import gc
import importlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import settings

import mmitp  # noqa: F401  # first of all, so that OpenMMLab imports on machines without compiled operators

torch.set_num_threads(1)
# The same examples every time: a change that breaks a test is the change at hand. ``make fuzz`` looks for new ones.
settings.register_profile("mmitp", deadline=None, derandomize="MMITP_FUZZ" not in os.environ)
settings.load_profile("mmitp")


def pytest_collection_finish() -> None:
    """Leaves out of garbage collections what imports have made, half a million objects: mmengine's datasets collect one
    by one as they are built, and a fork pays for every page that a collection touches."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _quick_runners():
    """Of what every Runner does beside its steps, what takes longest, and what no test is about: asking the machine for
    its compilers (here once), formatting the config's text (not at all; it is read all the same), and the two seconds
    that an iteration-based loop sleeps whenever its data begin anew."""
    if importlib.util.find_spec("mmengine") is None:
        yield
        return
    runner, loops = map(importlib.import_module, ("mmengine.runner.runner", "mmengine.runner.loops"))
    yapf = importlib.import_module("yapf.yapflib.yapf_api")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "collect_env", functools.cache(runner.collect_env))
        patch.setattr(yapf, "FormatCode", lambda text, **options: (text, False))
        patch.setattr(loops, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _helper(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"mmitp_test_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def devices() -> ModuleType:
    """``tests/devices.py``: a GPU made of labels, for tests of device mismatches and of waits for the device."""
    return _helper("devices")


@pytest.fixture(scope="session")
def captured() -> ModuleType:
    """``tests/captured.py``: a CUDA graph made of operations on the CPU."""
    return _helper("captured")
