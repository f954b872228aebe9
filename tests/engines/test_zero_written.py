"""A checkpoint of DeepSpeed, read by name: its files are made by hand, as its version 0.19 writes them.

Real ones, read by other numbers of processes: tests/distributed/test_zero.py.
"""

import pytest
import torch

pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
from deepspeed.utils.tensor_fragment import fragment_address

from hf_drt.engines.zero.written import Written, has_layout

W, BIAS, BASE = torch.arange(6.0).view(2, 3), torch.tensor([7.0, 8.0]), torch.arange(10.0, 15.0)
STEP = torch.tensor(4.0)


def save(inside, rank: int, model: dict | None, optimizer: dict) -> None:
    if model is not None:
        name = "mp_rank_00" if "param_shapes" not in model else f"zero_pp_rank_{rank}_mp_rank_00"
        counts = {"dp_world_size": 2, "global_steps": 4, "global_samples": 32, "skipped_steps": 0}
        torch.save(model | counts, inside / f"{name}_model_states.pt")
    torch.save({"optimizer_state_dict": optimizer}, inside / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.fixture
def inside(tmp_path):
    (tmp_path / "latest").write_text("global_step4")
    folder = tmp_path / "global_step4"
    folder.mkdir()
    return folder


def state_of(flat: torch.Tensor) -> dict:
    return {"step": STEP, "exp_avg": flat + 100}


@pytest.fixture
def zero_2(inside):
    """W and the bias one after the other, cut in the middle of W."""
    flats = [W.flatten()[:4], torch.cat([W.flatten()[4:], BIAS])]
    maps = [{"W": fragment_address(4, 0)}, {"W": fragment_address(2, 0), "bias": fragment_address(2, 2)}]
    for rank, (flat, held) in enumerate(zip(flats, maps, strict=True)):
        optimizer = {
            "single_partition_of_fp32_groups": [flat], "param_slice_mappings": [held], "loss_scaler": None,
            "base_optimizer_state": {"state": {0: state_of(flat)}},
        }  # fmt: skip
        save(inside, rank, {"module": {"W": W.bfloat16(), "base": BASE}} if rank == 0 else None, optimizer)
    return inside


@pytest.fixture
def zero_3(inside):
    """Every parameter in two; the frozen one of five elements has a sixth as padding."""
    for rank in (0, 1):
        flat = torch.cat([W.flatten()[3 * rank : 3 * rank + 3], BIAS[rank : rank + 1]])
        optimizer = {"fp32_flat_groups": [flat], "optimizer_state_dict": {"state": {0: state_of(flat)}}}
        model = {
            "module": {"W": torch.empty(0)}, "param_shapes": [{"W": W.shape, "bias": BIAS.shape}],
            "frozen_param_fragments": {"base": torch.cat([BASE, torch.zeros(1)])[3 * rank : 3 * rank + 3]},
        }  # fmt: skip
        save(inside, rank, model, optimizer)
    return inside


@pytest.mark.parametrize("stage", ["zero_2", "zero_3"])
def test_a_parameter_is_put_together_from_the_parts_of_all_processes(request, stage):
    folder = request.getfixturevalue(stage).parent
    written = Written(folder)
    assert torch.equal(written.master("W"), W.flatten())
    assert torch.equal(written.master("bias"), BIAS)
    state = written.state("W")
    assert torch.equal(state["exp_avg"], W.flatten() + 100)
    assert torch.equal(state["step"], STEP)  # a count is no part of anything
    assert torch.equal(written.value("W").flatten().float(), W.flatten())
    assert torch.equal(written.value("base")[:5], BASE)
    assert written.counts == {"global_steps": 4, "global_samples": 32, "skipped_steps": 0}


def test_deepspeed_itself_reads_as_many_processes_of_the_same_kind(zero_2, tmp_path):
    assert has_layout(tmp_path, 2, 1)
    assert has_layout(tmp_path, 2, 2)
    assert not has_layout(tmp_path, 2, 3)
    assert not has_layout(tmp_path, 4, 2)


def test_an_optimizer_without_state_has_none(zero_2, tmp_path):
    for path in zero_2.glob("*optim_states.pt"):
        held = torch.load(path, weights_only=False)
        held["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}
        torch.save(held, path)
    assert Written(tmp_path).state("W") == {}


def test_a_process_whose_part_is_missing_is_said(zero_2, tmp_path):
    (zero_2 / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(ValueError, match=r"written by 2 processes, and holds the optimizer's state of 1\. Resume from"):
        Written(tmp_path)


def test_a_name_that_it_does_not_have_is_said(zero_2, tmp_path):
    with pytest.raises(ValueError, match=r"^the checkpoint has no lm_head\.weight\. Resume from another checkpoint"):
        Written(tmp_path).value("lm_head.weight")
