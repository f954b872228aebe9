"""Runs whose adapters keep their bases in fewer bits: what a switch keeps, what is told, and that they resume."""

import io
import json

import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from transformers import AutoModelForCausalLM

from hf_drt import DRTConfig, DynamicRank, dense_state_dict
from hf_drt.ema import EMA
from hf_drt.export import save_peft_adapter
from hf_drt.forms import Adapter, AdapterLinear, Dense, FrozenLinear, effective_weight, form_of, layer_of
from hf_drt.inspect import read_checkpoint
from hf_drt.optim import refuse_sharded
from hf_drt.planning import description
from hf_drt.simulate import batch_spec, estimate_run

DRIFT = "drift(first=0.45,last=0.125,shape=linear,levels=4)"
STEPS = 8
SCHEDULES = {
    "split": {"schedule": DRIFT},
    "anew": {"schedule": "adapter@0 adapter@3 dense@6"},
    "between": {"schedule": "dense@0 adapter@3 factored@6", "adapter_init": "principal", "moments": "project"},
}
ERRORS = {"bfloat16": 2**-8, "int8": 0.01}  # relative, of a weight by rounding
dtypes = pytest.mark.parametrize("dtype", ERRORS)
one_is_slow = pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
QUICK = {("split", "bfloat16"), ("anew", "int8")}
RUNS = [
    pytest.param(kind, dtype, marks=() if (kind, dtype) in QUICK else pytest.mark.slow)
    for kind in SCHEDULES
    for dtype in ERRORS
]


