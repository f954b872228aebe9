"""An average under DDP: all processes have the same one, that of a resumed run too; engines that share weights out are
refused."""

from pathlib import Path

import forked
import pytest
import tiny
import torch
from processes import final, run_worker

from hf_drt import DRTTrainer, EMACallback
from hf_drt.ema import read_average

SHARDED = """
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_drt import EMA

dist.init_process_group("gloo")
model = nn.Sequential(nn.Linear(4, 4))
plain = EMA(nn.Linear(4, 4))
fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
for use in (lambda: EMA(model), lambda: plain.copy_to(model)):
    try:
        use()
    except ValueError as error:
        print(error)
dist.destroy_process_group()
"""
WORKER = Path(__file__).with_name("ema_worker.py")
RUN = {
    "max_steps": 6, "gradient_accumulation_steps": 1, "drt_schedule": "factored:4@0 dense@2 adapter:4@4",
    "save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "logging_strategy": "no",
}  # fmt: skip


@pytest.mark.slow
def test_all_processes_have_the_same_average_and_one_writes_it(tmp_path):
    seen = run_worker(WORKER, tmp_path, 2, **RUN)
    assert seen["equal"] == [True] * 6
    assert seen["updates"] == 6
    assert sorted(seen["files"]) == ["checkpoint-3/drt_ema.safetensors", "checkpoint-6/drt_ema.safetensors"]
    assert [row["step"] for row in seen["history"] if "eval_loss" in row] == [3, 6]
    stored = final(tmp_path, "average.pt")
    last = read_average(tmp_path / "checkpoint-6")["averages"]
    assert all(torch.equal(last[key], value) for key, value in stored.items())


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_engines_under_which_no_process_holds_whole_weights_are_refused_by_name(tmp_path, engine):
    trainer = tiny.trainer(tmp_path, cls=DRTTrainer, **RUN | {"save_strategy": "no"})
    trainer.add_callback(EMACallback())
    setattr(trainer, f"is_{engine}_enabled", True)
    name = {"fsdp": "FSDP", "deepspeed": "DeepSpeed"}[engine]
    with pytest.raises(ValueError, match=f"averages whole weights, and under {name} a process holds a part"):
        trainer._drt_refuse_callbacks()


def test_a_model_in_shards_is_refused_by_the_name_of_its_engine():
    result = forked.distributed("-c", SHARDED, processes=2)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.count("EMA averages whole weights, and under FSDP2 a process holds a part") == 4
