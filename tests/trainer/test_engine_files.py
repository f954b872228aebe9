"""The files of an engine's checkpoints: whose they are, and whether they are whole."""

import pytest
import torch
from torch.distributed.checkpoint import save

from hf_drt import CheckpointError
from hf_drt.trainer.engine_files import DEEPSPEED, FSDP, PLAIN, check_engine, check_engine_files, files_of

PART, MODEL = "zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"


@pytest.fixture
def checkpoint(tmp_path):
    """As DeepSpeed writes one on a single process."""
    (tmp_path / "global_step4").mkdir()
    (tmp_path / "latest").write_text("global_step4")
    for name in (PART, MODEL):
        torch.save({}, tmp_path / "global_step4" / name)
    return tmp_path


def test_whose_files_a_folder_has(tmp_path, checkpoint):
    assert files_of(checkpoint) == DEEPSPEED
    assert files_of(tmp_path / "nothing") == PLAIN
    (tmp_path / "sharded" / "pytorch_model_fsdp_0").mkdir(parents=True)
    assert files_of(tmp_path / "sharded") == FSDP


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("latest", r"latest is missing: the checkpoint is incomplete"),
        (f"global_step4/{PART}", r"global_step4 lacks an optimizer's state"),
        (f"global_step4/{MODEL}", r"global_step4 lacks a model's state"),
        (f"cut global_step4/{PART}", r"optim_states\.pt is cut short or damaged"),
    ],
)
def test_files_of_deepspeed_that_are_missing_or_cut_short_are_named(checkpoint, damage, message):
    check_engine_files(checkpoint)
    path = checkpoint / damage.removeprefix("cut ")
    content = path.read_bytes()
    path.unlink()
    if damage.startswith("cut "):
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=message):
        check_engine_files(checkpoint)


def test_a_checkpoint_resumes_under_the_engine_that_wrote_it(checkpoint):
    with pytest.raises(CheckpointError, match=r"was written with DeepSpeed, this run is with FSDP: .*\(--deepspeed\)"):
        check_engine(checkpoint, FSDP)
    check_engine(checkpoint, DEEPSPEED)


def test_a_process_whose_file_of_deepspeed_is_lost_is_counted(checkpoint):
    for rank in (0, 1):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    with pytest.raises(CheckpointError, match=r"global_step4 holds the optimizer's state of 1 of 2 processes\. Resume"):
        check_engine_files(checkpoint)


@pytest.fixture
def shards(tmp_path):
    """What FSDP writes in shards, of a model and an optimizer."""
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        save({"weight": torch.arange(1000.0)}, checkpoint_id=tmp_path / name, no_dist=True)
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut optimizer_0/__0_0.distcp", r"__0_0\.distcp is cut short: the checkpoint is incomplete"),
        ("pytorch_model_fsdp_0/__0_0.distcp", r"__0_0\.distcp is missing: the checkpoint is incomplete"),
        ("cut pytorch_model_fsdp_0/.metadata", r"\.metadata is cut short or damaged"),
    ],
)
def test_shards_reach_as_far_as_their_metadata_says(shards, damage, message):
    check_engine_files(shards)
    path = shards / damage.removeprefix("cut ")
    content = path.read_bytes()
    path.unlink()
    if damage.startswith("cut "):
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=message):
        check_engine_files(shards)
