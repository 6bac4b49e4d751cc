"""The examples in the docstrings of the cores run, and give what they say."""

import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re

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


def tables():
    """The public data classes of the pruning core that hold tensors."""
    for name in MODULES:
        if name.startswith("mmitp.pruning."):
            for cls in vars(importlib.import_module(name)).values():
                if inspect.isclass(cls) and dataclasses.is_dataclass(cls) and cls.__module__ == name:
                    fields = [
                        f.name for f in dataclasses.fields(cls) if "Tensor" in f.type and not f.type.startswith("list")
                    ]
                    if fields and not cls.__name__.startswith("_"):
                        yield pytest.param(cls, fields, id=cls.__name__)


@pytest.mark.parametrize(("cls", "fields"), list(tables()))
def test_index_tables_state_shape_and_type(cls, fields):
    _, attributes = inspect.getdoc(cls).split("Attributes:")
    said = {}
    for text in re.split(r"\n    (?=\w)", attributes):
        names, _, meaning = text.partition(":")
        said.update((name.strip(), meaning) for name in names.split(","))
    unsaid = [f for f in fields if not re.search(r"\([\w, ]*\)`` (int64|float64|bool)", said.get(f, ""))]
    assert unsaid == []


@pytest.mark.parametrize("name", SHOWN)
def test_a_public_name_shows_an_example(name):
    assert name in mmitp.pruning.__all__
    assert doctest.DocTestParser().get_examples(getattr(mmitp.pruning, name).__doc__)
