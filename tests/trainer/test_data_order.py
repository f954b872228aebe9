"""A data loader is made as often as in a plain Trainer, so that an order out of a global generator resumes bitwise."""

import random
import shutil

import numpy as np
import pytest
import tiny
import torch
from transformers import Trainer

from hf_drt import DRTTrainer, DRTTrainerMixin


class Shuffles:
    """The order of the data comes from numpy's or Python's generator when the loader is made."""

    source = "numpy"
    made = 0

    def get_train_dataloader(self):
        self.made += 1
        rows = len(self.train_dataset)
        order = np.random.permutation(rows) if self.source == "numpy" else random.sample(range(rows), rows)
        kept, self.train_dataset = self.train_dataset, self.train_dataset.select(order)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = kept


class Above(Shuffles, DRTTrainer):
    """The user's class over ours."""


class Below(DRTTrainerMixin, type("Library", (Shuffles, Trainer), {})):
    """Ours over a library's class."""


class Plain(Shuffles, Trainer):
    pass


def run(folder, cls, resume=None, **changes):
    trainer = tiny.trainer(folder, cls=cls, max_steps=12, save_strategy="steps", save_steps=3, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.sampled(2)
@pytest.mark.parametrize("source", ["numpy", "python"])
@pytest.mark.parametrize("cls", [Above, Below, Plain])
def test_resume_is_bitwise_where_the_order_is_drawn_as_the_loader_is_made(monkeypatch, tmp_path, cls, source):
    monkeypatch.setattr(Shuffles, "source", source)
    whole = run(tmp_path / "a", cls)
    for step in (3, 6, 9):
        again = run(tmp_path / f"b{step}", cls, str(tmp_path / "a" / f"checkpoint-{step}"))
        state, expected = again.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected), step
        assert again.made == whole.made == 1


def test_side_effects_of_a_loader_happen_once_on_every_way_to_resume(tmp_path):
    run(tmp_path, Above)
    shutil.rmtree(tmp_path / "checkpoint-12")
    assert run(tmp_path, Above, resume=True).made == 1
    assert run(tmp_path, Above, str(tmp_path / "checkpoint-6"), auto_find_batch_size=True).made == 1
    trainer = run(tmp_path, Above)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.made == 2
