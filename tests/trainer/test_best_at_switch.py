"""The best score under ``evaluate_at_switch``: the best one of the log whose weights are kept, and those weights."""

import pytest
import tiny
import torch
import transformers
from equal_runs import assert_equal_runs
from transformers import EarlyStoppingCallback, Trainer

from hf_drt import DRTCallback, DRTConfig, DRTTrainer

# A switch at step 7, evaluations at 5, 10 and 15 by themselves.
STEPS = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 5}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch"}  # of 5 steps
BEST = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 5}
SETTINGS = {
    "max_steps": 15, "gradient_accumulation_steps": 1, "logging_strategy": "no", "drt_evaluate_at_switch": True,
    "drt_schedule": "factored@0 dense@7", "drt_export": "native",  # which leaves the model in its phase's form
    "metric_for_best_model": "score", "greater_is_better": False,
}  # fmt: skip
FIRST = {5: 3.0, 7: 1.0, 10: 2.0, 15: 2.5}  # the best at the switch
LATER = {5: 3.0, 7: 2.9, 10: 2.0, 15: 2.5}


class Scored(DRTTrainer):
    """Scores by table, and the weights of every step that is evaluated."""

    def __init__(self, *args, scores, **kwargs):
        super().__init__(*args, **kwargs)
        self.scores, self.weights = scores, {}

    def evaluate(self, *args, **kwargs):
        step = self.state.global_step
        self.weights[step] = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        metrics = {"eval_score": self.scores[step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer_of(folder, scores, *, early: int | None = None, **settings) -> Scored:
    def make(**kwargs):
        return Scored(scores=scores, **kwargs)

    data = {"eval_steps": 5, **SETTINGS, **settings}
    trainer = tiny.trainer(folder, cls=make, **data)
    trainer.train_dataset = tiny.dataset(rows=20)
    if early is not None:
        trainer.add_callback(EarlyStoppingCallback(early))
    return trainer


def logged(trainer) -> dict[int, float]:
    return {row["step"]: row["eval_score"] for row in trainer.state.log_history if "eval_score" in row}


def assert_best_is_loaded(trainer) -> None:
    """By the log alone: the best of its scores, and the weights of that step."""
    scores = logged(trainer)
    choose = max if trainer.args.greater_is_better else min
    step = choose(scores, key=scores.get)
    assert trainer.state.best_metric == scores[step]
    assert trainer.state.best_global_step == step
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    expected = trainer.weights[step]
    assert trainer.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in trainer.model.state_dict().items())


@pytest.mark.sampled(9)
@pytest.mark.parametrize("strategy", [STEPS, EPOCHS, BEST], ids=["steps", "epoch", "best"])
@pytest.mark.parametrize("scores", [FIRST, LATER, {**LATER, 5: 0.5}], ids=["at the switch", "after it", "before it"])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_score_of_the_log_is_loaded(tmp_path, strategy, scores, limit):
    trainer = trainer_of(tmp_path, scores, load_best_model_at_end=True, save_total_limit=limit, **strategy)
    trainer.train()
    assert logged(trainer) == scores
    assert_best_is_loaded(trainer)


@pytest.mark.parametrize("strategy", [STEPS, EPOCHS, BEST], ids=["steps", "epoch", "best"])
@pytest.mark.parametrize("peak", [7, 10])
def test_greater_may_be_better(tmp_path, strategy, peak):
    scores = {step: 1.0 / (1 + abs(step - peak)) for step in FIRST}
    trainer = trainer_of(tmp_path, scores, load_best_model_at_end=True, **strategy | {"greater_is_better": True})
    trainer.train()
    assert_best_is_loaded(trainer)


def test_the_best_score_at_a_switch_with_nothing_saved_yet(tmp_path):
    scores = {7: 1.0, 10: 2.0, 15: 2.5}
    settings = {**STEPS, "save_steps": 10, "eval_steps": 10}
    trainer = trainer_of(tmp_path, scores | {20: 3.0}, load_best_model_at_end=True, **settings)
    trainer.train()
    assert_best_is_loaded(trainer)


@pytest.mark.parametrize("early", [1, 2])
@pytest.mark.parametrize("scores", [FIRST, {**LATER, 7: 4.0}], ids=["better", "worse"])
def test_early_stopping_counts_an_evaluation_at_a_switch(tmp_path, early, scores):
    trainer = trainer_of(tmp_path, scores, early=early, load_best_model_at_end=True, **STEPS)
    trainer.train()
    best, worse, last = float("inf"), 0, 15
    for step, score in scores.items():
        best, worse = (score, 0) if score < best else (best, worse + 1)
        if worse == early:
            last = step
            break
    assert trainer.state.global_step == last
    assert_best_is_loaded(trainer)


@pytest.mark.parametrize("at", [5, 7, 10])
def test_resuming_over_a_switch_finds_the_same_best_model(tmp_path, at):
    expected = trainer_of(tmp_path, FIRST, load_best_model_at_end=True, **STEPS)
    expected.train()
    trainer = trainer_of(tmp_path, FIRST, load_best_model_at_end=True, **STEPS)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert logged(trainer) == FIRST
    assert trainer.state.best_model_checkpoint == expected.state.best_model_checkpoint
    assert_equal_runs(trainer, expected)


# ---- where nothing is saved


@pytest.mark.parametrize("strategy", [STEPS, {**STEPS, "save_strategy": "no"}, EPOCHS], ids=["steps", "no", "epoch"])
@pytest.mark.parametrize("scores", [FIRST, LATER], ids=["at the switch", "after it"])
def test_a_score_whose_weights_are_not_kept_is_not_the_best(tmp_path, strategy, scores):
    """metric_for_best_model alone: its best checkpoint is read from the state after training."""
    trainer = trainer_of(tmp_path, scores, **strategy)
    trainer.train()
    assert logged(trainer) == scores
    assert trainer.state.best_metric == 2.0
    if strategy["save_strategy"] != "no":
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    assert not (tmp_path / "checkpoint-7").exists()


@pytest.mark.parametrize("strategy", [STEPS, EPOCHS, BEST], ids=["steps", "epoch", "best"])
def test_with_save_at_switch_the_score_counts(tmp_path, strategy):
    trainer = trainer_of(tmp_path, FIRST, drt_save_at_switch=True, **strategy)
    trainer.train()
    assert trainer.state.best_metric == 1.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-7")


def test_an_evaluation_that_is_due_anyway_is_the_trainers_own(tmp_path):
    """At step 5, which the plain Trainer evaluates and does not save, with a switch or without."""
    settings = {**STEPS, "save_steps": 10, "eval_steps": 5, "drt_schedule": "factored@0 dense@5"}
    trainer = trainer_of(tmp_path, {5: 1.0, 10: 2.0, 15: 3.0}, **settings)
    trainer.train()
    assert trainer.state.best_metric == 1.0
    assert trainer.state.best_global_step == 5


def test_an_evaluation_at_a_switch_on_the_end_of_an_epoch(tmp_path):
    """It is evaluated at its last step, and at its end once more by the Trainer, which saves it."""
    scores = {5: 1.0, 10: 2.0, 15: 3.0}
    trainer = trainer_of(tmp_path, scores, drt_schedule="factored@0 dense@5", **EPOCHS)
    trainer.train()
    assert trainer.state.best_metric == 1.0
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-5")


@pytest.mark.parametrize(
    ("delay", "strategy", "evaluated"),
    [(7, STEPS, [7, 10, 15]), (8, STEPS, [10, 15]), (1.4, EPOCHS, [7, 10, 15]), (1.5, EPOCHS, [10, 15])],
)
def test_eval_delay_holds_at_a_switch_too(tmp_path, delay, strategy, evaluated):
    trainer = trainer_of(tmp_path, FIRST, load_best_model_at_end=True, eval_delay=delay, **strategy)
    trainer.train()
    assert list(logged(trainer)) == evaluated
    assert_best_is_loaded(trainer)


# ---- save_strategy=best, in which an evaluation decides on the save


def saved(folder) -> list[int]:
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*/trainer_state.json"))


@pytest.mark.parametrize("evaluates", [True, False])
@pytest.mark.parametrize(("switch", "evaluated"), [(7, True), (5, True), (10, True)])
def test_a_save_at_a_switch_is_made_whatever_the_score(tmp_path, evaluates, switch, evaluated):
    scores = {5: 1.0, 7: 3.0, 10: 2.0, 15: 2.5}
    settings = {"drt_schedule": f"factored@0 dense@{switch}", "drt_evaluate_at_switch": evaluates}
    trainer = trainer_of(tmp_path, scores, drt_save_at_switch=True, **BEST | settings)
    trainer.train()
    assert saved(tmp_path) == sorted({5, switch})
    assert trainer.state.best_global_step == 5


def test_without_save_at_switch_only_the_best_is_saved(tmp_path):
    trainer = trainer_of(tmp_path, {5: 1.0, 7: 3.0, 10: 2.0, 15: 2.5}, **BEST)
    trainer.train()
    assert saved(tmp_path) == [5]


class SaveAt(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= state.global_step == self.step


def test_a_save_that_a_callback_asks_for_is_not_dropped_by_an_evaluation_of_ours(tmp_path):
    """Without a switch there would be no evaluation at step 7, and the save would be made."""
    trainer = trainer_of(tmp_path, {5: 1.0, 7: 3.0, 10: 2.0, 15: 2.5}, **BEST)
    trainer.add_callback(SaveAt(7))
    trainer.train()
    assert saved(tmp_path) == [5, 7]


def test_the_end_of_the_last_phase_is_saved_for_its_tag(tmp_path):
    """tag_phases, of which the trainer needs a Hub; its callback asks for the save."""
    trainer = trainer_of(tmp_path, {5: 1.0, 7: 3.0, 10: 2.0, 15: 2.5}, **BEST)
    trainer._drt_config = lambda: DRTConfig(schedule="factored@0 dense@7", tag_phases=True, evaluate_at_switch=True)
    trainer.train()
    assert saved(tmp_path) == [5, 7, 15]


# ---- a callback in a plain Trainer, which cannot see to it


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({"save_at_switch": True}, BEST, r"save_at_switch is dropped by a plain Trainer under save_strategy=best"),
        (
            {"evaluate_at_switch": True},
            STEPS,
            r"evaluate_at_switch with metric_for_best_model: in a plain Trainer .*Use",
        ),
        ({"evaluate_at_switch": True}, {"save_strategy": "no"}, r"no checkpoint has its weights\. Use DRTTrainer, or"),
    ],
)
def test_a_callback_alone_refuses_what_it_cannot_do(tmp_path, config, settings, message):
    with pytest.raises(ValueError, match=message):
        plain(tmp_path, config, settings)


def plain(folder, config, settings):
    own = {key: value for key, value in SETTINGS.items() if not key.startswith("drt_")}
    args = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, per_device_train_batch_size=4, **own | settings
    )
    callback = DRTCallback(DRTConfig(schedule="factored@0 dense@7", **config))
    data = tiny.dataset(rows=20)
    return Trainer(tiny.llama(), args, train_dataset=data, eval_dataset=data, callbacks=[callback])


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({"save_at_switch": True, "evaluate_at_switch": True}, STEPS),
        ({"evaluate_at_switch": True}, BEST),
        ({"evaluate_at_switch": True}, {**STEPS, "metric_for_best_model": None}),
    ],
)
def test_a_callback_alone_evaluates_where_the_step_is_saved_or_no_best_is_kept(tmp_path, config, settings):
    settings = settings if "metric_for_best_model" in settings else {**settings, "metric_for_best_model": "loss"}
    trainer = plain(tmp_path, config, settings)
    trainer.train()
    rows = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    assert list(rows) == [5, 7, 10, 15]
    if settings["metric_for_best_model"] is not None:
        best = min(rows, key=rows.get)
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