class Loop:
    def __init__(self, dtype, model=None, steps=STEPS, **settings):
        self.model = model or tiny.llama()
        ranks = {} if settings["schedule"] == DRIFT else {"rank": 4}
        config = DRTConfig(
            rank_multiple=1 if settings["schedule"] == DRIFT else 8, frozen_dtype=dtype, **ranks, **settings
        )
        self.drt = DynamicRank(self.model, config, steps)
        self.drt.apply(0)
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-2)
        self.transitions = []

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: effective_weight(layer_of(self.model, name)).double() for name in self.drt.targets}

    def bases(self) -> list[AdapterLinear]:
        layers = (layer_of(self.model, name) for name in self.drt.targets)
        return [layer for layer in layers if isinstance(layer, AdapterLinear)]

    def step(self, step: int) -> None:
        if transition := self.drt.begin_step(step, self.optimizer):
            self.transitions.append(transition)
        self.model.train()
        self.model(**tiny.batch()).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, begin=0, end=STEPS) -> "Loop":
        for step in range(begin, end):
            self.step(step)
        return self

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save([self.drt.state_dict(), self.model.state_dict(), self.optimizer.state_dict()], file)
        return file.getvalue()

    def resume(self, state: bytes) -> "Loop":
        drt, model, optimizer = torch.load(io.BytesIO(state), weights_only=False)
        self.drt.load_state_dict(json.loads(json.dumps(drt)), self.optimizer)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return self


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("kind", "dtype"), RUNS)
def test_a_loop_resumes_to_the_bit_from_every_step(kind, dtype):
    whole, states = Loop(dtype, **SCHEDULES[kind]), []
    for step in range(STEPS):
        whole.step(step)
        states.append(whole.saved())
    for step in (1, 3, 6):
        other = Loop(dtype, **SCHEDULES[kind]).resume(states[step]).run(step + 1)
        torch.testing.assert_close(other.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(other.optimizer.state_dict(), whole.optimizer.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"frozen_dtype is None here, and '{dtype}' in the state"):
        Loop(None, **SCHEDULES[kind]).resume(states[1])


@dtypes
def test_under_drift_each_change_of_rank_rounds_once_and_is_told(dtype):
    """W after each of three changes against W before: off by the rounding of the base, which the transition says."""
    loop, kept, total = Loop(dtype, schedule=DRIFT), [], {}
    for step in range(STEPS):
        before = loop.weights()
        if transition := loop.drt.begin_step(step, loop.optimizer):
            after = loop.weights()
            errors = {name: relative(after[name], W) for name, W in before.items()}
            assert 0 < max(errors.values()) <= 1.0001 * transition.rounding_error <= ERRORS[dtype]
            assert 0 < transition.merge_error < 0.05
            assert transition.truncation_error <= 1e-6  # what leaves the factors is handed over, not lost
            kept.append(max(errors.values()))
            for name, W in before.items():
                total[name] = total.get(name, 0) + after[name] - W
        loop.step(step)
    assert len(kept) == 3
    # independent roundings add up as the root of their number, and no faster
    final = loop.weights()
    assert max((total[n].norm() / final[n].norm()).item() for n in total) <= 1.5 * max(kept) * 3**0.5
    assert [base.base.dtype for base in loop.bases()] == [getattr(torch, dtype)] * len(loop.drt.targets)


@dtypes
def test_back_to_dense_the_function_is_kept_and_the_first_digits_do_not_come_back(dtype):
    loop = Loop(dtype, schedule="dense@0 adapter@3 dense@6")
    switches = 0
    for step in range(STEPS):
        before, logits = loop.weights(), tiny.logits(loop.model, tiny.batch())
        transition = loop.drt.begin_step(step, loop.optimizer)
        worst = max(relative(loop.weights()[name], W) for name, W in before.items())
        if transition and step == 3:
            assert 0 < worst == pytest.approx(transition.rounding_error, rel=1e-4)
        elif transition:
            assert worst <= 1e-6
            assert transition.rounding_error == 0.0
            assert (tiny.logits(loop.model, tiny.batch()) - logits).norm() <= 1e-5 * logits.norm()
        switches += transition is not None
        loop.step(step)
    assert switches == 2
    layers = [layer_of(loop.model, name) for name in loop.drt.targets]
    assert {(form_of(layer), layer.weight.dtype) for layer in layers} == {(Dense(), torch.float32)}


@dtypes
def test_a_loss_that_is_large_is_warned_of(dtype, caplog):
    loop = Loop(dtype, schedule="adapter@0 adapter@50%")
    for group in loop.optimizer.param_groups:
        group["lr"] = 1e-6
    loop.run()
    assert loop.transitions[0].merge_error > 0.1
    way = "Take bfloat16, or no frozen_dtype" if dtype == "int8" else "Take no frozen_dtype"
    assert f"update step 4: rounding to frozen_dtype={dtype} loses " in caplog.text
    assert f"{way}, or fewer switches." in caplog.text


def test_layers_that_are_frozen_whole_and_bases_share_the_setting():
    loop = Loop("bfloat16", schedule="adapter@0 dense[1/2]@2 dense[2/2]+frozen[1/2]@4")
    assert {base.base.dtype for base in loop.bases()} == {torch.bfloat16}
    loop.run()
    assert any(isinstance(layer_of(loop.model, name), FrozenLinear) for name in loop.drt.targets)


@dtypes
def test_the_plan_says_it_and_convolutions_keep_theirs(dtype):
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="adapter@0 adapter@50%", rank=4, frozen_dtype=dtype), 4)
    line = f"frozen bases: those of 14 layers in {dtype}, rounded as each of 2 phases begins"
    assert line in list(description(drt.resolved))
    vit = DynamicRank(tiny.vit(), DRTConfig(schedule="adapter@0", rank=4, frozen_dtype=dtype), 4)
    assert "rounded as their phase begins" in "\n".join(description(vit.resolved))
    experts = DynamicRank(tiny.mixtral(), DRTConfig(schedule="adapter@0", rank=4, frozen_dtype=dtype), 4)
    forms = {name: form.dtype for name, form in experts.forms(0).items() if isinstance(form, Adapter)}
    assert {dtype for name, dtype in forms.items() if "experts" in name} == {None}
    assert {dtype for name, dtype in forms.items() if "experts" not in name} == {dtype}


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        (
            "dense@0 frozen@50%",
            {},
            r"frozen_dtype=int8 is for the bases of adapters, and the schedule freezes layers wh",
        ),
        ("adapter@0 dense[1/2]+frozen[2/2]@50%", {}, r"and would lose at each time .* Take frozen_dtype=bfloat16"),
        ("factored@0 dense@50%", {}, r"only frozen and adapter phases keep weights frozen, and there is none"),
    ],
)
def test_int8_is_refused_where_it_is_for_nothing(schedule, settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.llama(), DRTConfig(schedule=schedule, rank=4, frozen_dtype="int8", **settings), 4)


def test_bases_of_convolutions_alone_are_refused():
    with pytest.raises(ValueError, match=r"frozen convolutions and experts, and the bases of theirs, are kept as they"):
        DynamicRank(tiny.resnet(), DRTConfig(schedule="adapter@0", frozen_dtype="int8"), 4)


