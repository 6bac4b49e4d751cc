"""The cores know nothing of OpenMMLab: they import torch, numpy and the standard library only."""

import ast
import sys
from pathlib import Path

import mmitp

PACKAGE = Path(mmitp.__file__).parent
CORES = ["pruning", "attacks", "ops", "evaluation/kitti_ap.py", "evaluation/kitti_bootstrap.py"]
ALLOWED = sys.stdlib_module_names | {"torch", "numpy"}
# the bridges to other people's attacks import these where they are called, and nowhere else
OPTIONAL = {"attacks/suites.py": {"autoattack", "pyautoattack", "torchattacks"}}


def core_files():
    for core in CORES:
        path = PACKAGE / core
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source, module, is_package=False):
    """Absolute names of everything that a source imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = module.split(".")
                base = base[: len(base) - node.level + (1 if is_package else 0)]
                yield ".".join([*base, node.module] if node.module else base)
            else:
                yield node.module


def is_core(name):
    allowed = ["mmitp." + core.removesuffix(".py").replace("/", ".") for core in CORES]
    return any(name == core or name.startswith(core + ".") for core in allowed)


def foreign(path):
    names = imported(path.read_text(), module_name(path), path.name == "__init__.py")
    allowed = ALLOWED | OPTIONAL.get(path.relative_to(PACKAGE).as_posix(), set())
    return [n for n in names if n.split(".")[0] not in allowed and not is_core(n)]


def test_cores_import_only_torch_and_numpy():
    files = list(core_files())
    assert len(files) >= 4, "the cores have moved: this test looks in the wrong places"
    assert all(path.is_file() for path in files)
    strangers = {str(path.relative_to(PACKAGE)): names for path in files if (names := foreign(path))}
    assert strangers == {}


def test_each_core_exists():
    assert [core for core in CORES if not (PACKAGE / core).exists()] == []


def test_the_reader_of_imports_finds_hidden_ones():
    source = (
        "import os\ndef f():\n    from mmengine import x\n    import mmcv.ops\nfrom . import y\nfrom ..models import z"
    )
    assert list(imported(source, "mmitp.ops.nms")) == ["os", "mmitp.ops", "mmitp.models", "mmengine", "mmcv.ops"]
