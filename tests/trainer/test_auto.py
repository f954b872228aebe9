"""The preset ``auto`` in a Trainer: low rank throughout under the matrix optimizer that it brings, adapters for a
pretrained model; what a user sets goes before, and where the matrix optimizer cannot work the preset is named."""

import json
import re

import pytest
import tiny
import torch
import transformers as T
from equal_runs import assert_equal_runs
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import HfArgumentParser

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DRTTrainingArguments, DynamicRank
from hf_drt.checkpoint import STATE_NAME, CheckpointError
from hf_drt.export import RunSummary
from hf_drt.forms import Adapter, Factored, form_of, layer_of
from hf_drt.optim import refuse_sharded
from hf_drt.optim.matrices import MATRIX, MOMENTUM
from hf_drt.trainer.summary import run_summary

STEPS = 8
AUTO = {"drt_schedule": "auto", "drt_rank_multiple": 1, "max_steps": STEPS, "weight_decay": 0.1}
BY_HAND = {"drt_schedule": "factored:budget@0", "drt_matrix_optimizer": "muon", "drt_dense_query_key": False}
WAY_OUT = (
    r".* The preset auto brings matrix_optimizer=muon: to do without, set matrix_optimizer='none' \(factors under the "
    r"run's own optimizer\), or schedule='auto_late'\."
)


