"""The README's figures of the demo are those of the committed run."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_demos_table_is_the_committed_runs():
    text, run = (ROOT / "README.md").read_text(), json.loads((ROOT / "benchmarks/demo.json").read_text())
    rows = {
        "Car, masked network": "ap_car_r40",
        "Car, slimmed network": "ap_car_r40_slim",
        "Pedestrian, slimmed": "ap_pedestrian_r40",
        "Cyclist, slimmed": "ap_cyclist_r40",
    }
    for title, key in rows.items():
        assert f"| {title} | {' | '.join(f'{ap:.2f}' for ap in run[key])} |" in text
    assert f"{run['macs_slim']:,} of {run['macs_dense']:,} MACs kept ({run['ratio']:.4f})" in text
    assert f"{run['params_slim']:,} of {run['params_dense']:,} parameters, {run['epochs']} epochs" in text
    assert run["ratio"] == run["macs_slim"] / run["macs_dense"] <= run["target"]
