"""The cores know nothing of OpenMMLab: they import torch, numpy and the standard library only."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mmitp

PACKAGE = Path(mmitp.__file__).parent
CORES = [
    "pruning",
    "attacks",
    "ops",
    "evaluation/kitti_ap.py",
    "evaluation/kitti_bootstrap.py",
    "models/centernet_targets.py",
    "files.py",
    "values.py",
]
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


def imported(source, module, is_package=False, nodes=ast.walk):
    """Absolute names of everything that a source imports, wherever in the file (or among certain nodes of it)."""
    for node in nodes(ast.parse(source)):
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


STRANGERS = ["cv2", "mmcv", "mmdet", "mmengine", "mmpretrain", "torchvision"]
WITHOUT_OPENMMLAB = """
import importlib, importlib.util, sys
sys.modules.update(dict.fromkeys({strangers}))  # importing one of them raises ImportError
for name, path in {files}.items():
    if not name.startswith("mmitp.models."):
        importlib.import_module(name)
    else:  # by file: importing the package registers the adapters around it
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
print("imported", len({files}))
"""


def test_every_core_module_loads_without_openmmlab():
    files = {module_name(path): str(path) for path in core_files() if path.name != "__init__.py"}
    code = WITHOUT_OPENMMLAB.format(strangers=STRANGERS, files=files)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout == f"imported {len(files)}\n", done.stderr


#: Adapters whose mathematics a core module holds: none of these names of torch comes back into them.
DELEGATE = {
    "models/centernet_head.py": {"scatter_reduce_", "exp", "sqrt", "floor", "ceil", "permute"},
    "engine/detector_attack.py": {"softplus", "minimum", "matmul", "binary_cross_entropy_with_logits"},
    "engine/hooks/prune_hook.py": {"argsort", "cumsum", "sqrt", "sort", "topk"},
    "engine/hooks/adversarial_hook.py": {"sign", "grad", "clamp", "norm"},
    "engine/hooks/collapse_guard.py": {"sign", "grad", "clamp", "sqrt"},
    "models/report.py": {"norm", "sqrt"},
}


@pytest.mark.parametrize("adapter", DELEGATE)
def test_adapters_hold_no_mathematics(adapter):
    tree = ast.parse((PACKAGE / adapter).read_text())
    called = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert called & DELEGATE[adapter] == set()


def test_each_core_exists():
    assert [core for core in CORES if not (PACKAGE / core).exists()] == []


def test_the_reader_of_imports_finds_hidden_ones():
    source = (
        "import os\ndef f():\n    from mmengine import x\n    import mmcv.ops\nfrom . import y\nfrom ..models import z"
    )
    assert list(imported(source, "mmitp.ops.nms")) == ["os", "mmitp.ops", "mmitp.models", "mmengine", "mmcv.ops"]


def imports_at_module_level(sources):
    """(Module, whether it is a package) -> those of the same sources that importing it runs before it."""
    edges = {}
    for (module, package), source in sources.items():
        names = set(imported(source, module, package, nodes=lambda tree: tree.body))
        edges[module, package] = {other for other in sources if other[0] in names}
    return edges


@pytest.mark.parametrize("core", ["pruning", "attacks"])
def test_no_core_imports_itself_in_a_circle(core):
    files = sorted((PACKAGE / core).rglob("*.py"))
    sources = {(module_name(path), path.name == "__init__.py"): path.read_text() for path in files}
    edges = imports_at_module_level(sources)
    assert sum(map(len, edges.values())) >= len(files) - 1, "the reader of imports finds next to nothing"
    TopologicalSorter(edges).prepare()  # raises CycleError, which names the modules


def test_a_circle_is_found():
    sources = {
        ("p", True): "from .a import x",
        ("p.a", False): "from .b import x",
        ("p.b", False): "def f():\n    from .a import x",
    }
    TopologicalSorter(imports_at_module_level(sources)).prepare()
    sources["p.b", False] = "from .a import x"
    with pytest.raises(CycleError):
        TopologicalSorter(imports_at_module_level(sources)).prepare()
