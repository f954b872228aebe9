"""Optimizers that cannot follow a change of form: refused before anything changes, for reasons that are seen here."""

import pickle

import grokadamw
import lomo_optim
import pytest
import tiny
import torch
import transformers as T
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_drt import DRTConfig, DRTTrainer, DynamicRank

GROK = r"the optimizer grokadamw\.GrokAdamW cannot follow a change of form: its moments stand in its parameter group"
PICKED = {"optim_target_modules": ["mlp"], "optim_args": "rank=4"}


def plain(folder, optim, **changes):
    arguments = T.TrainingArguments(
        output_dir=str(folder), optim=optim, max_steps=6, save_strategy="steps", save_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True, per_device_train_batch_size=4, learning_rate=1e-2, **changes,
    )  # fmt: skip
    return T.Trainer(tiny.llama(), arguments, train_dataset=tiny.dataset())


def test_one_that_is_passed_is_refused_as_the_trainer_is_made(tmp_path):
    model = tiny.llama()
    given = {"train_dataset": tiny.dataset()}
    optimizer = grokadamw.GrokAdamW(model.parameters())
    with pytest.raises(ValueError, match=GROK + r".* The nearest that can is optim='adamw_torch'\."):
        DRTTrainer(model, tiny.arguments(tmp_path), optimizers=(optimizer, None), **given)
    for kind, name in ((grokadamw.GrokAdamW, r"grokadamw\.GrokAdamW"), (lomo_optim.AdaLomo, r"lomo_optim\.AdaLomo")):
        with pytest.raises(ValueError, match=f"the optimizer {name} cannot follow"):
            DRTTrainer(model, tiny.arguments(tmp_path), optimizer_cls_and_kwargs=(kind, {}), **given)


class Own(DRTTrainer):
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters())
        return super().create_optimizer(model)


def test_what_optim_says_is_not_looked_at_where_the_optimizer_is_made_otherwise(tmp_path):
    run = tiny.trainer(tmp_path, cls=Own, optim="grokadamw", max_steps=4, drt_schedule="factored:4@0 dense@2")
    run.train()
    assert run.state.global_step == 4


@pytest.mark.parametrize("make", [grokadamw.GrokAdamW, lambda weights: LayerWiseDummyOptimizer()])
def test_a_loop_refuses_it_before_anything_changes(make):
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="factored:4@0 dense@3"), 6)
    modules = dict(drt.model.named_modules())
    optimizer = make(drt.model.parameters())
    for attempt in (drt.install, lambda o: drt.apply(0, o), lambda o: drt.begin_step(0, o)):
        with pytest.raises(
            ValueError, match=r"the optimizer [\w.]+ cannot follow a change of form: (its mom|each wei)"
        ):
            attempt(optimizer)
        assert dict(drt.model.named_modules()) == modules


# ---- the reasons


def test_grokadamw_alone_does_not_come_back_from_a_checkpoint(tmp_path):
    straight = plain(tmp_path, "grokadamw")
    straight.train()
    resumed = plain(tmp_path, "grokadamw")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not torch.equal(straight.model.lm_head.weight, resumed.model.lm_head.weight)
    weight = resumed.model.lm_head.weight
    counts = {id(p): state["step"] for group in resumed.optimizer.param_groups for p, state in group["state"].items()}
    assert counts[id(weight)] == 3  # of six


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw"])
def test_checkpoints_of_projections_cannot_be_resumed_even_alone(tmp_path, optim):
    plain(tmp_path, optim, **PICKED).train()
    with pytest.raises(pickle.UnpicklingError, match=r"GLOBAL (galore|apollo)_torch"):
        plain(tmp_path, optim, **PICKED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_layer_by_layer_a_weight_that_takes_anothers_place_is_never_trained(tmp_path):
    class Replaces(T.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
                self.value = model.lm_head.weight.detach().clone()

    run, replaces = plain(tmp_path, "galore_adamw_layerwise", **PICKED), Replaces()
    run.add_callback(replaces)
    run.train()
    assert torch.equal(run.model.lm_head.weight, replaces.value)
    assert [p.shape for group in run.optimizer.param_groups for p in group["params"]] == [(1, 1)]
