"""Pushes during training, and adapters, of a model that FSDP2 has sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import TOKEN, Hub

WORKER = Path(__file__).with_name("pushing_shards.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "SHARDED_STATE_DICT", "drt_schedule": "factored:4@0 dense@2"},
        {"kind": "FULL_STATE_DICT", "drt_schedule": "factored:4@0 dense@2", "fsdp_config": {"cpu_offload": True}},
        {"kind": "FULL_STATE_DICT", "drt_schedule": "dense@0 factored:4@2", "drt_export": "native"},
        {
            "kind": "SHARDED_STATE_DICT", "drt_schedule": "adapter:4@0 adapter:4@2", "drt_export": "adapter",
            "fsdp_config": {"activation_checkpointing": True},
        },
    ],
    ids=["shards", "whole files, offload", "native", "adapter"],
)  # fmt: skip
def test_every_phase_that_is_pushed_loads_as_the_model_of_its_last_step(tmp_path, settings):
    hub = Hub()
    hub.fail("POST .*/commit/", 1, 403)
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    command += [str(tmp_path / "out"), json.dumps(settings)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr[-6000:]
    assert "main are as they were" in result.stdout
    repo = hub.repos["user/shards"]
    assert list(repo.titles.values()) == [
        "init", *(f"Training in progress, step {step}{what}" for step in (2, 4) for what in ("", ", checkpoint")),
        "End of training",
    ]  # fmt: skip
    name = "pytorch_model_fsdp_0/.metadata" if "SHARDED" in settings["kind"] else "pytorch_model_fsdp.bin"
    assert f"last-checkpoint/{name}" in repo.names("main")
    assert ("adapter_config.json" in repo.names("main")) == (settings.get("drt_export") == "adapter")
