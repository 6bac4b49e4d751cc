"""The examples in the docstrings of the cores run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import mmitp.attacks
import mmitp.pruning
from mmitp.pruning import layers
from mmitp.pruning.graph import ops

MODULES = [
    info.name
    for package in (mmitp.attacks, mmitp.pruning)
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]
#: public names that a reader of the API meets first
SHOWN = """InTrainPruner MacBudget distillation_loss fold_masks fold_norms freeze_masks mask_model masked_layers
open_masks project register_channelwise register_op share_masks slim""".split()


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch):
    """Examples may register what they like."""
    monkeypatch.setattr(ops, "HANDLERS", dict(ops.HANDLERS))
    monkeypatch.setattr(layers, "_CHANNELWISE", set(layers._CHANNELWISE))


def examples_of(name):
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module, name) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples_of(name)])
def test_examples_run(name):
    said = []
    for test in examples_of(name):
        runner = doctest.DocTestRunner(verbose=False)
        with torch.random.fork_rng(devices=[]):
            runner.run(test, out=said.append)
    assert "".join(said) == ""


@pytest.mark.parametrize("name", SHOWN)
def test_a_public_name_shows_an_example(name):
    assert name in mmitp.pruning.__all__
    assert doctest.DocTestParser().get_examples(getattr(mmitp.pruning, name).__doc__)
