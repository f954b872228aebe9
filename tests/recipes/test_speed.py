"""The recipes on speed at toy sizes: they run and fill their tables. What they measure is no test's business."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "benchmarks"))

import speed_forms
import speed_kit
import speed_layers
import speed_many_layers
import speed_matrix_optimizer
import speed_svd
import speed_switches
import torch

SMALL = [
    "--hidden", "32", "--intermediate", "48", "--layers", "1", "--heads", "2", "--vocab", "64", "--length", "16",
    "--rounds", "1",
]  # fmt: skip


def rows(text: str) -> list[list[str]]:
    """Cells of the tables' rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]


def test_layers_has_a_row_for_every_form_and_the_ratio_of_multiply_adds(capsys):
    speed_layers.main([*SMALL, "--tokens", "8", "--batch", "1"])
    table = rows(capsys.readouterr().out)
    layers, model, shared = table[:12], table[12:15], table[15:]
    ratios = {(row[0], row[2]): row[6] for row in layers}
    assert len(ratios) == 12
    assert ratios["48 x 32", "Factored 8"] == f"{8 * (48 + 32) / (48 * 32):.3f}"
    assert ratios["32 x 32", "Adapter 2"] == f"{2 / 3 + 2 * 64 / 32**2:.3f}"
    assert [row[0] for row in model] == ["dense", "factored", "adapter"]
    assert (model[0][2], model[0][3]) == ("1.000", "1.000")
    targets = {"dense": 4 * 32 * 32 + 3 * 32 * 48, "factored": 8 * (4 * 64 + 3 * 80)}
    rest = 64 * 32 + 2 * 16 * 32
    assert model[1][3] == f"{(targets['factored'] + rest) / (targets['dense'] + rest):.3f}"
    assert [row[0] for row in shared] == ["q, k, v"] * 2 + ["gate, up"] * 2


def test_switches_has_a_row_for_every_kind_and_full_svds_where_weights_are_decomposed(capsys):
    speed_switches.main([*SMALL, "--batch", "2", "--every", "10", "100"])
    table = rows(capsys.readouterr().out)
    switches, metrics = table[: len(speed_switches.SWITCHES)], table[len(speed_switches.SWITCHES) :]
    with_svd = {row[0] for row in switches if row[3] != "-"}
    assert with_svd == {row[0] for row in switches if row[0].endswith(("factored", "(principal)"))}
    assert [row[0] for row in metrics] == ["dense", "factored"]


def test_svd_marks_what_is_taken_and_shows_its_excess(capsys):
    speed_svd.main(["--shapes", "140x130", "--shares", "16", "4", "--rounds", "1"])
    table = rows(capsys.readouterr().out)
    assert [(row[2], "*" in row[4], "*" in row[6]) for row in table[:4]] == [
        ("8", True, False),
        ("32", False, True),
    ] * 2
    assert all(abs(float(row[5])) < 5e-3 and abs(float(row[7])) < 1e-4 for row in table[:4])
    assert [row[1] for row in table[4:]] == ["random", "1 / sqrt(i)"]


@pytest.mark.parametrize("method", ["dense", "factored", "adapter", "lora"])
def test_every_method_trains_the_same_layers(method):
    chosen = speed_kit.parser("").parse_args(SMALL)
    chosen.rank = 4
    model, optimizer = speed_forms.made(method, chosen)
    if method == "lora":
        pytest.importorskip("peft")
    low_rank = 4 * (4 * 64 + 3 * 80)
    expected = {"dense": 4 * 32 * 32 + 3 * 32 * 48}.get(method, low_rank)
    rest = 2 * 64 * 32 + 3 * 32
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == expected + rest
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(2):  # LoRA's A waits one step for B
        speed_kit.train_step(model, optimizer, speed_kit.tokens(chosen))()
    after = [p for p in model.parameters() if p.requires_grad]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_forms_has_a_row_for_every_method_and_leaves_out_what_is_not_installed(capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "galore_torch" else real(name))
    found = {"first": 9.0, "seconds": [2.0, 3.0, 4.0], "trainable": 1_500_000, "peak": 1234.5}
    small = {"first": 9.0, "seconds": [1.0, 1.5, 8.0], "trainable": 500_000, "peak": None}
    monkeypatch.setattr(speed_forms, "in_process", lambda method, _: found if method == "dense" else small)
    speed_forms.main(["--methods", "dense", "adapter", "galore"])
    out = capsys.readouterr().out
    assert "galore is left out: install galore-torch." in out
    assert rows(out) == [
        ["dense", "1.5 M", "9.00", "3.00", "1.000", "1,234"],
        ["adapter", "0.5 M", "9.00", "1.50", "0.500", "-"],
    ]


@pytest.mark.slow
def test_forms_measures_each_method_in_a_process_of_its_own(capsys):
    speed_forms.main([*SMALL, "--rank", "4", "--steps", "1", "--methods", "dense", "factored"])
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["dense", "factored"]


def test_many_layers_has_a_row_for_every_piece_of_work(capsys):
    speed_many_layers.main(["--blocks", "2", "--experts", "1", "2", "--rounds", "1"])
    table = rows(capsys.readouterr().out)
    assert {row[0] for row in table} >= {
        "find_targets",
        "install",
        "switch",
        "check of a checkpoint",
        "load_state_dict",
    }
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in table)


@pytest.mark.slow
def test_many_layers_compares_with_another_checkout(capsys):
    root = Path(__file__).parents[2]
    speed_many_layers.main(["--blocks", "1", "--compare", "1", "--against", str(root)])
    table = rows(capsys.readouterr().out)
    assert [row[0] for row in table] == list(speed_many_layers.COMPARED)


def test_matrix_optimizer_has_a_row_for_factors_and_dense_weights(capsys):
    speed_matrix_optimizer.main([*SMALL, "--ranks", "4", "--tokens-per-rank", "10"])
    factors, dense = rows(capsys.readouterr().out)
    assert [factors[:2], dense[:2]] == [["factors 4", "48"], ["dense", "48"]]  # 40 tokens are three samples of 16
    sides = 4 * 64 + 3 * 80
    update = 4 * sides * 4**2 + 7 * (36 * 4**3 + 5 * 4**3 // 3)
    assert factors[7] == f"{update / (update + 48 * 3 * 4 * sides):.1%}"
    square, wide = 5 * 3 * 32**3, 5 * (2 * 32**2 * 48 + 32**3)
    update = 4 * square + 3 * wide
    assert dense[7] == f"{update / (update + 48 * 3 * (4 * 32**2 + 3 * 32 * 48)):.1%}"
    assert [factors[10], dense[10]] == ["0.50", "0.50"]
    assert all(0 < float(cell.rstrip("%")) for row in (factors, dense) for cell in row[5:7])
