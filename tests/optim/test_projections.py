"""GaLore and APOLLO: they follow changes of form, and are refused where their checkpoints could not be resumed."""

import pytest
import tiny
import torch
import transformers as T
from apollo_torch import APOLLOAdamW
from galore_torch import GaLoreAdamW
from transformers.trainer_utils import HPSearchBackend, SaveStrategy

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DynamicRank
from hf_drt.forms import trainable_weights
from hf_drt.optim import OPTIMIZERS, rule_of

OPTIONS = {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
APOLLO = OPTIONS | {"proj": "random", "scale_type": "channel"}
PICKED = {"optim_target_modules": ["mlp"], "optim_args": "rank=4,update_proj_gap=3", "max_steps": 9}
NAMES = ["galore_adamw", "galore_adafactor", "apollo_adamw"]
UNSAVED = (
    r"{} cannot be resumed: a checkpoint \({}\) would hold a projector for each weight, a Python object that "
    r"torch\.load\(weights_only=True\) does not read\. Set save_strategy=no or save_only_model=True\. The nearest that "
    r"can is optim='adamw_torch'\."
)


def picked(model):
    return {name for name, _ in model.named_parameters() if ".mlp." in name}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("plan", ["factored:6@0 dense@3 adapter:6@6", "dense@0 factored:6@3 dense@6"])
def test_weights_of_picked_layers_are_projected_in_every_form(tmp_path, name, plan):
    run = tiny.trainer(tmp_path, optim=name, drt_schedule=plan, drt_export="native", **PICKED)
    run.train()
    names = {id(p): name for name, p in run.model.named_parameters()}
    group = next(g for g in run.optimizer.param_groups if "rank" in g)
    trained = {n for n in picked(run.model) if run.model.get_parameter(n).requires_grad}
    assert {names[id(p)] for p in group["params"]} == trained
    for weight in group["params"]:
        state = run.optimizer.state[weight]
        assert (state["step"], state["projector"].rank) == (3, 4)
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize(("kind", "options"), [(GaLoreAdamW, OPTIONS), (APOLLOAdamW, APOLLO)])
def test_new_weights_train_bitwise_as_under_a_new_optimizer(kind, options):
    torch.manual_seed(0)
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored:6@5", include=["mlp"]), 10)
    drt.apply(0)
    mine = picked(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in mine]},
        {"params": [p for n, p in model.named_parameters() if n in mine], **options},
    ]
    optimizer = kind(groups, lr=1e-2)
    for k in range(10):
        drt.begin_step(k, optimizer)
        if k == 5:
            new = [p for name in drt.targets for p in trainable_weights(model.get_submodule(name))]
            copies = [torch.nn.Parameter(p.detach().clone()) for p in new]
            alone = kind([{"params": copies, **options}], lr=1e-2)
            for weight, other in zip(new, copies, strict=True):
                assert optimizer.state[weight].keys() == alone.state[other].keys()
                alone.state[other].update(optimizer.state[weight])
        torch.manual_seed(k)
        model(**tiny.batch()).loss.backward()
        if k >= 5:
            for weight, other in zip(new, copies, strict=True):
                other.grad = weight.grad.clone()
            alone.step()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(weight, other) for weight, other in zip(new, copies, strict=True))


def test_apollo_gives_new_weights_the_seeds_of_its_constructor():
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored:6@5"), 10)
    drt.apply(0)
    optimizer = APOLLOAdamW([{"params": list(model.parameters()), **APOLLO}])
    drt.apply(5, optimizer)
    fresh = APOLLOAdamW([{"params": list(model.parameters()), **APOLLO}])
    for name in drt.targets:
        for weight in trainable_weights(model.get_submodule(name)):
            assert optimizer.state[weight] == fresh.state[weight]


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
@pytest.mark.parametrize(
    ("saving", "called"),
    [
        ({"save_strategy": "steps"}, "save_strategy=steps"),
        ({"drt_save_at_switch": True}, "drt_save_at_switch"),
    ],
)
def test_they_are_refused_where_checkpoints_will_be_saved(tmp_path, name, saving, called):
    with pytest.raises(ValueError, match=UNSAVED.format(f"optim='{name}'", called)):
        tiny.trainer(tmp_path, optim=name, **PICKED, **saving)


