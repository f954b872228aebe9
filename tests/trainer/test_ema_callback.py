"""EMACallback: the average of a Trainer's run, evaluated, saved, resumed and delivered."""

import mixed
import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_drt import EMA, DRTTrainer, EMACallback, EMADecay, dense_state_dict
from hf_drt.ema import AVERAGE_NAME, read_average, write_average

DECAY = EMADecay(0.7, warmup=False)
# Every form, an adapter's restart, and a save in each phase.
RUN = {
    "max_steps": 10, "drt_schedule": "factored:4@0 dense@3 adapter:4@5 adapter:4@7", "save_strategy": "steps",
    "save_steps": 2, "gradient_accumulation_steps": 1, "logging_strategy": "no",
}  # fmt: skip


class Expected(TrainerCallback):
    """The average of dense effective weights, in float64."""

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        now = {key: value.double() for key, value in dense_state_dict(model).items()}
        self.average = {key: 0.7 * self.average.get(key, value) + 0.3 * value for key, value in now.items()}

    def check(self, found: dict[str, torch.Tensor]) -> None:
        assert found.keys() == self.average.keys()
        for key, value in self.average.items():
            torch.testing.assert_close(found[key].double(), value, rtol=0, atol=1e-6, msg=key)


def trainer_of(folder, *callbacks, **settings) -> DRTTrainer:
    trainer = tiny.trainer(folder, **{**RUN, **settings})
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def averages(callback: EMACallback) -> dict[str, torch.Tensor]:
    return callback.ema.state_dict()["averages"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, callback, expected = tmp_path_factory.mktemp("run"), EMACallback(DECAY), Expected()
    trainer = trainer_of(folder, callback, expected)
    trainer.train()
    return folder, trainer, callback, expected


def test_the_average_of_a_run_is_that_of_its_dense_weights(run):
    _, _, callback, expected = run
    expected.check(averages(callback))
    assert callback.ema.updates == 10


@pytest.mark.parametrize("step", [2, 4, 8])
def test_a_resumed_run_goes_on_to_the_same_bits(run, tmp_path, step):
    folder, trainer, callback, _ = run
    again = EMACallback(DECAY)
    other = trainer_of(tmp_path, again, save_strategy="no")
    other.train(str(folder / f"checkpoint-{step}"))
    assert_equal_runs(other, trainer)
    assert again.ema.updates == 10
    assert [key for key, value in averages(callback).items() if not torch.equal(averages(again)[key], value)] == []


def test_the_file_is_there_before_a_checkpoint_counts_as_whole(run, tmp_path):
    folder = run[0]
    assert all((folder / f"checkpoint-{step}" / AVERAGE_NAME).is_file() for step in (2, 4, 6, 8, 10))
    seen = []

    class Watched(DRTTrainer):
        def _save_rng_state(self, output_dir):
            seen.append(read_average(output_dir)["updates"])
            super()._save_rng_state(output_dir)

    trainer = tiny.trainer(tmp_path, cls=Watched, **RUN | {"max_steps": 2, "drt_schedule": "factored:4@0"})
    trainer.add_callback(EMACallback(DECAY))
    trainer.train()
    assert seen == [2]


def test_a_checkpoint_without_an_average_is_refused_and_one_whose_average_is_left_is_told(run, tmp_path, caplog):
    folder = run[0]
    path = folder / "checkpoint-8" / AVERAGE_NAME
    kept = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(ValueError, match=r"checkpoint-8 has no drt_ema\.safetensors: it was written without"):
            trainer_of(tmp_path, EMACallback(DECAY), save_strategy="no").train(str(folder / "checkpoint-8"))
    finally:
        path.write_bytes(kept)
    trainer_of(tmp_path, save_strategy="no").train(str(folder / "checkpoint-8"))
    assert "this run has no EMACallback: it ends here" in caplog.text
    trainer_of(tmp_path, EMACallback(0.9), save_strategy="no").train(str(folder / "checkpoint-8"))
    assert "and goes on with EMADecay(decay=0.9" in caplog.text


def loss_by_hand(weights: dict[str, torch.Tensor]) -> float:
    """The mean loss over the data set, of a dense model with these weights."""
    dense = tiny.llama(attention_dropout=0.1)
    dense.load_state_dict({key: value.float() for key, value in weights.items()})
    dense.eval()
    with torch.no_grad():
        return dense(**tiny.batch(rows=64)).loss.item()


@pytest.mark.parametrize("schedule", [RUN["drt_schedule"], None], ids=["dynamic rank", "off"])
def test_evaluations_use_the_average_and_training_does_not_notice(tmp_path, schedule):
    expected, losses = Expected(), {}

    class Losses(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            losses[state.global_step] = (metrics["eval_loss"], expected.average)

    settings = {"drt_schedule": schedule, "save_strategy": "no", "max_steps": 8}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 64}
    plain = trainer_of(tmp_path / "plain", **settings)
    plain.train()
    callback = EMACallback(DECAY, evaluate=True)
    trainer = trainer_of(tmp_path / "own", callback, expected, Losses(), **settings)
    trainer.train()
    assert list(losses) == [2, 4, 6, 8]
    assert_equal_runs(trainer, plain)
    for found, weights in losses.values():
        assert found == pytest.approx(loss_by_hand(weights), abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == losses[8][0]
    assert abs(loss_by_hand(dense_state_dict(trainer.model)) - losses[8][0]) > 1e-4  # the two can be told apart


def test_the_best_checkpoint_brings_its_average(tmp_path):
    class Scored(DRTTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            output.metrics["eval_loss"] = abs(self.state.global_step - 4.0)
            return output

    callback = EMACallback(DECAY, evaluate=True, export=True)
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 5}
    trainer = tiny.trainer(tmp_path, cls=Scored, **RUN | best | {"max_steps": 8})
    trainer.add_callback(callback)
    trainer.train()
    stored = read_average(tmp_path / "checkpoint-4")
    assert callback.ema.updates == stored["updates"] == 4
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, stored["averages"][key]), key


@pytest.mark.parametrize("schedule", ["factored:4@0", "dense@0 adapter:4@3", None])
def test_the_model_that_the_run_gives_is_the_average_if_asked(tmp_path, schedule):
    expected, seen = Expected(), {}

    class Saved(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4 and schedule is not None:
                before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
                trainer.save_model(str(tmp_path / "middle"))
                seen["expected"] = dict(expected.average)
                assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())

        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen["end"] = {key: value.clone() for key, value in model.state_dict().items()}

    callback = EMACallback(DECAY, export=True)
    saves = [Saved()] if schedule is not None else []
    trainer = trainer_of(tmp_path, callback, expected, *saves, drt_schedule=schedule, max_steps=6, save_steps=6)
    trainer.train()
    expected.check(trainer.model.state_dict())
    if schedule is not None:
        expected.check(seen["end"])
        middle = AutoModelForCausalLM.from_pretrained(tmp_path / "middle").state_dict()
        for key, value in seen["expected"].items():
            torch.testing.assert_close(middle[key].double(), value, rtol=0, atol=1e-6)
    trainer.save_model(str(tmp_path / "end"))
    expected.check(AutoModelForCausalLM.from_pretrained(tmp_path / "end").state_dict())
    last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")  # keeps the run's own weights, in their form
    assert any(
        key not in expected.average or not torch.allclose(value.double(), expected.average[key], atol=1e-6)
        for key, value in last.items()
    )


def test_a_model_that_stays_in_low_rank_is_told_and_written_as_the_average_all_the_same(caplog):
    model, callback = mixed.mixed(), EMACallback(DECAY, export=True)
    callback.ema = EMA(model, DECAY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    callback.deliver(model)
    assert "the model keeps its own weights, since it is of low rank still" in caplog.text
    with callback.written(model):
        assert model.state_dict().keys() == tiny.llama().state_dict().keys()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_plain_trainer_averages_saves_and_goes_on_where_it_is_told_the_folder(tmp_path):
    def plain(name: str, callback: EMACallback, **changes) -> Trainer:
        args = {
            "max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "save_steps": 3, "disable_tqdm": True,
            "learning_rate": 3e-3, "dataloader_pin_memory": False, "logging_strategy": "no", **changes,
        }  # fmt: skip
        data = tiny.dataset()
        arguments = TrainingArguments(str(tmp_path / name), **args)
        return Trainer(tiny.llama(), arguments, train_dataset=data, eval_dataset=data, callbacks=[callback])

    callback, expected = EMACallback(DECAY), Expected()
    trainer = plain("whole", callback)
    trainer.add_callback(expected)
    trainer.train()
    expected.check(averages(callback))
    folder = str(tmp_path / "whole" / "checkpoint-3")
    again = EMACallback(DECAY)
    with pytest.raises(ValueError, match=r"goes on at update step 3, and a plain Trainer does not tell .*resume_from"):
        plain("again", again).train(resume_from_checkpoint=folder)
    again.resume_from(folder)
    plain("again", again).train(resume_from_checkpoint=folder)
    assert all(torch.equal(averages(again)[key], value) for key, value in averages(callback).items())
    with pytest.raises(ValueError, match=r"EMACallback\(evaluate=True\) needs DRTTrainer or its mixin"):
        plain("evaluate", EMACallback(DECAY, evaluate=True)).train()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    with pytest.raises(ValueError, match="loads weights in a plain Trainer without a word to EMACallback"):
        plain("best", EMACallback(DECAY), **best).train()


# ---- refused


def test_what_it_cannot_do_is_refused_when_the_trainer_begins(tmp_path):
    with pytest.raises(ValueError, match="a trainer has one EMACallback, got 2"):
        trainer_of(tmp_path, EMACallback(), EMACallback()).train()
    with pytest.raises(
        ValueError, match=r"export=True\) makes the model the averaged one, .* drt_export=native asks for"
    ):
        trainer_of(tmp_path, EMACallback(export=True), drt_export="native").train()
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\)"):
        EMACallback(1.5)
    late = EMACallback()
    with pytest.raises(ValueError, match="EMACallback was added after training had begun"):
        late.average_of(tiny.llama())


def test_a_model_that_takes_the_trained_ones_place_is_not_evaluated_by_its_average(tmp_path):
    callback = EMACallback(DECAY, evaluate=True)
    trainer = trainer_of(tmp_path, callback, max_steps=2, drt_schedule="dense@0 factored:4@1", save_strategy="no")
    trainer.train()
    trainer.model = tiny.llama()
    with pytest.raises(ValueError, match=r"no longer the one that EMACallback has averaged. Take the callback out"):
        trainer.evaluate()
    trainer.remove_callback(EMACallback)
    trainer.evaluate()


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*args, **kwargs) -> None:
        raise OSError("No space left")

    monkeypatch.setattr("hf_drt.ema.file.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_average(tmp_path, run[2].ema)
    assert [*tmp_path.iterdir()] == []
