"""Runs of the preset drift: in a loop, in DRTTrainer and by DRTCallback, down and up, resumed to the bit."""

import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from transformers import HfArgumentParser, Trainer

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DRTTrainingArguments, DynamicRank, dense_state_dict
from hf_drt.forms import Adapter, AdapterLinear, Dense, form_of, layer_of, trainable_weights

DOWN = "drift(first=0.6,last=0.125,shape=linear,levels=3)"  # of 6 update steps: at 0, 2 and 5
UP = "drift(first=0.125,last=0.4,shape=cosine,levels=3)"
KINDS = {"llama": (tiny.llama, "llama"), "resnet": (tiny.resnet, "resnet"), "experts": (tiny.mixtral, "llama")}


def ranks(drt: DynamicRank) -> dict[str, int | None]:
    forms = {name: form_of(layer_of(drt.model, name)) for name in drt.targets}
    return {name: form.rank if isinstance(form, Adapter) else None for name, form in forms.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [DOWN, UP])
def test_in_a_loop_every_switch_keeps_the_function_and_the_model_learns(kind, schedule):
    model, data = KINDS[kind][0](), tiny.batch(KINDS[kind][1])
    drt = DynamicRank(model, DRTConfig(schedule=schedule, rank_multiple=2), max_steps=8)
    drt.apply(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    losses, seen = [], [ranks(drt)]
    for step in range(8):
        before = tiny.logits(model, data)
        if transition := drt.begin_step(step, optimizer):
            seen.append(ranks(drt))
            assert transition.step == step
            assert transition.truncation_error <= 1e-6
        assert (tiny.logits(model, data) - before).norm() <= 1e-5 * before.norm()
        model.train()
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(seen) == 3
    for name, (first, middle, last) in zip(drt.targets, zip(*(s.values() for s in seen), strict=True), strict=True):
        order = (first or 99) >= (middle or 99) >= (last or 99)
        assert order if schedule == DOWN else first <= middle <= (last or 99), name
    assert losses[-1] < losses[0]
    adapters = [layer_of(model, name) for name in drt.targets]
    assert all(optimizer.state[w]["step"] == 8 for a in adapters for w in trainable_weights(a))
    after = tiny.logits(model, data)
    drt.to_dense()
    assert (tiny.logits(model, data) - after).norm() <= 1e-5 * after.norm()


def test_a_layer_whose_rank_rounds_to_the_same_is_left_alone():
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="drift(first=0.25,last=0.15,levels=3)", rank_pattern={"mlp": 4},
                                       rank_multiple=1), max_steps=20)  # fmt: skip
    drt.apply(0)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    kept = {name: layer_of(model, name) for name in drt.targets if "mlp" in name}
    transition = drt.apply(19, optimizer)
    assert transition.layers == len(drt.targets) - len(kept) > 0
    assert all(layer_of(model, name) is layer for name, layer in kept.items())


@pytest.mark.parametrize("ends", ["first=1,last=0.25", "first=0.25,last=1"])
def test_from_full_rank_down_and_to_full_rank_up(ends, caplog):
    """Full rank is dense; so is a rank that reaches break-even, and no error."""
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule=f"drift({ends},shape=linear,levels=4)", rank_multiple=1), max_steps=12)
    kinds = [{type(form) for form in drt.forms(index).values()} for index in range(4)]
    down = kinds if ends.startswith("first=1") else kinds[::-1]
    assert down == [{Dense}, {Dense}, {Dense, Adapter}, {Adapter}]
    y = tiny.logits(model, tiny.batch())
    for phase in drt.plan.phases:
        drt.apply(phase.start)
        assert (tiny.logits(model, tiny.batch()) - y).norm() <= 1e-5 * y.norm()
    assert "14 of 14 layers are dense, since their rank would reach break-even" in caplog.text


def trainer(folder, resume=None, schedule=DOWN, cls=DRTTrainer, **changes) -> Trainer:
    settings = {"max_steps": 6, "drt_export": "native", "drt_schedule": schedule, "warmup_steps": 1,
                "gradient_accumulation_steps": 1, "drt_rank_multiple": 2}  # fmt: skip
    made = tiny.trainer(folder, cls=cls, **settings | changes)
    made.train(resume_from_checkpoint=resume)
    return made


def resumes_to_the_bit(folder, schedule: str, straight: Trainer) -> None:
    """From checkpoints at the end of a level, within one, and at an end again."""
    starts = [phase.start for phase in straight.drt.plan.phases]
    assert len(starts) == 3
    for step in (starts[1], starts[1] + 1, starts[2]):
        checkpoint = str(folder / f"a/checkpoint-{step}")
        assert_equal_runs(trainer(folder / "b", checkpoint, schedule), straight)


@pytest.fixture(scope="module")
def down(tmp_path_factory):
    folder = tmp_path_factory.mktemp("down")
    return folder, trainer(folder / "a", save_strategy="steps", save_steps=1)


def test_a_resumed_run_has_the_same_bits_from_within_a_level_and_from_a_change(down):
    resumes_to_the_bit(down[0], DOWN, down[1])


@pytest.mark.slow
def test_so_has_one_whose_rank_grows(tmp_path):
    resumes_to_the_bit(tmp_path, UP, trainer(tmp_path / "a", schedule=UP, save_strategy="steps", save_steps=1))


def test_the_log_says_that_the_function_was_kept(down):
    rows = [row for row in down[1].state.log_history if "drt_function_error" in row]
    assert [row["drt_phase"] for row in rows] == [1, 2]
    assert max(row["drt_function_error"] for row in rows) <= 1e-5
    assert max(row["drt_truncation_error"] for row in rows) <= 1e-6


def test_the_callback_in_a_plain_trainer_gives_the_same_weights(down, tmp_path):
    callback = DRTCallback(DRTConfig(schedule=DOWN, rank_multiple=2))
    arguments = tiny.arguments(
        tmp_path, max_steps=6, warmup_steps=1, gradient_accumulation_steps=1, drt_schedule=None
    )  # fmt: skip
    plain = Trainer(
        tiny.llama(attention_dropout=0.1), arguments, train_dataset=tiny.dataset(), callbacks=[callback]
    )  # fmt: skip
    plain.train()
    assert not any(isinstance(module, AdapterLinear) for module in plain.model.modules())
    expected = dense_state_dict(down[1].model)
    assert {
        name for name, weight in plain.model.state_dict().items() if not torch.equal(weight, expected[name])
    } == set()


def test_the_command_line_takes_it():
    flags = ["--output_dir", "out", "--drt_schedule", "drift(first=0.4, last=0.1, shape=cosine)", "--use_cpu"]
    (arguments,) = HfArgumentParser(DRTTrainingArguments).parse_args_into_dataclasses(flags)
    config = DRTConfig.from_prefixed(arguments)
    assert (config.schedule, config.adapter_init, config.moments) == (flags[3], "split", "project")
    flags += ["--drt_moments", "reset", "--drt_adapter_init", "split"]
    (arguments,) = HfArgumentParser(DRTTrainingArguments).parse_args_into_dataclasses(flags)
    assert DRTConfig.from_prefixed(arguments).moments == "reset"
