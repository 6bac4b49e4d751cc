"""Latency tables are looked at before a run: what does not rise, does not fit or is empty is refused by its key."""

import copy
import json

import pytest

from mmitp.pruning.latency import TABLE_FORMAT, LatencyCost, check_latency_table

LAYER = dict(
    inputs=[1, 4, 8], outputs=[1, 16], ns=[[1.0, 2.0], [3, 4.0], [5.0, 6.0]], gather=0.5, scatter=0.0, element=0,
    n_in=8, n_out=16, pair_macs=9,
)  # fmt: skip
TABLE = dict(format=TABLE_FORMAT, constant=10.0, layers=dict(conv=LAYER))


def test_a_whole_table_passes():
    check_latency_table(TABLE, "t.json")


@pytest.mark.parametrize(
    ("path", "value", "key"),
    [
        ("format", "other", "no latency table of format"),
        ("constant", -1.0, "constant must be a time"),
        ("constant", float("nan"), "constant must be a time"),
        ("layers", {}, "layers must be a dictionary with at least one"),
        ("layers.conv", [], "layers.conv must be a dictionary"),
        ("layers.conv.inputs", [], "layers.conv.inputs must be a list"),
        ("layers.conv.inputs", [1, 8, 4], "layers.conv.inputs must be rising"),
        ("layers.conv.inputs", [1, 4, 4], "layers.conv.inputs must be rising"),
        ("layers.conv.outputs", [0, 16], "layers.conv.outputs must be a list"),
        ("layers.conv.outputs", [1, 8, 16], r"layers.conv.ns\[0\] must be 3 times"),
        ("layers.conv.ns", [[1.0, 2.0]], "layers.conv.ns must be 3 lists"),
        ("layers.conv.ns", [[1.0, 2.0], [3.0, "4"], [5.0, 6.0]], r"layers.conv.ns\[1\] must be 2 times"),
        ("layers.conv.ns", [[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]], r"layers.conv.ns\[2\] must be 2 times"),
        ("layers.conv.gather", None, "layers.conv.gather must be a time"),
        ("layers.conv.n_out", 1.5, "layers.conv.n_out must be the last number of channels of 'outputs'"),
        ("layers.conv.n_in", 9, "layers.conv.n_in must be the last number of channels of 'inputs', or"),
        ("batch", 0, "batch must be a whole number of images"),
        ("shape", [32], "shape must be two whole numbers"),
        ("machine", 7, "machine must be a name"),
        ("threads", "four", "threads must be a whole number of threads"),
        ("threads", -1, "threads must be a whole number of threads"),
        ("layers.conv.pair_macs", float("inf"), "layers.conv.pair_macs must be a number"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_key(path, value, key):
    table = copy.deepcopy(TABLE)
    *way, last = path.split(".")
    node = table
    for part in way:
        node = node[part]
    node[last] = value
    with pytest.raises(ValueError, match=rf"t\.json.*{key}" if path != "format" else f"t.json is {key}") as refusal:
        check_latency_table(table, "t.json")
    assert "\n" not in str(refusal.value)


def test_files_are_read_and_looked_at_by_the_cost(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(TABLE))
    assert LatencyCost(str(path)).table == TABLE
    path.write_text(json.dumps(TABLE)[:-5])
    with pytest.raises(ValueError, match="t.json is no latency table, for it is no JSON"):
        LatencyCost(str(path))
    path.write_text(json.dumps(dict(TABLE, layers={})))
    with pytest.raises(ValueError, match="t.json: layers must be .* at least one layer"):
        LatencyCost(str(path))
    with pytest.raises(ValueError, match="the latency table: layers must be"):
        LatencyCost(dict(TABLE, layers={}))
