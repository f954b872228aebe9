"""Trainers that write and load models in ways of their own: what lands is what drt_export says, and runs can go on."""

import logging
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_drt import CheckpointError, Dense, DRTCallback, DRTTrainer, DRTTrainerMixin, dense_state_dict, form_of

PLAN = "factored@0 dense@4 adapter@8"
SETTINGS = {"max_steps": 12, "drt_schedule": PLAN, "save_strategy": "steps", "save_steps": 3}


class Wrapped(nn.Module):
    """A model of transformers inside a container without a configuration."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.llama(attention_dropout=0.1)

    def forward(self, **inputs):
        return self.inner(**inputs)


class IgnoresTheStateDict:
    """As sentence-transformers: ``_save`` saves the model, and loading takes one argument."""

    def _save(self, output_dir=None, state_dict=None):
        model = getattr(self.model, "inner", self.model)
        model.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, path):
        model = getattr(self.model, "inner", self.model)
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())


class Pickles:
    """As GLiNER: ``save_model`` is its own, and writes a pickle."""

    def save_model(self, output_dir=None, _internal_call=False):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(output_dir, "pytorch_model.bin"))

    def _load_from_checkpoint(self, folder, model=None):
        self.model.load_state_dict(torch.load(Path(folder, "pytorch_model.bin")), strict=False)


class SavesPretrained:
    """A user's override without the second parameter."""

    def save_model(self, output_dir, **options):
        self.model.save_pretrained(output_dir)


def library(saver: type, mixin_first: bool) -> type:
    """The library's trainer with DRT in front of it, or below it as under ``python -m hf_drt.run``."""
    if mixin_first:
        return type("Mixed", (DRTTrainerMixin, type("Library", (saver, Trainer), {})), {})
    return type("Library", (saver, type("Base", (DRTTrainerMixin, Trainer), {})), {})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model.bin")]
    return {k: v for path in files for k, v in (load_file(path) if path.suffix != ".bin" else torch.load(path)).items()}


def assert_same_weights(model: nn.Module, other: nn.Module) -> None:
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


