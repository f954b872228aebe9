"""Every value of ``optim`` that transformers knows: it trains through three forms and resumes bitwise, or it is refused
before the run, by name and with the reason.

EXPECTED is the table. A name that a newer transformers adds, or that nobody has looked at, fails here by its name.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import bitsandbytes
import forked
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers.training_args import OptimizerNames

from hf_drt import DRTTrainer

STEPS, SAVED = 9, (2, 4, 7)  # a checkpoint in each form: the first has two switches before it
RULES = {"drt_factored_lr_scale": 2.0, "drt_adapter_lr_scale": 0.5, "drt_rewarmup_steps": 2}
SETTINGS = {
    "max_steps": STEPS, "warmup_steps": 1, "weight_decay": 0.1, "drt_moments": "project", "drt_export": "native",
    "drt_schedule": "factored:32@0 dense@3 adapter:32@6",
}  # fmt: skip


@dataclass(frozen=True)
class Trains:
    """It trains and resumes with form groups, LR scales and re-warm-up on.

    Attributes:
        arguments: Training arguments that it needs.
        rules: Those of ``RULES`` that it allows.
        compiled: Whether a step that it compiles is compiled here too; it computes the same without.
    """

    arguments: Mapping = field(default_factory=dict)
    rules: Mapping = field(default_factory=lambda: RULES)
    compiled: bool = True


@dataclass(frozen=True)
class Refused:
    """It is refused when the trainer is made.

    Attributes:
        reason: Pattern that the message has behind the name.
        arguments: Training arguments without which the Trainer itself would refuse it.
    """

    reason: str
    arguments: Mapping = field(default_factory=dict)


# The state of GaLore's and APOLLO's is an object that no checkpoint gives back; without saving they train.
SAVED_PROJECTIONS = {"save_strategy": "steps", "optim_target_modules": ["mlp"], "optim_args": "rank=8"}
PROJECTOR = r"cannot be resumed: a checkpoint \(save_strategy=steps\) would hold a projector"

EXPECTED: dict[str, Trains | Refused] = {
    "adafactor": Trains(),
    "adagrad": Trains(),
    "adalomo": Refused("its averages stand outside of its state.* The nearest that can is optim='adafactor'"),
    "adamw_8bit": Trains(),
    "adamw_anyprecision": Refused("it needs torchdistx"),
    "adamw_bnb_8bit": Trains(),
    "adamw_torch": Trains(),
    "adamw_torch_4bit": Trains(compiled=False),  # as the next one, but for the codes; compiling takes half a minute
    "adamw_torch_8bit": Trains(),
    "adamw_torch_fused": Trains(),
    "adamw_torch_npu_fused": Refused("it needs torch_npu"),
    "adamw_torch_xla": Refused("it needs torch_xla"),
    "ademamix": Trains(),
    "ademamix_8bit": Trains({"optim_args": "t_alpha=9,t_beta3=9"}),
    "apollo_adamw": Refused(PROJECTOR, SAVED_PROJECTIONS),
    "apollo_adamw_layerwise": Refused("a hook of its gradient"),
    "galore_adafactor": Refused(PROJECTOR + ".* optim='adafactor'", SAVED_PROJECTIONS),
    "galore_adafactor_layerwise": Refused("a hook of its gradient"),
    "galore_adamw": Refused(PROJECTOR, SAVED_PROJECTIONS),
    "galore_adamw_8bit": Refused("on a CUDA device alone.* optim='adamw_8bit'"),
    "galore_adamw_8bit_layerwise": Refused("a hook of its gradient"),
    "galore_adamw_layerwise": Refused("a hook of its gradient, which a new weight would not have"),
    "grokadamw": Refused("its moments stand in its parameter group"),
    "lion_32bit": Trains(),
    "lion_8bit": Trains(),
    "lomo": Trains(rules={}),
    "paged_adamw_32bit": Trains(),
    "paged_adamw_8bit": Trains(),
    "paged_ademamix_32bit": Trains(),
    "paged_ademamix_8bit": Trains(),
    "paged_lion_32bit": Trains(),
    "paged_lion_8bit": Trains(),
    "rmsprop": Trains(),
    "rmsprop_bnb": Trains(),
    "rmsprop_bnb_32bit": Trains(),
    "rmsprop_bnb_8bit": Trains(),
    "schedule_free_adamw": Trains(),
    "schedule_free_radam": Trains(),
    "schedule_free_sgd": Trains(),
    "sgd": Trains({"optim_args": "momentum=0.9"}),
    "stable_adamw": Trains(),
}
# Classes that the Trainer has no name for, over the matrices of blocks; as they are passed in ``optimizers=``.
GIVEN: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adadelta": lambda weights: torch.optim.Adadelta(weights, lr=1.0),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, lr=1e-2),
    "adamax": lambda weights: torch.optim.Adamax(weights, lr=1e-3),
    "asgd": lambda weights: torch.optim.ASGD(weights, lr=1e-2, t0=2),
    "bnb_lion": lambda weights: bitsandbytes.optim.Lion(weights, lr=1e-3, optim_bits=8),
    "bnb_lamb": lambda weights: bitsandbytes.optim.LAMB(weights, lr=1e-3),
    "bnb_sgd": lambda weights: bitsandbytes.optim.SGD(weights, lr=1e-2, momentum=0.9),
    "muon": lambda weights: torch.optim.Muon(weights, lr=1e-2, adjust_lr_fn="match_rms_adamw"),
    "nadam": lambda weights: torch.optim.NAdam(weights, lr=1e-3),
    "radam": lambda weights: torch.optim.RAdam(weights, lr=1e-3),
}


def names(kind: type) -> list[str]:
    return [name for name, expected in EXPECTED.items() if isinstance(expected, kind)]


def model() -> torch.nn.Module:
    """Dense weights and factors large enough to be kept in few bits, from 4,096 elements on, and others too small."""
    return tiny.llama(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, vocab_size=128, attention_dropout=0.1
    )


def trainer(folder: Path, name: str, **changes) -> DRTTrainer:
    expected = EXPECTED[name]
    settings = {"optim": name, **SETTINGS, **expected.rules, **expected.arguments, **changes}
    return tiny.trainer(folder, model(), **settings)


def given(folder: Path, name: str, **changes) -> DRTTrainer:
    """A trainer with a passed optimizer, which has the model's dense matrices alone."""
    own = model()
    optimizer = GIVEN[name]([p for layer in own.model.layers for p in layer.parameters() if p.ndim == 2])
    arguments = tiny.arguments(folder, **SETTINGS, **RULES, **changes)
    return DRTTrainer(own, arguments, train_dataset=tiny.dataset(), optimizers=(optimizer, None))


