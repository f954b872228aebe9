"""DRTTrainer when Accelerate runs FSDP2: two gloo processes, made to shard on the CPU, against one without it."""

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
from hf_drt.forms import FactoredLinear
from hf_drt.trainer.engine_files import check_engine_files

WORKER = Path(__file__).with_name("fsdp_trainer_worker.py")


run = functools.partial(run_worker, WORKER)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(folder, 1)


@pytest.mark.parametrize("kind", [pytest.param("FULL_STATE_DICT", marks=pytest.mark.slow), "SHARDED_STATE_DICT"])
def test_a_sharded_run_equals_one_process_resumes_bitwise_and_saves_a_dense_model(alone, tmp_path, kind):
    folder, expected = alone
    seen = run(tmp_path, 2, kind=kind, resume=[2, 6, 10], other=str(folder / "checkpoint-6"))
    assert seen["sharded"]
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert [row["drt_phase"] for row in seen["history"] if "drt_switch_seconds" in row] == [0, 1, 2, 3]
    assert seen["gaps"] == {"2": 0.0, "6": 0.0, "10": 0.0}
    assert "was written without FSDP and DeepSpeed, this run is with FSDP" in seen["refusal"]
    mine, theirs = (load_file(path / "final" / "model.safetensors") for path in (tmp_path, folder))
    assert mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], W, atol=1e-5, rtol=0) for name, W in theirs.items())
    T.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert (tmp_path / "checkpoint-2" / "drt_state.json").is_file()
    with pytest.raises(
        CheckpointError, match=r"was written with FSDP, this run is without FSDP and DeepSpeed: .* \(--fsdp\)"
    ):
        tiny.trainer(tmp_path, max_steps=12, drt_schedule="factored@0 dense@3 adapter@6 factored@9").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    if kind == "FULL_STATE_DICT":  # its safetensors file loads natively, as that of any checkpoint
        loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
        assert isinstance(loaded.model.layers[0].mlp.up_proj, FactoredLinear)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"activation_checkpointing": True},
        {"fsdp_config": {"activation_checkpointing": True}},
        {"torch_compile": True},
        {"drt_factored_lr_scale": 0.5, "drt_moments": "project"},
        {"drt_dense_checkpointing": True, "drt_recompute": "bottleneck"},
        {"drt_schedule": "rotate(groups=2,share=70)", "drt_dense_checkpointing": True},
    ],
    ids=str,
)
def test_a_sharded_run_in_other_settings_equals_one_process(tmp_path, settings):
    seen = run(tmp_path / "two", 2, kind="FULL_STATE_DICT", **settings)
    settings.pop("fsdp_config", None)
    expected = run(tmp_path / "one", 1, **settings)
    assert seen["sharded"]
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bf16_with_an_adapter_first(tmp_path, dtype):
    """Accelerate upcasts what is trainable; the base is not, and becomes so at the inflation."""
    schedule = {"drt_schedule": "adapter@0 dense@3 factored@6 adapter@9"}
    seen = run(tmp_path, 2, kind="FULL_STATE_DICT", bf16=True, dtype=dtype, resume=["last"], **schedule)
    assert seen["gaps"] == {"last": 0.0}
    assert len(seen["losses"]) >= 8


@pytest.mark.slow
def test_the_best_model_is_loaded_in_its_own_form(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.3}
    seen = run(tmp_path, 2, kind="FULL_STATE_DICT", **best)
    evaluated = {row["step"]: row["eval_loss"] for row in seen["history"] if "eval_loss" in row}
    step = min(evaluated, key=evaluated.get)
    assert step < 9  # of another phase than the last one
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    batch = tiny.batch(rows=64)
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(evaluated[step], abs=1e-3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("optimizer.bin", r"optimizer\.bin is missing: the checkpoint is incomplete"),
        ("pytorch_model_fsdp.bin", r"pytorch_model_fsdp\.bin is cut short or damaged"),
    ],
)
def test_files_of_fsdp_that_are_missing_or_cut_short_are_named(tmp_path, damage, message):
    for name in ("optimizer.bin", "pytorch_model_fsdp.bin"):
        torch.save({}, tmp_path / name)
    check_engine_files(tmp_path)
    path = tmp_path / damage
    content = path.read_bytes()
    path.unlink()
    if "cut" in message:
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=message):
        check_engine_files(tmp_path)


def test_shards_without_their_metadata_are_incomplete(tmp_path):
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "optimizer_0").mkdir()
    with pytest.raises(CheckpointError, match=r"pytorch_model_fsdp_0/\.metadata is missing: the checkpoint is incomp"):
        check_engine_files(tmp_path)


def test_the_matrix_optimizer_is_refused_before_training(tmp_path):
    settings = json.dumps({"kind": "SHARDED_STATE_DICT", "drt_matrix_optimizer": "muon"})
    result = forked.distributed(WORKER, tmp_path, settings, processes=2, timeout=400)
    assert result.returncode != 0
    message = "ValueError: matrix_optimizer=muon needs whole matrices, and FSDP shards them. Train with DDP (leave fsdp"
    assert message in result.stderr, result.stderr[-6000:]
    assert not list(tmp_path.iterdir())