def run(folder, model=None, resume=None, **changes) -> DRTTrainer:
    trainer = tiny.trainer(folder, model, **AUTO | changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def forms(trainer) -> set[type]:
    return {type(form_of(layer_of(trainer.model, name))) for name in trainer.drt.targets}


# ---- what it is


def test_a_run_equals_the_same_written_out_by_hand(tmp_path):
    auto = run(tmp_path / "a", drt_export="native")
    hand = run(tmp_path / "b", drt_export="native", drt_budget=auto.drt.resolved.budget, **BY_HAND)
    assert [phase.kind for phase in auto.drt.plan.phases] == ["factored"]
    assert forms(auto) == {Factored}
    assert len([s for s in auto.optimizer.state.values() if MOMENTUM in s]) == 28
    assert {key for s in auto.optimizer.state.values() for key in s} > {"exp_avg", MOMENTUM}  # the others' own
    assert_equal_runs(auto, hand)
    assert auto.drt.config == hand.drt.config.__class__(**vars_of(hand) | {"schedule": "auto", "budget": None})
    rows = [[row for row in t.state.log_history if "loss" in row or "drt_phase" in row] for t in (auto, hand)]
    keys = ("loss", "grad_norm", "drt_rank_min", "drt_rank_max", "drt_plan_flops")
    assert [{k: row.get(k) for k in keys} for row in rows[0]] == [{k: row.get(k) for k in keys} for row in rows[1]]


def vars_of(trainer) -> dict:
    config = trainer.drt.config
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_its_rate_and_momentum_are_settings_of_the_user(tmp_path):
    trainer = run(tmp_path, drt_matrix_lr=0.01, drt_matrix_momentum=0.5)
    groups = [group for group in trainer.optimizer.param_groups if MATRIX in group]
    assert {group["initial_lr"] for group in groups} == {0.01}
    assert {group[MATRIX] for group in groups} == {0.5}


def test_with_none_the_factors_are_the_run_s_own(tmp_path):
    auto = run(tmp_path / "a", drt_matrix_optimizer="none", drt_export="native")
    hand = BY_HAND | {"drt_matrix_optimizer": None, "drt_budget": auto.drt.resolved.budget}
    assert_equal_runs(auto, run(tmp_path / "b", drt_export="native", **hand))
    assert not any(MATRIX in group for group in auto.optimizer.param_groups)
    assert [phase.kind for phase in auto.drt.plan.phases] == ["factored"]


def test_what_else_the_user_sets_goes_before(tmp_path):
    trainer = run(tmp_path, drt_dense_query_key=True, drt_budget=0.5)
    kept = {name.rpartition(".")[2] for name, form in trainer.drt.forms(0).items() if not hasattr(form, "rank")}
    assert kept == {"q_proj", "k_proj"}
    assert trainer.drt.resolved.budget == 0.5


@pytest.mark.parametrize("marked", [True, False], ids=["from_pretrained", "start"])
def test_a_pretrained_model_trains_as_by_auto_late(tmp_path, marked):
    tiny.llama().save_pretrained(tmp_path / "model")
    runs = []
    for schedule in ("auto", "auto_late"):
        model = T.LlamaForCausalLM.from_pretrained(tmp_path / "model") if marked else tiny.llama()
        start = {} if marked else {"drt_start": "pretrained"}
        runs.append(run(tmp_path / schedule, model, drt_schedule=schedule, max_steps=20, **start))
    assert [phase.kind for phase in runs[0].drt.plan.phases] == ["adapter", "dense"]
    assert {type(form) for form in runs[0].drt.forms(0).values()} == {Adapter}
    assert runs[0].drt.config.matrix_optimizer == "none"
    assert runs[0].drt.resolved.budget == 0.9
    assert_equal_runs(*runs)


def test_model_init_decides_with_each_model(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    models = [tiny.llama(), tiny.llama(), T.LlamaForCausalLM.from_pretrained(tmp_path / "model")]
    args = tiny.arguments(tmp_path, **AUTO | {"max_steps": 20})
    trainer = DRTTrainer(args=args, model_init=lambda: models.pop(0), train_dataset=tiny.dataset())
    trainer.train()
    assert trainer.drt.config.matrix_optimizer == "muon"
    trainer.train()
    assert trainer.drt.config.matrix_optimizer == "none"
    assert trainer.drt.plan.phases[0].kind == "adapter"
    assert not any(MATRIX in group for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize(("words", "optimizer"), [([], "muon"), (["none"], "none"), (["muon"], "muon")])
def test_on_a_command_line(tmp_path, words, optimizer):
    line = ["--output_dir", str(tmp_path), "--drt_schedule", "auto", "--max_steps", "2", "--report_to", "none"]
    line += ["--drt_matrix_optimizer", *words] if words else []
    (args,) = HfArgumentParser(DRTTrainingArguments).parse_args_into_dataclasses(line)
    trainer = DRTTrainer(tiny.llama(), args, train_dataset=tiny.dataset())
    trainer.train()
    assert trainer.drt.config.matrix_optimizer == optimizer


def test_training_dense_again_after_it_is_a_plain_model(tmp_path):
    trainer = run(tmp_path)
    trainer.save_model()
    model = T.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(model, tiny.batch()), tiny.logits(trainer.model, tiny.batch()))


def test_a_native_export_goes_on_in_factors(tmp_path):
    trainer = run(tmp_path / "a", drt_export="native")
    trainer.save_model()
    model = T.LlamaForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(tiny.logits(model, tiny.batch()), tiny.logits(trainer.model, tiny.batch()))


def test_a_card_says_what_the_preset_has_brought(tmp_path):
    summary: RunSummary = run_summary(run(tmp_path).drt, [], "dense", "me/model")
    assert summary.schedule == "auto"
    assert summary.settings == {"rank_multiple": 1, "dense_query_key": False, "matrix_optimizer": "muon"}


# ---- checkpoints


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without interruption, with a checkpoint after every second step."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, run(folder, drt_export="native", save_strategy="steps", save_steps=2)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_is_resumed_bitwise(straight, tmp_path, step):
    folder, expected = straight
    resumed = run(tmp_path, drt_export="native", resume=str(folder / f"checkpoint-{step}"))
    assert_equal_runs(resumed, expected)
    assert resumed.drt.config.matrix_optimizer == "muon"


def test_a_trainer_that_has_trained_resumes_bitwise(straight, tmp_path):
    folder, expected = straight
    trainer = run(tmp_path, drt_export="native")
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_equal_runs(trainer, expected)


def test_its_checkpoint_goes_on_as_written_out_by_hand(straight, tmp_path):
    folder, expected = straight
    hand = BY_HAND | {"drt_budget": expected.drt.resolved.budget}
    assert_equal_runs(run(tmp_path, drt_export="native", resume=str(folder / "checkpoint-4"), **hand), expected)


def test_its_checkpoint_does_not_go_on_under_another_optimizer(straight, tmp_path):
    checkpoint = str(straight[0] / "checkpoint-4")
    with pytest.raises(
        CheckpointError, match=r"matrix_optimizer is 'none' here, and 'muon' in the state\. Resume with"
    ):
        run(tmp_path, drt_export="native", drt_matrix_optimizer="none", resume=checkpoint)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("step", [2, 14], ids=["factored", "dense"])
@pytest.mark.parametrize("own", [{}, {"drt_matrix_optimizer": "none"}, {"drt_dense_query_key": True}], ids=str)
def test_a_checkpoint_of_what_auto_was_is_not_resumed_as_another_method(tmp_path, step, own):
    """The state of a run by what ``auto`` meant before: without a matrix optimizer, and with a dense phase to come."""
    settings = {"max_steps": 16, "drt_budget": 0.7, "drt_rank_multiple": 4}
    late = run(tmp_path / "a", drt_schedule="auto_late", save_strategy="steps", save_steps=2, **settings)
    checkpoint = tmp_path / "a" / f"checkpoint-{step}"
    state = json.loads((checkpoint / STATE_NAME).read_text())
    assert "matrix_optimizer" not in state["settings"]
    message = (
        r"is of the plan 'factored:\S+ dense@\d+', whose forms are those of the preset auto_late, not of auto\. If "
        r"an earlier version wrote it by the name of auto, resume with schedule='auto_late'; if not, with schedule='fac"
    )
    model = tiny.llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "b", model, resume=str(checkpoint), **settings, **own)
    assert before.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.llama(), DRTConfig(schedule="auto", budget=0.7), max_steps=16).load_state_dict(state)
    assert_equal_runs(run(tmp_path / "c", resume=str(checkpoint), drt_schedule="auto_late", **settings), late)


