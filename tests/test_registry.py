"""Every name in scope mmitp resolves in a fresh process, by the registry alone."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("mmpretrain", reason="the OpenMMLab stack is not installed (extra mm)")
pytest.importorskip("mmdet", reason="the OpenMMLab stack is not installed (extra mm)")

import mmitp
from mmitp import registry

ROOT = Path(__file__).parents[1]

# One process for all: third-party packages are imported once, and each registry is asked in a fork that has imported
# nothing of mmitp's but the registries themselves.
ASK = """
import json, os, sys
import mmitp
import mmdet.models, mmpretrain.models
import mmengine.registry as parents
from mmitp import registry

missing = []
for name, wanted in json.loads(sys.argv[1]).items():
    assert not [m for m in sys.modules if m.startswith(('mmitp.models', 'mmitp.engine', 'mmitp.datasets'))]
    read, write = os.pipe()
    if os.fork() == 0:
        lost = [key for key in wanted if getattr(parents, name).get(f'mmitp.{key}') is None]
        os.write(write, json.dumps(lost).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        missing += [f'{name}: {key}' for key in json.loads(answer.read())]
    os.wait()
print('MISSING', json.dumps(missing))
"""


def registered() -> dict[str, list[str]]:
    """Names by registry, after the import of every module of the package."""
    for found in pkgutil.walk_packages(mmitp.__path__, "mmitp."):
        if not found.name.endswith("__main__"):
            import_module(found.name)
    names = {}
    for name in registry.__all__:
        members = getattr(registry, name).module_dict
        names[name] = sorted(key for key, member in members.items() if member.__module__.startswith("mmitp."))
    return {name: members for name, members in names.items() if members}


def mentioned() -> set[str]:
    """What configs and documentation write as 'mmitp.X' in quotes."""
    files = [*ROOT.glob("configs/**/*"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*")]
    files += ROOT.glob("mmitp/**/*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in files if path.suffix in (".py", ".md"))
    return set(re.findall(r"""["']mmitp\.([A-Z]\w*|take_batch)["']""", text))


def test_every_registered_class_resolves_by_its_registry_alone() -> None:
    names = registered()
    assert "EvenSubset" in names["DATA_SAMPLERS"]
    assert len(names) >= 6
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(names)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.split("MISSING")[1]) == []


def test_every_name_in_configs_and_documentation_is_registered() -> None:
    known = {key for members in registered().values() for key in members}
    assert {"PruneHook", "MaskedModel", "KittiDataset", "take_batch"} <= mentioned()
    assert mentioned() - known == {"X"}  # "any name" in a docstring
