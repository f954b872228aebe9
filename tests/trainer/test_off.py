"""With DRT off, the trainer is transformers' Trainer."""

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from hf_drt import CheckpointError, DRTTrainer, DRTTrainingArguments


def run(cls, arguments_cls, folder):
    arguments = tiny.arguments(folder, drt_schedule=None, save_strategy="steps", save_steps=5)
    plain = {k: v for k, v in arguments.to_dict().items() if not k.startswith("drt_")}
    data = tiny.dataset()
    trainer = cls(
        model=tiny.llama(attention_dropout=0.1), args=arguments_cls(**plain), train_dataset=data, eval_dataset=data
    )
    trainer.train()
    return trainer


def test_final_weights_and_checkpoints_are_bitwise_those_of_trainer(tmp_path):
    ours, theirs = (
        run(DRTTrainer, DRTTrainingArguments, tmp_path / "a"),
        run(Trainer, TrainingArguments, tmp_path / "b"),
    )
    for (name, p), (other, q) in zip(ours.model.state_dict().items(), theirs.model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(p, q)
    assert ours.drt is None
    assert not list(tmp_path.rglob("drt_state.json"))
    ours_files = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*")}
    assert ours_files == {p.relative_to(tmp_path / "b") for p in (tmp_path / "b").rglob("*")}
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (ours, theirs)]
    assert losses[0] == losses[1]


def test_one_dense_phase_trains_to_the_weights_of_trainer(tmp_path):
    """DRT on, but nothing to change: the machinery itself leaves no trace in the numbers."""
    ours = tiny.trainer(tmp_path / "a", drt_schedule="dense@0", drt_log_rank_steps=3)
    ours.train()
    theirs = run(Trainer, TrainingArguments, tmp_path / "b")
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


def test_a_low_rank_checkpoint_is_refused_with_drt_off(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    trainer = tiny.trainer(tmp_path / "b", drt_schedule=None)
    with pytest.raises(CheckpointError, match="was written by dynamic-rank training, which is off here"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
