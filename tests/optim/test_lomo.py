"""LOMO updates weights within the backward pass: it follows changes of form, and rules around a step are refused."""

import pytest
import tiny
import torch
import transformers as T
from lomo_optim import Lomo

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DynamicRank

PLAN = "factored:4@0 dense@3 adapter:4@6"
RULES = (
    {"rewarmup_steps": 2}, {"factored_lr_scale": 2.0}, {"adapter_lr_scale": 2.0}, {"frobenius_decay": True},
    {"matrix_optimizer": "muon"},
)  # fmt: skip
REFUSED = (
    r"{}=\S+: this acts around optimizer\.step\(\), but {} cannot be reached there: it updates the weights within the "
    r"backward pass\. Leave the setting out, or take the nearest that can, optim='sgd'\."
)
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: next(iter(rule)))


def trainer(folder, optim, **changes):
    settings = {
        "optim": optim, "max_steps": 9, "drt_schedule": PLAN, "drt_export": "native", "max_grad_norm": 0,
        "gradient_accumulation_steps": 1, "learning_rate": 0.1,
    }  # fmt: skip
    return tiny.trainer(folder, **settings | changes)


def test_it_makes_the_updates_of_sgd_through_three_forms(tmp_path, caplog):
    runs = {}
    for optim in ("lomo", "sgd"):
        runs[optim] = trainer(tmp_path / optim, optim)
        runs[optim].train()
    weights = runs["sgd"].model.state_dict()
    switches = [row["drt_phase"] for row in runs["lomo"].state.log_history if "drt_switch_seconds" in row]
    assert switches == [0, 1, 2]
    assert [n for n, p in runs["lomo"].model.state_dict().items() if not torch.equal(p, weights[n])] == []
    assert "behaviour of its own" not in caplog.text  # its hooks are set anew on new weights


def passed(folder, given, optim):
    model = tiny.llama(attention_dropout=0.1)
    settings = {"max_steps": 9, "drt_schedule": PLAN, "drt_export": "native", "max_grad_norm": 0, "optim": optim}
    arguments = tiny.arguments(folder, **settings, gradient_accumulation_steps=1, learning_rate=0.1)
    if given == "class":
        how = {"optimizer_cls_and_kwargs": (Lomo, {"model": model, "lr": 0.1})}
    else:
        how = {"optimizers": (Lomo(model, lr=0.1), None)}
    return DRTTrainer(model, arguments, train_dataset=tiny.dataset(), **how)


def test_a_class_that_is_made_over_a_model_trains_as_under_its_name(tmp_path):
    run = passed(tmp_path / "a", "class", "lomo")
    run.train()
    other = trainer(tmp_path / "b", "lomo")
    other.train()
    weights = other.model.state_dict()
    assert [n for n, p in run.model.state_dict().items() if not torch.equal(p, weights[n])] == []


@pytest.mark.parametrize("given", ["class", "optimizer"])
def test_one_whose_backward_pass_the_trainer_would_not_run_is_refused(tmp_path, given):
    message = (
        r"the optimizer lomo_optim\.Lomo updates the weights within the backward pass, for which the Trainer looks at "
        r"optim alone: with optim='adamw_torch' it would leave weights out, and ignore the learning rate's schedule\. "
        r"Set optim='lomo' too\."
    )
    with pytest.raises(ValueError, match=message):
        passed(tmp_path, given, "adamw_torch")


def test_without_the_name_a_plain_trainer_leaves_weights_out_and_ignores_the_schedule(tmp_path):
    """The scheduled rate of the first update is 0."""
    model = tiny.llama()
    settings = {"max_steps": 1, "warmup_steps": 1, "save_strategy": "no", "max_grad_norm": 0, "use_cpu": True}
    arguments = T.TrainingArguments(str(tmp_path), report_to=[], **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    how = {"optimizer_cls_and_kwargs": (Lomo, {"model": model, "lr": 0.1})}
    T.Trainer(model, arguments, train_dataset=tiny.dataset(), **how).train()
    moved = {name: (p - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert [name for name, size in moved.items() if size == 0] == ["model.embed_tokens.weight"]


def test_layers_with_its_hooks_can_be_selected_and_others_are_told_of():
    model = tiny.llama()
    Lomo(model)
    assert len(DynamicRank(model, DRTConfig(schedule=PLAN), 8).targets) == 14
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda gradient: gradient)
    assert len(DynamicRank(model, DRTConfig(schedule=PLAN), 8).targets) == 13


def test_one_trainer_can_train_twice(tmp_path):
    run = trainer(tmp_path, "lomo", drt_export="dense")
    run.train()
    once = [p.detach().clone() for p in run.model.parameters()]
    run.train()
    assert not any(torch.equal(p, value) for p, value in zip(run.model.parameters(), once, strict=True))


def test_every_weight_of_every_phase_is_updated_as_its_gradient_is_there(tmp_path):
    """So that no more gradients are held at a time than those between two hooks."""

    class Held(T.TrainerCallback):
        most = 0

        def on_step_begin(self, args, state, control, model, **kwargs):
            Held.phase = [p for p in model.parameters() if p.requires_grad]
            for p in Held.phase:
                p.register_hook(self.count)

        def count(self, gradient):
            Held.most = max(Held.most, sum(p.grad is not None for p in Held.phase))

    run = trainer(tmp_path, "lomo", max_steps=8)
    run.add_callback(Held())
    run.train()
    assert Held.most <= 2
    assert len(Held.phase) > 20


@rules
def test_a_trainer_refuses_rules_around_a_step_when_it_is_made(tmp_path, rule):
    with pytest.raises(ValueError, match=REFUSED.format(next(iter(rule)), "optim='lomo'")):
        trainer(tmp_path, "lomo", **{f"drt_{key}": value for key, value in rule.items()})


@rules
def test_a_loop_refuses_them_before_anything_changes(rule):
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule=PLAN, **rule), 8)
    modules = dict(drt.model.named_modules())
    for attempt in (drt.install, lambda o: drt.apply(0, o), lambda o: drt.begin_step(0, o)):
        with pytest.raises(ValueError, match=REFUSED.format(next(iter(rule)), "Lomo")):
            attempt(Lomo(drt.model))
        assert dict(drt.model.named_modules()) == modules


def test_the_callback_refuses_the_re_warm_up(tmp_path):
    model = tiny.llama()
    arguments = T.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], save_strategy="no", optim="lomo"
    )
    config = DRTConfig(schedule=PLAN, rewarmup_steps=2)
    plain = T.Trainer(model, arguments, train_dataset=tiny.dataset(), callbacks=[DRTCallback(config)])
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=REFUSED.format("rewarmup_steps", "Lomo")):
        plain.train()
    assert dict(model.named_modules()) == modules
