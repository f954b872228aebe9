"""DRTTrainer under DeepSpeed: gloo processes with ZeRO-1, 2 and 3, against one process without it.

``pytest -m slow tests/distributed/test_zero.py``. DeepSpeed compiles an extension in the first of them.
"""

import functools
import json
from pathlib import Path

import forked
import pytest
import tiny
import torch
import transformers as T
from processes import run_worker
from safetensors.torch import load_file

from hf_drt import CheckpointError

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
WORKER = Path(__file__).with_name("zero_worker.py")
ALONE = ("stage", "zero", "resume", "pretrained")  # settings of a run under DeepSpeed alone

SGD = {"optim": "sgd", "learning_rate": 0.1}

run = functools.partial(run_worker, WORKER)


def switches(seen: dict) -> list[int]:
    return [row["drt_phase"] for row in seen["history"] if "drt_switch_seconds" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(folder, 1)


def check_against(alone, folder: Path, seen: dict) -> None:
    """Losses, and the dense model that is saved; the parts of DeepSpeed's optimizer that are relied on."""
    theirs, expected = alone
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert switches(seen) == [0, 1, 2, 3]
    assert seen["equal"]
    assert seen["missing"] == []
    mine, other = (load_file(path / "final" / "model.safetensors") for path in (folder, theirs))
    assert mine.keys() == other.keys()
    assert all(torch.allclose(mine[name], W, atol=1e-5, rtol=0) for name, W in other.items())
    T.AutoModelForCausalLM.from_pretrained(folder / "final")


@pytest.mark.slow
def test_zero_3_equals_one_process_and_saves_a_dense_model(alone, tmp_path):
    check_against(alone, tmp_path, run(tmp_path, 2, stage=3, save_strategy="no"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_equals_one_process_and_resumes_bitwise(alone, tmp_path, stage):
    seen = run(tmp_path, 2, stage=stage, resume=[2, 6, 10], other=str(alone[0] / "checkpoint-6"))
    check_against(alone, tmp_path, seen)
    assert seen["gaps"] == {"2": 0.0, "6": 0.0, "10": 0.0}
    assert "was written without FSDP and DeepSpeed, this run is with DeepSpeed" in seen["refusal"]
    with pytest.raises(CheckpointError, match=r"was written with DeepSpeed, this run is without .* \(--deepspeed\)"):
        tiny.trainer(tmp_path, max_steps=12, drt_schedule="factored@0 dense@3 adapter@6 factored@9").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_with_sgd_losses_are_those_of_one_process(tmp_path, stage, processes):
    settings = {**SGD, "save_strategy": "no"}
    expected, seen = run(tmp_path / "one", 1, **settings), run(tmp_path / "all", processes, stage=stage, **settings)
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert switches(seen) == [0, 1, 2, 3]
    assert seen["equal"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_in_bf16_it_trains_as_one_process_does_and_resumes_bitwise(tmp_path, stage, processes):
    """DeepSpeed's weights are bf16 outright, with float32 ones beside them; autocast's are float32."""
    expected = run(tmp_path / "one", 1, bf16=True)
    seen = run(tmp_path / "all", processes, stage=stage, bf16=True, resume=[2, 6, 10])
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    assert seen["equal"]
    assert seen["gaps"] == {"2": 0.0, "6": 0.0, "10": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"stage": 2, "zero": {"offload_optimizer": {"device": "cpu"}}},
        {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}},
        {"stage": 2, "drt_schedule": "rotate(groups=2,share=70)"},
        {"stage": 3, "drt_schedule": "rotate(groups=2,share=70)"},
        {"stage": 1, "drt_schedule": "dense@0 factored@3 dense@6 adapter@9"},
        {"stage": 3, "drt_schedule": "dense@0 factored@3 dense@6 adapter@9"},
        {"stage": 1, "drt_moments": "project"},
        {"stage": 3, "drt_moments": "project"},
        {"stage": 3, "drt_factored_lr_scale": 0.5, "drt_rewarmup_steps": 2, "max_grad_norm": 0.05},
        {"stage": 3, "pretrained": True},
        {"stage": 3, "activation_checkpointing": True},
    ],
    ids=str,
)
def test_other_settings_equal_one_process_and_resume_bitwise(tmp_path, settings):
    seen = run(tmp_path / "two", 2, **settings, resume=[6, 10])
    expected = run(tmp_path / "one", 1, **{key: value for key, value in settings.items() if key not in ALONE})
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert seen["gaps"] == {"6": 0.0, "10": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_accumulated_batches_equal_one(tmp_path, stage):
    settings = {"save_strategy": "no", "max_grad_norm": 0.05}
    expected = run(tmp_path / "one", 1, **settings, gradient_accumulation_steps=1)
    parts = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    seen = run(tmp_path / "two", 2, stage=stage, **settings, **parts)
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrote", "reads", "settings"),
    [
        ((2, 1), (4, 1), SGD), ((4, 2), (2, 2), SGD), ((2, 3), (4, 3), SGD), ((4, 3), (1, 3), SGD),
        ((1, 3), (2, 3), SGD),
        ((2, 2), (4, 3), {}), ((4, 3), (2, 1), {}), ((2, 1), (4, 1), {"bf16": True}), ((4, 3), (2, 3), {"bf16": True}),
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_is_read_by_other_processes_and_stages(tmp_path, wrote, reads, settings):
    """Before a switch, at one, in the adapter form with its frozen weights, and in the last phase."""
    processes, stage = wrote
    before = run(tmp_path / "before", processes, stage=stage, **settings)
    paths = [str(tmp_path / "before" / f"checkpoint-{step}") for step in (2, 3, 7, 10)]
    processes, stage = reads
    seen = run(tmp_path / "after", processes, stage=stage, save_strategy="no", others=paths, **settings)
    exact = 1e-3 if "bf16" in settings else 1e-5
    assert all(losses == pytest.approx(before["losses"], abs=exact) for losses in seen["others"])


@pytest.mark.slow
def test_a_second_run_of_one_trainer_is_refused(tmp_path):
    seen = run(tmp_path, 2, stage=2, save_strategy="no", twice=True)
    assert "DeepSpeed has wrapped this trainer's model already, in an earlier train() or evaluate()" in seen["refusal"]


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["reset", "project"])
def test_a_switch_under_zero_3_holds_one_whole_layer_however_many_there_are(tmp_path, moments):
    """One layer, with the copies that its decomposition, its merge and its two moments make of it."""
    worker, seen = WORKER.with_name("zero_peak_worker.py"), {}
    for blocks in (2, 6):
        folder = tmp_path / str(blocks)
        folder.mkdir()
        words = worker, folder, json.dumps({"blocks": blocks, "moments": moments})
        result = forked.distributed(*words, processes=2, timeout=400)
        assert result.returncode == 0, result.stderr[-6000:]
        seen[blocks] = json.loads((folder / "seen.json").read_text())
    assert len(seen[2]) == 4
    most = {blocks: max(row["wholes"] for row in rows) for blocks, rows in seen.items()}
    assert 0 < most[6] <= most[2] <= 12
    assert all(row["left"] == 0 for row in seen[6])
