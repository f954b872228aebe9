"""Speeds of machines: built-in rows, a user's own table, and what is wrong with one."""

import json
from dataclasses import replace

import pytest

from hf_drt.simulate import MACHINES, machine_for
from hf_drt.simulate.processes.links import Link

TABLE = {
    "origin": "measured", "devices": 4, "flops": {"bfloat16": 1e14}, "decomposition": 1e10, "memory_gb": 24,
    "node": {"bandwidth": 1e11, "latency": 1e-6}, "network": {"bandwidth": 1e10, "latency": 5e-6},
}  # fmt: skip
TOML = """
origin = "measured"
devices = 4
memory_gb = 24
decomposition = 1e10
[flops]
bfloat16 = 1e14
[node]
bandwidth = 1e11
latency = 1e-6
[network]
bandwidth = 1e10
latency = 5e-6
"""


def test_built_in_rows_are_assumed_and_name_their_source():
    assert {row.origin for row in MACHINES.values()} == {"assumed"}
    assert all("data sheet" in row.source and row.utilisation == 0.4 for row in MACHINES.values())


def test_a_table_in_toml_is_that_in_json(tmp_path):
    (tmp_path / "own.toml").write_text(TOML)
    (tmp_path / "own.json").write_text(json.dumps(TABLE))
    own = machine_for(str(tmp_path / "own.toml"))
    assert replace(own, source="") == replace(machine_for(str(tmp_path / "own.json")), source="")
    assert (own.name, own.origin, own.memory, own.devices) == ("own", "measured", 24 * 10**9, 4)
    assert own.node == Link(1e11, 1e-6)


@pytest.mark.parametrize(
    ("count", "stride", "bandwidth", "latency"),
    [
        (4, 1, 1e11, 1e-6),  # within a node
        (
            8,
            1,
            4e10,
            (5e-6 + 3 * 1e-6) / 4,
        ),  # two nodes, four network links side by side
        (2, 4, 1e10, 5e-6),  # one process of each node
        (4, 2, 2e10, (5e-6 + 1e-6) / 2),  # two of each
    ],
)
def test_rings_within_nodes_and_across(tmp_path, count, stride, bandwidth, latency):
    (tmp_path / "own.toml").write_text(TOML)
    ring = machine_for(str(tmp_path / "own.toml")).ring(count, stride)
    assert (ring.count, ring.bandwidth) == (count, bandwidth)
    assert ring.latency == pytest.approx(latency)


def test_a_node_is_not_left_faster_than_its_own_link():
    h100 = MACHINES["h100"]
    assert h100.ring(512).bandwidth == min(h100.node.bandwidth, 8 * h100.network.bandwidth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": "told"}, "origin must be one of assumed, measured, got 'told'"),
        ({"devices": 0}, "devices must be a whole number of at least 1, got 0"),
        ({"devices": True}, "devices must be a whole number of at least 1, got True"),
        ({"flops": {}}, "flops must have a speed of float32 or bfloat16, and has none"),
        ({"flops": {"int4": 1}}, "flops has int4, which is not known; allowed are float32, bfloat16"),
        ({"flops": 3}, "flops must be a table with float32, bfloat16, got 3"),
        ({"utilisation": 40}, "utilisation must lie in (0, 1], got 40"),
        ({"node": {"bandwidth": 1e9}}, "node lacks latency; needed are bandwidth, latency"),
        ({"network": {"bandwidth": "50GB", "latency": 0}}, "bandwidth must be a number above 0, got '50GB'"),
        ({"network": {"bandwidth": 1, "latency": -1}}, "latency must be a number of at least 0, got -1"),
        ({"memory_gb": 0}, "memory_gb must be a number above 0, got 0"),
        ({"decomposition": float("inf")}, "decomposition must be a number above 0, got inf"),
        ({"speed": 1}, "has speed, which is not known; allowed are name, origin"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, change, message):
    (tmp_path / "own.json").write_text(json.dumps(TABLE | change))
    with pytest.raises(ValueError, match=r"own\.json") as error:
        machine_for(str(tmp_path / "own.json"))
    assert message in str(error.value)


def test_what_is_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"'h1000' is neither a machine that is known \(a100, h100, h200"):
        machine_for("h1000")
    with pytest.raises(ValueError, match=r"nowhere\.toml cannot be read"):
        machine_for(str(tmp_path / "nowhere.toml"))
    (tmp_path / "odd.json").write_text("{")
    with pytest.raises(ValueError, match=r"odd\.json cannot be read .*docs/scale\.md shows a table"):
        machine_for(str(tmp_path / "odd.json"))
    (tmp_path / "less.json").write_text(json.dumps({"origin": "measured"}))
    with pytest.raises(ValueError, match="lacks devices, flops, decomposition, node, network; needed are"):
        machine_for(str(tmp_path / "less.json"))


def test_a_dtype_without_speed_is_refused(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(TABLE))
    with pytest.raises(ValueError, match="own has no FLOPs per second of float32, only of bfloat16"):
        machine_for(str(tmp_path / "own.json")).compute(1.0, "float32")
