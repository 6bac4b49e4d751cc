"""Checkpoints of strangers are data: no tool runs what a pickle asks for, unless it is told to trust it."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from toy_config import VALIDATION, same, tiny_config

from mmitp.engine.checkpoint import read_checkpoint
from mmitp.engine.run import build_runner
from mmitp.engine.safe_load import load_data

ROOT = Path(__file__).parents[2]


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker, call=None):
        self.marker, self.call = str(marker), call

    def __reduce__(self):
        return self.call or (os.mkdir, (self.marker,))


def tool(name, *argv):
    spec = importlib.util.spec_from_file_location(f"strangers_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(arg) for arg in argv])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with everything that leaves something in checkpoints, and its config as a file."""
    folder = tmp_path_factory.mktemp("trained")
    tests = {key.replace("val_", "test_"): value for key, value in VALIDATION.items()}
    hooks = [
        dict(type="EMAHook"),
        dict(type="mmitp.AdversarialHook", eps=8, alpha=10),
        dict(type="mmitp.CollapseGuardHook", num_batches=1, steps=2, action="restore"),
    ]
    cfg = tiny_config(folder, epochs=4, hooks=hooks, accumulate=2, **tests, **VALIDATION)
    cfg.dump(str(folder / "config.py"))
    build_runner(cfg).train()
    return folder


TOOLS = {
    "test": lambda config, file, out: ("test", config, file, "--work-dir", out / "work"),
    "slim": lambda config, file, out: ("slim", config, file, out / "slim"),
    "export": lambda config, file, out: ("export", config, file, out / "net.pt"),
    "train --resume FILE": lambda config, file, out: ("train", config, "--work-dir", out / "work", "--resume", file),
    "train --resume": lambda config, file, out: ("train", config, "--work-dir", file.parent, "--resume"),
    "train load_from": lambda config, file, out: (
        *("train", config, "--work-dir", out / "work"),
        *("--cfg-options", f"load_from={file}"),
    ),
    "convert": lambda config, file, out: ("convert_resnet_cifar", file, out / "converted.pth"),
}


def planted(trained, folder, how):
    """A good checkpoint with a payload in it."""
    folder.mkdir()
    marker, file = folder / "marker", folder / "epoch_4.pth"
    checkpoint = torch.load(trained / "epoch_4.pth", weights_only=False)
    checkpoint["meta"]["payload"] = Payload(marker)
    torch.save(checkpoint, file, _use_new_zipfile_serialization=how == "zip")
    return marker, file


@pytest.mark.parametrize("how", ["zip", "legacy"])
@pytest.mark.parametrize("name", TOOLS)
def test_no_tool_runs_what_a_pickle_asks_for(trained, tmp_path, capsys, name, how):
    marker, file = planted(trained, tmp_path / "theirs", how)
    with pytest.raises(SystemExit, match="2"):
        tool(*TOOLS[name](trained / "config.py", file, tmp_path))
    assert not marker.exists()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"'{os.name}.mkdir'" in said
    assert "--trust" in said


def test_trusted_files_are_loaded_whatever_they_do(trained, tmp_path):
    marker, file = planted(trained, tmp_path / "theirs", "zip")
    assert tool("slim", trained / "config.py", file, tmp_path / "slim", "--trust") == 0
    assert marker.exists()


def test_a_config_in_a_checkpoint_is_not_run_on_resume(trained, tmp_path):
    """mmengine runs ``meta['config']`` as Python when it resumes; its own checkpoints have ``meta['cfg']``."""
    marker, file = tmp_path / "marker", tmp_path / "epoch_3.pth"
    checkpoint = torch.load(trained / "epoch_3.pth", weights_only=False)
    checkpoint["meta"]["config"] = f"open({str(marker)!r}, 'w')"
    torch.save(checkpoint, file)
    assert tool("train", trained / "config.py", "--work-dir", tmp_path / "work", "--resume", file) == 0
    assert not marker.exists()
    assert tool("train", trained / "config.py", "--work-dir", tmp_path / "more", "--resume", file, "--trust") == 0
    assert marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        (getattr, (torch.Tensor, "__init__")),
        (getattr, (dict, "get")),
        (os.system, ("true",)),
        (eval, ("1",)),
        (__import__, ("os",)),
    ],
    ids=lambda call: call[0].__name__ if isinstance(call, tuple) else None,
)
def test_attributes_and_functions_are_out_of_reach(tmp_path, call):
    torch.save(dict(state_dict=dict(), x=Payload("", call)), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="more than data"):
        load_data(tmp_path / "x.pth")