def content(value):
    """What of an entry of an optimizer's state can be compared: tensor classes by the tensors inside."""
    if isinstance(value, dict):
        return {key: content(inner) for key, inner in value.items()}
    if not torch.is_tensor(value):
        return value
    if not hasattr(value, "__tensor_flatten__"):
        return value.dtype, tuple(value.shape), value.tolist()
    names, context = value.__tensor_flatten__()
    return context, {name: content(getattr(value, name)) for name in names}


def assert_equal_runs(run: DRTTrainer, expected: DRTTrainer) -> None:
    weights, others = run.model.state_dict(), expected.model.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert content(run.optimizer.state_dict()) == content(expected.optimizer.state_dict())


def test_every_name_has_its_place_in_the_table():
    known = {member.value for member in OptimizerNames}
    assert (sorted(known - set(EXPECTED)), sorted(set(EXPECTED) - known)) == ([], [])


def assert_resumes_bitwise(make: Callable[..., DRTTrainer], folder: Path) -> None:
    straight = make(folder / "straight", save_strategy="steps", save_steps=1)
    straight.train()
    switches = [row["drt_phase"] for row in straight.state.log_history if "drt_switch_seconds" in row]
    assert switches == [0, 1, 2]
    assert all(value.isfinite().all() for value in straight.model.state_dict().values())
    for step in SAVED:
        resumed = make(folder / "resumed")
        resumed.train(resume_from_checkpoint=str(folder / "straight" / f"checkpoint-{step}"))
        assert_equal_runs(resumed, straight)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", names(Trains))
def test_it_trains_through_three_forms_and_resumes_bitwise(tmp_path, name):
    with torch.compiler.set_stance("default" if EXPECTED[name].compiled else "force_eager"):
        assert_resumes_bitwise(partial(trainer, name=name), tmp_path)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", GIVEN)
def test_a_class_that_is_passed_does_so_too(tmp_path, name):
    assert_resumes_bitwise(partial(given, name=name), tmp_path)


CHILD = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
import conftest, test_every_optimizer, torch
torch.set_num_threads(1)
from transformers import TrainerCallback
class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
trainer = test_every_optimizer.trainer(sys.argv[1], "adamw_8bit", save_strategy="steps", save_steps=1)
trainer.add_callback(Killed())
trainer.train(resume_from_checkpoint=int(sys.argv[2]) == 0)
"""


def test_after_a_kill_another_process_ends_where_one_without_it_does(tmp_path):
    """bitsandbytes, whose manager knows weights for as long as a process lives."""
    straight = trainer(tmp_path / "straight", "adamw_8bit", save_strategy="steps", save_steps=STEPS)
    straight.train()
    here = Path(__file__).parent
    code = CHILD.format(tests=str(here.parent), here=str(here))
    killed = forked.python("-c", code, tmp_path / "killed", 5)
    assert killed.returncode == -signal.SIGKILL
    resumed = forked.python("-c", code, tmp_path / "killed", 0)
    assert resumed.returncode == 0, resumed.stderr
    one, other = (folder / f"checkpoint-{STEPS}" for folder in (tmp_path / "straight", tmp_path / "killed"))
    assert content(load_file(one / "model.safetensors")) == content(load_file(other / "model.safetensors"))
    states = [torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, other)]
    assert content(states[0]) == content(states[1])


@pytest.mark.parametrize("name", names(Refused))
def test_it_is_refused_before_the_run_by_name_and_reason(tmp_path, name):
    settings = {"optim": name, "gradient_accumulation_steps": 1, **EXPECTED[name].arguments}
    with pytest.raises(ValueError, match=f"optim='{name}' .*{EXPECTED[name].reason}"):
        tiny.trainer(tmp_path, model(), **settings)
