"""fp16 with a gradient scaler through every switch, in a hand-written loop; torch's scaler works on a CPU too."""

import contextlib

import pytest
import tiny
import torch
from accelerate import Accelerator
from torch.multiprocessing.reductions import StorageWeakRef

from hf_drt import DRTConfig, DynamicRank

STEPS, SWITCHES = 12, (3, 6, 9)
SCHEDULE = "factored@0 dense@3 adapter@6 factored@9"
# the first update of a phase, two in a row, a whole end of a phase with the switch after it
POISONED = {3, 7, 8, 9}
SCALE, INTERVAL, RATE, WARM_UP = 1024.0, 3, 1e-2, 2


class Loop:
    """As the README writes it, with scaling; an update is poisoned by one infinite gradient.

    Args:
        scaled: With a GradScaler; else poisoned updates are left out by hand.
        autocast: In fp16.
        wrapped: The optimizer and the scaler as the Trainer has them, in Accelerate's wrapper.
    """

    def __init__(self, scaled=True, autocast=True, wrapped=False, moments="reset", fused=False):
        settings = {"factored_lr_scale": 2.0, "frobenius_decay": not fused, "rewarmup_steps": WARM_UP}
        config = DRTConfig(schedule=SCHEDULE, rank=4, moments=moments, rewarmup_start=0.5, **settings)
        self.model = tiny.llama()
        self.drt = DynamicRank(self.model, config, max_steps=STEPS)
        self.drt.apply(0)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.inner = self.optimizer = torch.optim.AdamW(trained, lr=RATE, fused=fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=INTERVAL, enabled=scaled)
        if wrapped:
            accelerator = Accelerator(cpu=True)
            accelerator.scaler = self.scaler
            self.optimizer = accelerator.prepare(self.inner)
        self.wrapped, self.scaled, self.autocast = wrapped, scaled, autocast
        self.rows, self.rates = [], {}

    def run(self) -> "Loop":
        for step in range(STEPS):
            old = storages(p for name in self.drt.targets for p in self.model.get_submodule(name).parameters())
            self.drt.begin_step(step, self.optimizer)
            kept = {StorageWeakRef(p.untyped_storage()) for p in self.model.parameters()}
            alive = [not one.expired() for one in old if one not in kept]
            if step == 0:
                self.inner.register_step_pre_hook(lambda *_: self.note_rates())
            self.rows.append({"alive": alive, "before": self.bits()})
            self.update(step)
            self.rows[-1] |= {"after": self.bits()}
        return self

    def update(self, step: int) -> None:
        context = torch.autocast("cpu", torch.float16) if self.autocast else contextlib.nullcontext()
        with context:
            output = self.model(**tiny.batch())
        self.scaler.scale(output.loss).backward()
        if step in POISONED:
            next(p for p in self.inner.param_groups[0]["params"] if p.grad is not None).grad[0] = float("inf")
        if self.wrapped:
            self.optimizer.step()
        elif self.scaled:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif step not in POISONED:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.rows[-1] |= {"dtype": output.logits.dtype, "loss": output.loss.item()}
        if self.scaled:
            scale, good = self.scaler.get_scale(), self.scaler._get_growth_tracker()
            self.rows[-1] |= {"scale": scale, "good": good, "stale": len(self.scaler._per_optimizer_states)}

    def note_rates(self) -> None:
        groups = (group for group in self.inner.param_groups if group["params"])  # empty ones train nothing
        self.rates[len(self.rows) - 1] = {group.get("drt_form"): group["lr"] for group in groups}

    def bits(self) -> list[torch.Tensor]:
        """Weights, rates and moments; but for moments of 0, which a fused optimizer makes before it looks for inf."""
        state = [v for of in self.inner.state.values() for v in of.values() if v.any()]
        rates = [torch.tensor(group["lr"]) for group in self.inner.param_groups]
        return [part.detach().clone() for part in (*self.model.state_dict().values(), *state, *rates)]


def storages(tensors) -> set[StorageWeakRef]:
    """Of the tensors and their gradients."""
    return {StorageWeakRef(t.untyped_storage()) for p in tensors for t in (p, p.grad) if t is not None}


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.fixture(scope="module", params=["reset", "project"])
def moments(request):
    return request.param


@pytest.fixture(scope="module")
def loop(moments):
    return Loop(moments=moments).run()


def test_the_forward_pass_is_in_fp16_and_training_goes_on(loop):
    assert {row["dtype"] for row in loop.rows} == {torch.float16}
    assert loop.rows[-1]["loss"] < loop.rows[0]["loss"] - 0.1
    assert loop.drt.phase == 3


def test_scale_and_growth_tracker_know_nothing_of_switches(loop):
    scale, good = SCALE, 0
    for step, row in enumerate(loop.rows):
        scale, good = (scale / 2, 0) if step in POISONED else (scale, good + 1)
        if good == INTERVAL:
            scale, good = scale * 2, 0
        assert (row["scale"], row["good"]) == (scale, good), step


def test_a_poisoned_update_leaves_weights_moments_and_rates_as_they_were(loop):
    for step, row in enumerate(loop.rows):
        assert equal(row["before"], row["after"]) == (step in POISONED), step


def test_the_rules_around_a_step_run_only_if_it_is_made(loop):
    """Within a step: rates by form, ramped up after a switch."""
    assert set(loop.rates) == set(range(STEPS)) - POISONED
    for step, rates in loop.rates.items():
        since = step - max((at for at in SWITCHES if at <= step), default=-WARM_UP)
        ramp = min(0.5 + 0.5 * since / WARM_UP, 1.0)
        expected = {None: pytest.approx(RATE * ramp), "factored": pytest.approx(2 * RATE * ramp)}
        factored = loop.drt.plan.phases[loop.drt.plan.index_at(step)].kind == "factored"
        assert rates == (expected if factored else {None: expected[None]}), step


def test_nothing_stale_stays_in_the_scaler_or_of_the_old_weights_and_gradients(loop):
    assert [row["stale"] for row in loop.rows] == [0] * STEPS
    for step in SWITCHES:
        assert len(loop.rows[step]["alive"]) >= 14
        assert not any(loop.rows[step]["alive"]), step


def test_scaling_by_powers_of_two_changes_no_bit_of_float32_training(moments):
    """What the scaler skips and scales is compared with a loop that leaves the poisoned updates out."""
    scaled = Loop(autocast=False, moments=moments).run()
    plain = Loop(scaled=False, autocast=False, moments=moments).run()
    for step in range(STEPS):
        assert equal(scaled.rows[step]["after"], plain.rows[step]["after"]), step


def test_accelerates_wrapper_makes_the_same_updates(loop, moments):
    wrapped = Loop(wrapped=True, moments=moments).run()
    for step in range(STEPS):
        assert equal(wrapped.rows[step]["after"], loop.rows[step]["after"]), step
    assert wrapped.rates == loop.rates


def test_a_fused_optimizer_that_skips_by_itself_leaves_everything_as_it_was():
    """It is always called, hooks included, and its kernel finds the infinite gradient. Without Frobenius decay, which
    such a hook applies."""
    fused = Loop(fused=True).run()
    for step, row in enumerate(fused.rows):
        assert equal(row["before"], row["after"]) == (step in POISONED), step