def test_int8_without_torchao_is_refused_before_a_run(monkeypatch):
    monkeypatch.setattr("hf_drt.forms.kept.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"int8 bases are quantized by torchao, which is not installed\. pip install"):
        DynamicRank(tiny.llama(), DRTConfig(schedule="adapter@0", rank=4, frozen_dtype="int8"), 4)


def test_int8_under_fsdp_is_refused():
    with pytest.raises(
        ValueError, match=r"frozen_dtype=int8 keeps codes and a scale .* and FSDP shards them apart, whic"
    ):
        refuse_sharded(DRTConfig(schedule="adapter@0", frozen_dtype="int8"))
    refuse_sharded(DRTConfig(schedule="adapter@0", frozen_dtype="bfloat16"))


@dtypes
def test_an_average_follows_the_effective_weights(dtype):
    loop = Loop(dtype, schedule="adapter@0 dense@50%")
    ema = EMA(loop.model, decay=0.5)
    name = next(iter(loop.drt.targets))
    expected = loop.weights()[name]
    for step in range(STEPS):
        loop.step(step)
        ema.update()
        keep = ema.decay.at(ema.updates)
        expected = keep * expected + (1 - keep) * loop.weights()[name]
        with ema.averaged():
            shown = layer_of(loop.model, name).weight
            assert shown.dtype == torch.float32
            assert relative(shown.double(), expected) < 1e-5


# ---- memory


def bytes_held(model: torch.nn.Module) -> int:
    """Of all parameters and buffers that exist, each storage once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def test_the_plan_counts_what_the_tensors_of_each_phase_take():
    weights = {}
    for dtype in (None, *ERRORS):
        settings = DRTConfig(schedule="dense@0 adapter@50%", rank=4, frozen_dtype=dtype)
        with torch.device("meta"):
            model = tiny.llama()
        estimate = estimate_run(DynamicRank(model, settings, 4), batch_spec(model, 2, 8))
        real = tiny.llama()
        drt, steps = DynamicRank(real, settings, 4), [phase.step for phase in estimate.phases]
        for index, step in enumerate(steps):
            drt.apply(2 * index)
            assert step.weights == bytes_held(real)
            trained = [p for p in real.parameters() if p.requires_grad]
            assert step.trainable == sum(p.numel() for p in trained)
            assert step.gradients == sum(p.nbytes for p in trained)
        weights[dtype] = steps[1].weights
    shapes = list(drt.targets.values())
    numbers, rows = sum(m * n for m, n in shapes), sum(m for m, _ in shapes)
    assert weights[None] - weights["bfloat16"] == 2 * numbers
    assert weights[None] - weights["int8"] == 3 * numbers - 4 * rows


# ---- files


@one_is_slow
def test_files_of_every_kind_hold_what_the_model_computes(tmp_path, dtype):
    """Dense ones load without this package; those of PEFT hold the base as it is computed with, in float32."""
    loop = Loop(dtype, schedule="adapter@0").run()
    model, batch = loop.model, tiny.batch()
    expected = tiny.logits(model, batch)
    state = dense_state_dict(model)
    assert {value.dtype for value in state.values()} == {torch.float32}
    plain = tiny.llama()
    plain.load_state_dict(state)
    assert (tiny.logits(plain, batch) - expected).abs().max() <= 1e-5
    peft = pytest.importorskip("peft")
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    wrapped = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert (tiny.logits(wrapped, batch) - expected).abs().max() <= 1e-5


@one_is_slow
def test_a_trainer_resumes_to_the_bit_logs_the_rounding_and_its_native_model_loads(tmp_path, dtype):
    settings = {"max_steps": 6, "drt_schedule": "dense@0 adapter@2 adapter@4", "drt_rank": 4, "drt_frozen_dtype": dtype,
                "drt_export": "native", "gradient_accumulation_steps": 1}  # fmt: skip
    whole = tiny.trainer(tmp_path / "a", save_strategy="steps", save_steps=1, **settings)
    whole.train()
    rows = [row for row in whole.state.log_history if "drt_switch_seconds" in row]
    assert ["drt_rounding_error" in row for row in rows] == [False, True, True]
    assert all(0 < row["drt_rounding_error"] <= ERRORS[dtype] for row in rows[1:])
    for step in (3, 5):
        other = tiny.trainer(tmp_path / "b", **settings)
        other.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal_runs(other, whole)
    whole.save_model(str(tmp_path / "native"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    for name in whole.drt.targets:
        mine, theirs = (layer_of(model, name) for model in (loaded, whole.model))
        assert form_of(mine) == form_of(theirs)
        assert {n: (p.dtype, p.requires_grad) for n, p in mine.named_parameters()} == {
            n: (p.dtype, p.requires_grad) for n, p in theirs.named_parameters()
        }
    assert torch.equal(tiny.logits(loaded, tiny.batch()), tiny.logits(whole.model, tiny.batch()))
    found = read_checkpoint(tmp_path / "native")
    for layer in found.layers:
        W = effective_weight(layer_of(loaded, layer.name))
        assert torch.allclose(layer.matrix(), W, atol=1e-6)