def test_our_own_checkpoints_are_data_and_resume_bit_for_bit(trained, tmp_path):
    """Histories of the log, EMA's copy, the guard's past and good state, and pending gradients included."""
    for path in trained.glob("epoch_*.pth"):
        assert read_checkpoint(str(path)).keys() == torch.load(path, weights_only=False).keys()
    assert tool(
        "train", trained / "config.py", "--work-dir", tmp_path / "work", "--resume", trained / "epoch_1.pth"
    ) == 0  # fmt: skip
    one, two = (torch.load(folder / "epoch_4.pth", weights_only=False) for folder in (trained, tmp_path / "work"))
    keys = set(one) - {"meta", "message_hub"}
    assert {"state_dict", "optimizer", "ema_state_dict", "mmitp_prune_hook", "mmitp_collapse_guard"} <= keys
    assert all(same(one[key], two[key]) for key in keys)
    histories = [checkpoint["message_hub"]["log_scalars"]["train/loss"].data[0] for checkpoint in (one, two)]
    assert histories[0].tolist() == histories[1].tolist()


SCHEDULES = {
    "OneCycleLR": dict(eta_max=0.1, total_steps=10),
    "CosineAnnealingLR": dict(T_max=5),
    "MultiStepLR": dict(milestones=[1]),
    "StepLR": dict(step_size=2),
    "LinearLR": dict(start_factor=0.1),
    "ConstantLR": dict(factor=0.1),
    "ExponentialLR": dict(gamma=0.9),
    "PolyLR": dict(eta_min=0.1),
    "CosineRestartLR": dict(periods=[5], restart_weights=[1.0], eta_min=0.0),
    "ReduceOnPlateauLR": dict(monitor="loss"),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_every_schedule_of_mmengine_can_be_resumed(tmp_path, name, anneal):
    from mmengine.registry import PARAM_SCHEDULERS

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    more = dict(anneal_strategy=anneal) if name == "OneCycleLR" else {}
    schedule = PARAM_SCHEDULERS.build(dict(type=name, optimizer=optimizer, **SCHEDULES[name], **more))
    torch.save(dict(param_schedulers=[schedule.state_dict()]), tmp_path / "x.pth")
    assert load_data(tmp_path / "x.pth")["param_schedulers"][0].keys() == schedule.state_dict().keys()


def test_files_of_numpy_1_and_2_are_data(tmp_path):
    """Their functions have moved; a file of either is read by both."""
    import numpy as np

    content = dict(state_dict=dict(a=torch.ones(1)), log=np.arange(3.0), number=np.float64(2), text=np.array(["x"]))
    torch.save(content, tmp_path / "x.pth")
    raw = (tmp_path / "x.pth").read_bytes()
    assert b"multiarray" in raw
    for name in (b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"):
        other = renamed(tmp_path / "x.pth", tmp_path / "y.pth", name)
        loaded = load_data(other)
        assert loaded["log"].tolist() == [0, 1, 2]
        assert (loaded["number"], loaded["text"].tolist()) == (2, ["x"])


def renamed(source, target, name):
    """A checkpoint whose pickle names NumPy's module so."""
    import re
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.namelist():
            content = old.read(record)
            if record.endswith("data.pkl"):
                content = re.sub(rb"cnumpy\.(_core|core)\.multiarray", name, content)
            new.writestr(record, content)
    return target