CASES = [
    (saver, first, inside)
    for saver in (IgnoresTheStateDict, Pickles, SavesPretrained)
    for first in (True, False)
    for inside in (False, True)
    if not (saver is SavesPretrained and inside)
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("saver", "mixin_first", "inside"), CASES)
def test_a_dense_model_lands_and_every_checkpoint_resumes_bitwise(tmp_path, saver, mixin_first, inside):
    cls = library(saver, mixin_first)

    def run(folder: Path, resume: str | None = None):
        model = Wrapped() if inside else None
        trainer = tiny.trainer(folder, model, cls=cls, remove_unused_columns=False, **SETTINGS)
        seen = trainer.add_callback(SavesInTheLastPhase(trainer, folder / "last")) or trainer
        seen.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "a")
    expected = dense_state_dict(whole.model)
    if inside and saver is IgnoresTheStateDict:
        expected = {name.removeprefix("inner."): value for name, value in expected.items()}
    landed = stored(tmp_path / "a" / "last")
    for name, value in landed.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
    assert set(expected) - set(landed) <= {"lm_head.weight"}
    for step in (3, 6, 9):
        assert (tmp_path / "a" / f"checkpoint-{step}" / "drt_state.json").is_file()
        again = run(tmp_path / f"b{step}", str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_same_weights(again.model, whole.model)


class SavesInTheLastPhase(TrainerCallback):
    """Calls save_model while layers are in adapter form."""

    def __init__(self, trainer, folder: Path):
        self.trainer, self.folder = trainer, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            assert any(form_of(m) != Dense() for m in self.trainer.model.modules())
            self.trainer.save_model(str(self.folder))
            assert any(form_of(m) != Dense() for m in self.trainer.model.modules())  # as it was


@pytest.mark.parametrize("mixin_first", [True, False])
def test_a_native_container_is_declared_at_the_model_inside(tmp_path, mixin_first):
    cls = library(IgnoresTheStateDict, mixin_first)
    trainer = tiny.trainer(tmp_path, Wrapped(), cls=cls, remove_unused_columns=False, drt_export="native", **SETTINGS)
    trainer.train()
    trainer.save_model(str(tmp_path / "native"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    batch = tiny.batch()
    assert torch.equal(tiny.logits(again, batch), tiny.logits(trainer.model.inner, batch))
    assert {form_of(m) for m in again.modules()} == {form_of(m) for m in trainer.model.inner.modules()}


def last_phase(tmp_path: Path, saver: type, **changes):
    """A trainer whose model is left in factored form, with one that saves in its own way."""
    cls = library(saver, mixin_first=False)
    trainer = tiny.trainer(tmp_path, cls=cls, max_steps=2, drt_schedule="factored@0", drt_export="native", **changes)
    trainer.train()
    return trainer


class KeepsAState:
    """Writes a state dict that it took earlier."""

    def save_model(self, output_dir=None, _internal_call=False):
        Path(output_dir).mkdir(parents=True)
        save_file(self.kept, Path(output_dir, "model.safetensors"))


def test_low_rank_tensors_in_place_of_a_dense_model_are_an_error(tmp_path):
    trainer = last_phase(tmp_path, KeepsAState)
    trainer.kept = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.args.drt_export = "dense"
    with pytest.raises(CheckpointError, match=r"should hold a dense model, but has model\.layers.*U: the trainer has"):
        trainer.save_model(str(tmp_path / "out"))


def test_other_values_than_the_models_are_an_error(tmp_path):
    trainer = last_phase(tmp_path, KeepsAState)
    trainer.kept = {k: v + 1 for k, v in dense_state_dict(trainer.model).items()}
    trainer.args.drt_export = "dense"
    with pytest.raises(CheckpointError, match="is not what the model computes with"):
        trainer.save_model(str(tmp_path / "out"))


def test_a_native_model_without_a_configuration_is_an_error(tmp_path):
    trainer = last_phase(tmp_path, Pickles)
    with pytest.raises(CheckpointError, match=r"should hold a native model, but has no config\.json that declares"):
        trainer.save_model(str(tmp_path / "out"))


def test_a_native_model_that_lacks_factors_is_an_error(tmp_path):
    trainer = last_phase(tmp_path, KeepsAState)
    trainer.kept = dense_state_dict(trainer.model)
    with pytest.raises(CheckpointError, match=r"should hold a native model, but lacks model\.layers"):
        trainer.save_model(str(tmp_path / "out"))


class SavesNothing:
    def save_model(self, output_dir=None, _internal_call=False):
        return None


def test_a_folder_without_weights_is_told(tmp_path, caplog):
    trainer = last_phase(tmp_path, SavesNothing)
    trainer.save_model(str(tmp_path / "out"))
    assert "no weights were found there, so it was not checked whether they are native" in caplog.text


class LoadsNothing(Pickles):
    def _load_from_checkpoint(self, folder, model=None):
        return None


@pytest.mark.parametrize("mixin_first", [True, False])
def test_weights_that_a_trainer_fails_to_load_are_an_error_and_the_model_is_as_it_was(tmp_path, mixin_first):
    cls = library(LoadsNothing, mixin_first)
    tiny.trainer(tmp_path, cls=cls, **SETTINGS).train()
    trainer = tiny.trainer(tmp_path / "b", cls=cls, **SETTINGS)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"weights of the model were not loaded from .*checkpoint-3"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    after = trainer.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


class SwallowsErrors(IgnoresTheStateDict):
    """As sentence-transformers: a best model that cannot be loaded is a line in the log."""

    def _load_best_model(self):
        try:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        except Exception:
            logging.getLogger(__name__).error("could not load the best model")


@pytest.mark.parametrize("mixin_first", [True, False])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_best_model_of_another_phase(tmp_path, mixin_first, breaks):
    cls = library(SwallowsErrors, mixin_first)
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "metric_for_best_model": "runtime",
    }
    trainer = tiny.trainer(tmp_path, cls=cls, **SETTINGS, **best, drt_export="native")
    trainer._determine_best_metric = lambda metrics, trial: setattr(trainer.state, "best_global_step", 3)
    if breaks:
        trainer.add_callback(DamagesCheckpoints(tmp_path))
        with pytest.raises(CheckpointError):
            trainer.train()
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        return
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    landed = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in landed.items())
    assert {type(form_of(m)).__name__ for m in trainer.model.modules()} >= {"Factored"}


class DamagesCheckpoints(TrainerCallback):
    """After the last save, the configuration that declares the layers is gone, so that a library's loading fails."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == args.max_steps:
            (self.folder / "checkpoint-3" / "config.json").unlink()


# ---- the end of training


class LooksAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.forms = {form_of(module) for module in model.modules()}


@pytest.mark.parametrize("plan", ["factored@0", "factored@0 adapter@6", "factored@0 dense@6"])
def test_a_script_that_ends_in_save_pretrained_writes_a_dense_model(tmp_path, plan):
    look = LooksAtTheEnd()
    data, model = tiny.dataset(), tiny.llama()
    args = tiny.arguments(tmp_path, max_steps=12, drt_schedule=plan)
    trainer = DRTTrainer(model=model, args=args, train_dataset=data, callbacks=[look])
    kept = SavesInTheLastPhase(trainer, tmp_path / "last")
    if "dense" not in plan:
        trainer.add_callback(kept)
    trainer.train()
    assert look.forms == {Dense()}  # other callbacks see it too
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(model, tiny.batch()))
    if "dense" not in plan:
        landed, state = load_file(tmp_path / "last" / "model.safetensors"), model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in landed.items())


@pytest.mark.parametrize("export", ["native", "adapter"])
def test_other_exports_leave_the_model_in_its_last_form(tmp_path, export):
    trainer = tiny.trainer(tmp_path, max_steps=4, drt_schedule="dense@0 adapter@2", drt_export=export)
    trainer.train()
    assert {type(form_of(m)).__name__ for m in trainer.model.modules()} == {"Dense", "Adapter"}


def test_a_callback_in_a_plain_trainer_ends_dense_too(tmp_path):
    args = tiny.arguments(tmp_path, max_steps=4, drt_schedule=None)
    callback = DRTCallback("factored@0 adapter@2")
    trainer = Trainer(model=tiny.llama(), args=args, train_dataset=tiny.dataset(), callbacks=[callback])
    trainer.train()
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(trainer.model, tiny.batch()))


def test_an_update_that_rounding_would_lose_stays_an_adapter(tmp_path, caplog):
    trainer = tiny.trainer(
        tmp_path, tiny.llama().to(torch.bfloat16), max_steps=4, drt_schedule="dense@0 adapter@2", learning_rate=1e-6
    )
    trainer.train()
    assert any(type(form_of(m)).__name__ == "Adapter" for m in trainer.model.modules())
    assert "the model keeps the form of its last phase: rounding to the weights' dtype would lose" in caplog.text


def test_training_goes_on_after_a_dense_end(tmp_path):
    trainer = tiny.trainer(tmp_path, **SETTINGS)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    other = tiny.trainer(tmp_path / "b", **SETTINGS)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_weights(trainer.model, other.model)
    trainer.train()  # once more from the start, on a dense model with an optimizer that knows its weights
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
