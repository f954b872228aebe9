"""Every value of ``optim`` that transformers knows: it trains through three forms and resumes bitwise, or it is refused
before the run, by name and with the reason.

EXPECTED is the table. A name that a newer transformers adds, or that nobody has looked at, fails here by its name.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import forked
import pytest
import tiny
import torch
from transformers.training_args import OptimizerNames

from hf_drt import DRTTrainer, form_of

STEPS, SAVED = 9, (2, 4, 7)  # a checkpoint in each form: the first has two switches before it
RULES = {"drt_factored_lr_scale": 2.0, "drt_adapter_lr_scale": 0.5, "drt_rewarmup_steps": 2}


@dataclass(frozen=True)
class Trains:
    """It trains and resumes with form groups, LR scales and re-warm-up on.

    Attributes:
        arguments: Training arguments that it needs.
        rules: Those of ``RULES`` that it allows.
    """

    arguments: Mapping = field(default_factory=dict)
    rules: Mapping = field(default_factory=lambda: RULES)


@dataclass(frozen=True)
class Refused:
    """It is refused when the trainer is made.

    Attributes:
        reason: Pattern that the message has behind the name.
        arguments: Training arguments without which the Trainer itself would refuse it.
    """

    reason: str
    arguments: Mapping = field(default_factory=dict)


EXPECTED: dict[str, Trains | Refused] = {
    "adafactor": Trains(),
    "adagrad": Trains(),
    "adamw_torch": Trains(),
    "adamw_torch_fused": Trains(),
    "rmsprop": Trains(),
    "sgd": Trains({"optim_args": "momentum=0.9"}),
}


def names(kind: type) -> list[str]:
    return [name for name, expected in EXPECTED.items() if isinstance(expected, kind)]


def model() -> torch.nn.Module:
    """Dense weights and factors large enough to be kept in few bits, from 4,096 elements on, and others too small."""
    return tiny.llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1, attention_dropout=0.1)


def trainer(folder: Path, name: str, **changes) -> DRTTrainer:
    expected = EXPECTED[name]
    settings = {
        "optim": name, "max_steps": STEPS, "warmup_steps": 1, "weight_decay": 0.1, "drt_moments": "project",
        "drt_schedule": "factored:32@0 dense@3 adapter:32@6", "drt_export": "native", **expected.rules,
        **expected.arguments, **changes,
    }  # fmt: skip
    return tiny.trainer(folder, model(), **settings)


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
    assert set(EXPECTED) == {member.value for member in OptimizerNames}


@pytest.mark.parametrize("name", names(Trains))
def test_it_trains_through_three_forms_and_resumes_bitwise(tmp_path, name):
    straight = trainer(tmp_path / "straight", name, save_strategy="steps", save_steps=1)
    straight.train()
    forms = [row["drt_phase"] for row in straight.state.log_history if "drt_switch_seconds" in row]
    assert forms == [0, 1, 2]
    assert all(value.isfinite().all() for value in straight.model.state_dict().values())
    for step in SAVED:
        resumed = trainer(tmp_path / "resumed", name)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert_equal_runs(resumed, straight)


@pytest.mark.parametrize("name", names(Refused))
def test_it_is_refused_before_the_run_by_name_and_reason(tmp_path, name):
    expected = EXPECTED[name]
    settings = {"optim": name, "gradient_accumulation_steps": 1, **expected.arguments}
    with pytest.raises(ValueError, match=f"optim='{name}' .*{expected.reason}"):
        tiny.trainer(tmp_path, model(), **settings)
