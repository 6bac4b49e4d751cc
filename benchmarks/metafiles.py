"""The index that mim and mmengine read, made of what is in ``configs``: ``model-index.yml`` and every ``metafile.yml``.

    python benchmarks/metafiles.py [--write | --check]

A folder of experiments is a collection, and each of its configs a model of it. Results are those of committed metrics
files (``benchmarks/cifar_sweep``), averaged over seeds. ``--check`` fails where a file says something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PAPER = "Adversarial Robust Model Compression using In-Train Pruning (CVPR 2021 workshop SAIAD)"
HEAD = "# Written by benchmarks/metafiles.py from the configs and the committed metrics.\n"
# What the folders' names stand for; a folder that is not here is its own collection all the same.
DATA = {
    "bccd": ("Object Detection", "BCCD"),
    "cifar10": ("Image Classification", "CIFAR-10"),
    "coco": ("Object Detection", "COCO"),
    "demo": ("Object Detection", "generated road scenes"),
    "imagenet": ("Image Classification", "ImageNet-1k"),
    "kitti": ("Object Detection", "KITTI"),
}


def folders() -> list[Path]:
    """Folders of experiments: those with configs of their own."""
    return sorted(
        folder
        for folder in (ROOT / "configs").iterdir()
        if folder.is_dir() and not folder.name.startswith("_") and any(folder.glob("*.py"))
    )


def sweep_results(metrics: Path = ROOT / "benchmarks" / "cifar_sweep") -> dict[str, dict[str, float]]:
    """Mean accuracy over the finished seeds, in %, and their number, of every CIFAR-10 config trained as it stands."""
    accuracies: dict[str, list[float]] = {}
    for path in sorted(metrics.glob("*_s*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        changed = run["options"] or {"ranking", "inner_widths", "times", "length", "start"} & run.keys()
        if run["state"] == "finished" and not changed:
            accuracies.setdefault(run["config"], []).append(run["accuracy"])
    return {
        config: {"Top 1 Accuracy": round(statistics.mean(values), 2), "seeds": len(values)}
        for config, values in accuracies.items()
    }


def metafile(folder: Path, results: dict[str, dict[str, float]]) -> str:
    task, data = DATA.get(folder.name, ("", folder.name))
    readme = folder / "README.md" if (folder / "README.md").is_file() else ROOT / "configs" / "README.md"
    collection: dict[str, Any] = {
        "Name": f"mmitp-{folder.name}",
        "Metadata": {"Training Data": data, "Training Techniques": ["In-train pruning"]},
        "Paper": {"Title": PAPER},
        "README": readme.relative_to(ROOT).as_posix(),
    }
    models = []
    for config in sorted(folder.glob("*.py")):
        model: dict[str, Any] = {
            "Name": config.stem,
            "In Collection": collection["Name"],
            "Config": config.relative_to(ROOT).as_posix(),
        }
        if folder.name == "cifar10" and config.stem in results:
            model["Results"] = [{"Task": task, "Dataset": data, "Metrics": results[config.stem]}]
        models.append(model)
    return HEAD + yaml.safe_dump({"Collections": [collection], "Models": models}, sort_keys=False, width=120)


def files() -> dict[Path, str]:
    """Every file and what it has to say."""
    results = sweep_results()
    made = {folder / "metafile.yml": metafile(folder, results) for folder in folders()}
    imports = [path.relative_to(ROOT).as_posix() for path in made]
    made[ROOT / "model-index.yml"] = HEAD + yaml.safe_dump({"Import": imports})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--write", action="store_true")
    either.add_argument("--check", action="store_true", help="fail if a file says something else")
    args = parser.parse_args()
    wrong = [p for p, text in files().items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    if args.check and wrong:
        names = ", ".join(path.relative_to(ROOT).as_posix() for path in wrong)
        raise SystemExit(f"not what the configs and metrics say: {names}; python benchmarks/metafiles.py --write")
    if args.write:
        for path, text in files().items():
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
