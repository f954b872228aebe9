"""The methods of transformers.Trainer that hf_drt overrides or calls are where it expects them."""

import inspect

import pytest
import tiny
from transformers import Seq2SeqTrainer, Trainer, modeling_layers

from hf_drt import DRTTrainerMixin
from hf_drt.activations.blocks import FLAG, FUNCTION
from hf_drt.trainer import probe, rates
from hf_drt.trainer.averaging import AveragingMixin
from hf_drt.trainer.mixin import SEAMS
from hf_drt.trainer.publishing import PublishingMixin

CLASSES = (DRTTrainerMixin, AveragingMixin, PublishingMixin)


def parameters(method) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]


@pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer])
@pytest.mark.parametrize(("name", "expected"), SEAMS.items(), ids=SEAMS.keys())
def test_the_trainer_has_the_method_with_these_parameters(base, name, expected):
    moved = f"transformers has moved Trainer.{name}; hf_drt/trainer/mixin.py overrides it"
    assert callable(getattr(base, name, None)), moved
    found = parameters(getattr(base, name))
    assert found == expected, f"{moved}: its parameters were {expected} and are {found}"


def test_every_method_that_the_mixin_overrides_is_listed():
    own = {name: value for cls in CLASSES for name, value in vars(cls).items()}
    overridden = {name for name, value in own.items() if callable(value) and hasattr(Trainer, name)}
    assert overridden - {"__init__"} <= set(SEAMS)


def test_every_seam_is_overridden_or_called():
    source = "".join(map(inspect.getsource, (*CLASSES, probe, rates)))
    assert [name for name in SEAMS if f"def {name}(" not in source and f".{name}(" not in source] == []


@pytest.mark.parametrize("name", [name for name in SEAMS if any(name in vars(cls) for cls in CLASSES)])
def test_an_override_takes_what_the_trainer_passes(name):
    override = inspect.signature(getattr(DRTTrainerMixin, name))
    original = inspect.signature(getattr(Trainer, name)).parameters
    override.bind(*original)  # by position
    if any(p.kind is p.VAR_POSITIONAL for p in override.parameters.values()):
        return
    assert parameters(getattr(DRTTrainerMixin, name)) == parameters(getattr(Trainer, name))


def test_the_trainer_makes_its_loader_and_then_its_optimizer():
    # Structure and weights are restored between the two: the plan is known, and the optimizer finds their parameters.
    train = inspect.getsource(Trainer.train)
    assert "self._load_from_checkpoint(resume_from_checkpoint)" in train
    assert train.index("self._load_from_checkpoint(") < train.index("return inner_training_loop(")
    loop = inspect.getsource(Trainer._inner_training_loop)
    assert loop.index("self.get_train_dataloader()") < loop.index("self._prepare_for_training(")
    assert loop.index("self._init_training_state(") < loop.index("self._prepare_for_training(")
    prepare = inspect.getsource(Trainer._prepare_for_training)
    assert prepare.index("self.create_optimizer()") < prepare.index("self.create_scheduler(")
    assert prepare.index("self.create_scheduler(") < prepare.index("self._load_optimizer_and_scheduler(")


def test_the_trainer_says_whether_it_made_the_scheduler_itself():
    assert "self._created_lr_scheduler = True" in inspect.getsource(Trainer.create_scheduler)


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_activation_checkpointing_is_two_attributes_of_a_module(kind):
    """hf_drt/activations/blocks.py sets them block by block. Hooks on embeddings are for reentrant backward passes."""
    model = tiny.MODELS[kind]()
    before = [dict(vars(module)) for module in model.modules()]
    model.activation_checkpointing_enable()
    changed, switches = set(), 0
    for module, old in zip(model.modules(), before, strict=True):
        new = {name for name, value in vars(module).items() if old.get(name) is not value}
        changed |= new - {"_require_grads_hooks", "_require_grads_hook"}
        switches += FLAG in new
    assert changed == {FLAG, FUNCTION}
    assert switches == sum(hasattr(module, FLAG) for module in model.modules()) > 0
    assert "_gradient_checkpointing_func(" in inspect.getsource(modeling_layers.GradientCheckpointingLayer)


def test_the_loader_has_the_batch_that_is_set_before_a_run():
    """What hf_drt/trainer/elastic.py sets for a run that goes on with another number of processes."""
    assert "batch_size=self._train_batch_size" in inspect.getsource(Trainer.get_train_dataloader)
    assert "self._train_batch_size = args.train_batch_size" in inspect.getsource(Trainer.__init__)
    assert "gradient_accumulation_steps" in inspect.getsource(Trainer.set_initial_training_values)


def test_random_states_are_looked_for_under_these_names():
    """Those that hf_drt/trainer/random_states.py offers."""
    source = inspect.getsource(Trainer._load_rng_state)
    assert 'f"rng_state_{process_index}.pth"' in source
    assert '"rng_state.pth"' in source