@pytest.mark.parametrize("late", [{"optim": "apollo_adamw"}, {"optim": "galore_adamw"}])
def test_an_optimizer_that_is_set_later_is_looked_at_as_training_begins(tmp_path, late):
    run = tiny.trainer(tmp_path, save_strategy="steps", **PICKED)
    modules = dict(run.model.named_modules())
    for name, value in late.items():
        setattr(run.args, name, value)
    with pytest.raises(ValueError, match=UNSAVED.format(f"optim='{late['optim']}'", "save_strategy=steps")):
        run.train()
    assert dict(run.model.named_modules()) == modules


def test_saving_that_is_turned_on_later_is_looked_at_as_training_begins(tmp_path):
    run = tiny.trainer(tmp_path, optim="apollo_adamw", **PICKED)
    run.args.save_strategy = SaveStrategy.STEPS
    modules = dict(run.model.named_modules())
    with pytest.raises(ValueError, match=UNSAVED.format("optim='apollo_adamw'", "save_strategy=steps")):
        run.train()
    assert dict(run.model.named_modules()) == modules


def test_a_search_over_optimizers_is_refused_at_the_one_that_cannot(tmp_path):
    arguments = tiny.arguments(tmp_path, drt_schedule="factored:4@0", drt_export="native", max_steps=1)
    run = DRTTrainer(args=arguments, train_dataset=tiny.dataset(), model_init=lambda: tiny.llama())
    run.hp_search_backend, run.hp_space = HPSearchBackend.WANDB, None
    run._hp_search_setup({"optim": "sgd"})
    run.train()
    assert run.state.global_step == 1
    run._hp_search_setup({"optim": "grokadamw"})
    with pytest.raises(ValueError, match="optim='grokadamw' cannot follow a change of form"):
        run.train()
    run._hp_search_setup({"optim": "lomo", "drt_rewarmup_steps": 2, "drt_schedule": "factored:4@0 dense@50%"})
    with pytest.raises(ValueError, match=r"rewarmup_steps=2: this acts around optimizer\.step\(\), but optim='lomo'"):
        run.train()


def test_those_that_cannot_be_saved_are_not_among_the_nearest():
    class AdamW(torch.optim.SGD):
        def step(self, closure):
            return super().step(closure)

    AdamW.__module__ = "galore_torch.other"
    with pytest.raises(ValueError, match=r"is nearest by name") as caught:
        rule_of(AdamW([torch.nn.Parameter(torch.zeros(2, 2))]))
    assert "GaLore" not in str(caught.value)
    count = sum(not (rule.refused or rule.unsaved) for rule in OPTIMIZERS.values())
    assert f"Of the {count} that can, " in str(caught.value)


def test_checkpoints_of_the_model_alone_are_allowed(tmp_path):
    run = tiny.trainer(
        tmp_path, optim="galore_adamw", **PICKED, save_strategy="steps", save_steps=4, save_only_model=True
    )
    run.train()
    assert not list(tmp_path.glob("*/optimizer.pt"))


def test_one_that_is_passed_is_refused_by_its_class(tmp_path):
    model = tiny.llama()
    message = UNSAVED.format(r"the optimizer galore_torch\.GaLoreAdamW", "save_strategy=steps")
    arguments = tiny.arguments(tmp_path, save_strategy="steps")
    optimizer = GaLoreAdamW(model.parameters())
    with pytest.raises(ValueError, match=message):
        DRTTrainer(model, arguments, train_dataset=tiny.dataset(), optimizers=(optimizer, None))


def test_the_callback_refuses_it_before_it_changes_the_model(tmp_path):
    model = tiny.llama()
    arguments = T.TrainingArguments(output_dir=str(tmp_path), report_to=[], optim="galore_adamw", **PICKED)
    plain = T.Trainer(
        model, arguments, train_dataset=tiny.dataset(),
        callbacks=[DRTCallback(DRTConfig(schedule="dense@0 factored:6@5"))],
    )  # fmt: skip
    modules = dict(model.named_modules())
    message = UNSAVED.format(r"the optimizer galore_torch\.GaLoreAdamW", "save_strategy=steps")
    with pytest.raises(ValueError, match=message):
        plain.train()
    assert dict(model.named_modules()) == modules
