"""The metrics reach the trackers behind ``report_to``, read back from what these store on disk without a network."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow


def expected_rows(history: list[dict]) -> list[dict]:
    """What the trainer has logged of DRT, with the names that its reporting callbacks give."""
    rows = ({f"train/{k}": v for k, v in row.items() if k.startswith("drt_")} for row in history)
    return [row for row in rows if row]


def reported_rows(rows: list[dict]) -> list[dict]:
    kept = ({k: v for k, v in row.items() if k.startswith("train/drt_")} for row in rows)
    return [row for row in kept if row]


def wandb_history(path: Path) -> list[dict]:
    """The logged rows of an offline run: protocol buffers in LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15  # in this block; a record's header is never split
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_stores_every_row(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    trainer = tiny.trainer(tmp_path / "out", report_to=["wandb"], drt_log_rank_steps=5, drt_log_rank_per_layer=True)
    trainer.train()
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    rows = reported_rows(wandb_history(path))
    assert rows == expected_rows(trainer.state.log_history)
    assert [row["train/drt_phase"] for row in rows if "train/drt_switch_seconds" in row] == [0, 1, 2, 3]


TRAINS = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest, tiny, torch
torch.set_num_threads(1)
trainer = tiny.trainer(sys.argv[2], report_to=["trackio"], project="reports", drt_log_rank_steps=5)
trainer.train()
trainer.save_state()
"""


def test_trackio_stores_every_row(tmp_path):
    """In a process of its own: trackio takes its folder from the environment, once."""
    pytest.importorskip("trackio")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", TRAINS, root / "tests", tmp_path / "out"], env=environment, check=True)
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    with sqlite3.connect(tmp_path / "reports.db") as database:
        stored = database.execute("SELECT metrics FROM metrics ORDER BY id").fetchall()
    rows = reported_rows([json.loads(text) for (text,) in stored])
    assert rows == expected_rows(history)
    assert [row["train/drt_phase"] for row in rows if "train/drt_switch_seconds" in row] == [0, 1, 2, 3]