def test_a_checkpoint_of_another_plan_is_not_laid_to_an_earlier_version(straight, tmp_path):
    with pytest.raises(CheckpointError, match=r"the plan has changed: the state is of 'factored:\S+' over 8 update"):
        run(tmp_path, resume=str(straight[0] / "checkpoint-4"), max_steps=9)
    with pytest.raises(CheckpointError, match=r"the plan has changed"):
        run(tmp_path, resume=str(straight[0] / "checkpoint-4"), drt_schedule="auto_late", drt_budget=0.9)


def test_a_pretrained_model_s_checkpoint_goes_on_under_auto(tmp_path):
    settings = {"drt_start": "pretrained", "max_steps": 20}
    late = run(tmp_path / "a", drt_schedule="auto_late", save_strategy="steps", save_steps=10, **settings)
    assert_equal_runs(run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-10"), **settings), late)


# ---- where the matrix optimizer cannot work


def optimizer_of(model, cls=torch.optim.AdamW):
    return cls([p for p in model.parameters() if p.requires_grad], lr=1e-3)


class Greedy(torch.optim.SGD):
    """Takes every parameter to have a gradient."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "schedule_free_adamw"}, r"matrix_optimizer=muon: .* averages the weights within its own step"),
        ({"optim": "lomo", "max_grad_norm": 0}, r"matrix_optimizer=muon: this acts around optimizer\.step\(\)"),
        (
            {"optim": "galore_adamw", "optim_target_modules": ["mlp"]},
            r"matrix_optimizer=muon and .*galore_adamw.* are for the same weights",
        ),
        (
            {"optim": "apollo_adamw", "optim_target_modules": ["mlp"]},
            r"matrix_optimizer=muon and .*apollo_adamw.* are for the same weights",
        ),
        ({"drt_frobenius_decay": True}, r"frobenius_decay is True, .* decays the product anyway"),
        ({"drt_left_lr_scale": 2.0}, r"left_lr_scale is 2\.0, .* moves both factors by one rate"),
    ],
    ids=str,
)
def test_a_trainer_names_the_preset(tmp_path, changes, message):
    settings = AUTO | changes
    with pytest.raises(ValueError, match=message + WAY_OUT):
        tiny.trainer(tmp_path, **settings)
    for other in ({"drt_matrix_optimizer": "none"}, {"drt_schedule": "auto_late"}):
        run(tmp_path, **settings | other)


def test_a_scheduler_that_was_passed_has_counted_the_groups(tmp_path):
    for own in ({}, {"drt_matrix_optimizer": "none"}):
        model = tiny.llama()
        optimizer = optimizer_of(model)
        passed = {"optimizers": (optimizer, LambdaLR(optimizer, lambda step: 1.0)), "train_dataset": tiny.dataset()}
        if own:
            DRTTrainer(model, tiny.arguments(tmp_path, **AUTO, **own), **passed).train()
        else:
            with pytest.raises(ValueError, match=r"matrix_optimizer=muon: this adds parameter groups, but" + WAY_OUT):
                DRTTrainer(model, tiny.arguments(tmp_path, **AUTO), **passed)


def test_kernels_of_more_tensors_than_two(tmp_path):
    settings = AUTO | {"drt_decomposition": "tucker"}
    trainer = tiny.trainer(tmp_path, tiny.resnet(), "resnet", **settings)
    with pytest.raises(ValueError, match=r"matrix_optimizer is of a product U V, and decomposition='tucker'" + WAY_OUT):
        trainer.train()
    tiny.trainer(tmp_path, tiny.resnet(), "resnet", **settings, drt_matrix_optimizer="none").train()


def test_fsdp():
    with pytest.raises(ValueError, match=r"matrix_optimizer=muon needs whole matrices, and FSDP shards them" + WAY_OUT):
        refuse_sharded(DRTConfig(schedule="auto").settled("factored"))
    refuse_sharded(DRTConfig(schedule="auto").settled("adapter"))


def test_a_callback_in_a_plain_trainer(tmp_path):
    args = T.TrainingArguments(output_dir=str(tmp_path), max_steps=4, report_to=[], use_cpu=True)

    def plain(model=None, **settings):
        callback = DRTCallback(DRTConfig(schedule="auto", rank_multiple=1, **settings))
        return T.Trainer(model or tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback])

    with pytest.raises(ValueError, match=r"matrix_optimizer=muon: this needs parameter groups .* Use DRTT" + WAY_OUT):
        plain()
    plain(matrix_optimizer="none").train()
    plain(start="pretrained").train()  # adapters, and no matrix optimizer


def begun(**settings) -> tuple[T.LlamaForCausalLM, DynamicRank]:
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="auto", **settings), max_steps=STEPS)
    drt.apply(0)
    return model, drt


def backward(model) -> None:
    model(**tiny.batch()).loss.backward()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Greedy, r"matrix_optimizer=muon takes the gradients of its weights aside .* raised TypeError"),
        ("schedulefree.AdamWScheduleFree", r"matrix_optimizer=muon: AdamWScheduleFree averages the weights"),
        ("lomo", r"matrix_optimizer=muon: this acts around optimizer\.step\(\), but Lomo cannot be reached there"),
    ],
    ids=["bare", "averages", "without a step"],
)
def test_a_loop_names_the_preset(cls, message):
    model, drt = begun()
    if cls == "schedulefree.AdamWScheduleFree":
        optimizer = pytest.importorskip("schedulefree").AdamWScheduleFree(model.parameters(), lr=1e-3)
    elif cls == "lomo":
        optimizer = pytest.importorskip("lomo_optim").Lomo(model, lr=1e-3)
    else:
        optimizer = optimizer_of(model, cls)
    for attempt in (drt.install, lambda optimizer: drt.begin_step(0, optimizer)):
        with pytest.raises(ValueError, match=message + WAY_OUT):
            attempt(optimizer)


def test_a_loop_that_passes_no_optimizer():
    _, drt = begun()
    with pytest.raises(ValueError, match=r"got no optimizer, so that matrix_optimizer=muon would have no" + WAY_OUT):
        drt.begin_step(0)
    begun(matrix_optimizer="none")[1].begin_step(0)


def test_a_loop_whose_scheduler_was_made_before():
    model, drt = begun()
    optimizer = optimizer_of(model)
    LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"matrix_optimizer=muon: this adds parameter groups, but a learn" + WAY_OUT):
        drt.begin_step(0, optimizer)


@pytest.mark.parametrize(("own", "tail"), [({}, WAY_OUT), ({"matrix_optimizer": "muon"}, r"(?!.*The preset)")])
def test_a_step_with_a_closure_and_one_rate_for_all(own, tail):
    model, drt = begun(**own)
    optimizer = optimizer_of(model)
    drt.begin_step(0, optimizer)
    backward(model)
    with pytest.raises(ValueError, match=r"step\(closure\) computes them in it\. Call the closure first" + tail):
        optimizer.step(lambda: None)
    OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS)
    with pytest.raises(ValueError, match=r"matrix_lr=0\.04 has no effect: all parameter groups have" + tail):
        optimizer.step()


def test_an_own_rate(tmp_path):
    model = tiny.llama()
    optimizer = T.Adafactor(model.parameters(), scale_parameter=False, relative_step=True, warmup_init=False, lr=None)
    args = tiny.arguments(tmp_path, **AUTO)
    with pytest.raises(ValueError, match=r"matrix_optimizer=muon: this needs the learning rate of the opt" + WAY_OUT):
        DRTTrainer(model, args, train_dataset=tiny.dataset(), optimizers=(optimizer, None))


def test_the_way_out_is_said_where_the_preset_brings_it_alone(tmp_path):
    with pytest.raises(ValueError, match=r"averages the weights within its own step") as refused:
        tiny.trainer(tmp_path, **AUTO, optim="schedule_free_adamw", drt_matrix_optimizer="muon")
    assert not re.search("The preset", str(refused.value))
