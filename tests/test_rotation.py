"""Full rank in turns in a hand-written loop: who is touched, what is trained, and that it resumes to the bit."""

import copy
import gc
import io
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank, Plan, Schedule
from hf_drt.forms import Adapter, Dense, Factored, form_of, trainable_weights
from hf_drt.schedule import Group, Part, Phase, Run
from hf_drt.simulate import StepCounter

STEPS = 12
LAYERS = ["q_proj", "up_proj"]  # of each block, that change form
EIGHT = "rotate(groups=8,share=80)"
BATCHES = [
    {"input_ids": ids, "labels": ids}
    for ids in torch.randint(1, tiny.VOCAB, (STEPS, 4, tiny.LENGTH), generator=torch.Generator().manual_seed(3))
]


def small() -> nn.Module:
    return tiny.llama(num_hidden_layers=8, hidden_size=16, intermediate_size=32)


class Loop:
    """A model of eight blocks, its controller and its optimizer, and a run of them."""

    def __init__(self, schedule: str | Plan, optimizer=torch.optim.AdamW, **settings):
        self.model, settings = small(), {"include": LAYERS} | settings
        if isinstance(schedule, Plan):
            self.drt = DynamicRank(self.model, DRTConfig(**settings), plan=schedule)
        else:
            self.drt = DynamicRank(self.model, DRTConfig(schedule=schedule, **settings), STEPS)
        self.drt.apply(0)
        self.optimizer = optimizer((p for p in self.model.parameters() if p.requires_grad), lr=1e-2)
        self.transitions = []

    def step(self, step: int) -> None:
        if (transition := self.drt.begin_step(step, self.optimizer)) is not None:
            self.transitions.append(transition)
        self.model(**BATCHES[step % STEPS]).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, begin: int = 0, end: int = STEPS) -> "Loop":
        for step in range(begin, end):
            self.step(step)
        return self

    def layers(self, *numbers: int, of: int = 8) -> list[nn.Module]:
        groups = self.drt.resolved.groups(of)
        return [self.drt._layer(name) for name, number in groups.items() if number in numbers]

    def forms(self) -> dict:
        return {name: form_of(self.drt._layer(name)) for name in self.drt.targets}


def saved(loop: Loop) -> bytes:
    file = io.BytesIO()
    state = {"drt": loop.drt.state_dict(), "model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict()}
    torch.save(state, file)
    return file.getvalue()


def resumed(state: bytes, *args, **settings) -> Loop:
    loop = Loop(*args, **settings)
    state = torch.load(io.BytesIO(state), weights_only=False)
    loop.drt.load_state_dict(state["drt"], loop.optimizer)
    loop.model.load_state_dict(state["model"])
    loop.optimizer.load_state_dict(state["optimizer"])
    return loop


def assert_same(one: Loop, other: Loop) -> None:
    for mine, theirs in ((one.model, other.model), (one.optimizer, other.optimizer)):
        torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert one.forms() == other.forms()


# ---- resume


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("schedule", "settings"),
    [
        (EIGHT, {}),
        ("rotate(groups=8,share=80,order=need)", {"frozen_dtype": "bfloat16", "moments": "project"}),
        ("rotate(groups=4,share=80,order=need,after=lowrank,rounds=2)", {"moments": "reset"}),
        ("rotate(groups=4,share=80,order=random,after=adapter,seed=2)", {"adapter_init": "principal"}),
    ],
    ids=["frozen", "need", "rounds", "adapter"],
)
def test_resume_is_bitwise_equal_at_every_step(schedule, settings):
    loop, states = Loop(schedule, rank=4, **settings), []
    for step in range(STEPS):
        loop.step(step)
        states.append(saved(loop))
    for step, state in enumerate(states[:-1]):
        other = resumed(state, schedule, rank=4, **settings).run(step + 1)
        assert_same(other, loop)
        assert str(other.drt.plan) == str(loop.drt.plan)
        assert other.drt.state_dict() == loop.drt.state_dict()


def test_a_state_of_other_turns_is_refused():
    loop = Loop("rotate(groups=4,share=80,order=need)", rank=4).run()
    state = loop.drt.state_dict()
    with pytest.raises(ValueError, match=r"the plan has changed: the state is of 'factored@0 dense\[\d/4\]@"):
        Loop("rotate(groups=4,share=80,after=factored)", rank=4).drt.load_state_dict(state)
    with pytest.raises(ValueError, match=r"group_by is \['0\|1', .*\] here, and None in the state"):
        Loop("rotate(groups=4,share=80,order=need)", rank=4, group_by=["0|1", "2|3", "4|5", ""]).drt.load_state_dict(
            state
        )
    with pytest.raises(ValueError, match=r"frozen_dtype is 'bfloat16' here, and None in the state"):
        Loop("rotate(groups=4,share=80,order=need)", rank=4, frozen_dtype="bfloat16").drt.load_state_dict(state)


def test_a_state_whose_turns_no_run_has_decided_is_refused_where_the_run_decides():
    state = Loop("rotate(groups=4,share=80)", rank=4).run(end=7).drt.state_dict()
    with pytest.raises(ValueError, match=r"the plan has changed: .* this run of 'factored@0 dense\[next/4\]@2"):
        Loop("rotate(groups=4,share=80,order=need)", rank=4).drt.load_state_dict(state)


def test_blocks_are_the_groups_where_nothing_is_said():
    state = Loop("rotate(groups=4,share=80)", rank=4).run(end=7).drt.state_dict()
    other = Loop("rotate(groups=4,share=80)", rank=4, group_by="block")
    other.drt.load_state_dict(state)
    assert other.drt.state_dict() == state


def test_an_optimizer_without_the_frozen_weights_is_refused():
    loop = Loop("rotate(groups=4,share=80)", rank=4).run(end=8)
    frozen = torch.optim.AdamW(p for p in loop.model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"the weight of .* is frozen in this phase, and not in the optimizer, in whi"):
        loop.drt.begin_step(8, frozen)
    loop.drt.begin_step(8, torch.optim.AdamW(loop.model.parameters()))


# ---- independent calculations


def test_a_rotation_of_all_groups_at_once_is_the_plan_of_whole_phases():
    whole = Loop("factored@0 dense@50% factored@75%", rank=4).run()
    text = "factored@0 dense[1/2]+dense[2/2]@50% factored[1/2]+factored[2/2]@75%"
    assert_same(Loop(text, rank=4).run(), whole)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
@pytest.mark.parametrize("moments", ["reset", "project"])
def test_frozen_layers_are_those_of_a_plain_loop_that_sets_requires_grad(optimizer, moments):
    loop = Loop("dense@0 frozen[1/4]@25% frozen[2/4]+frozen[3/4]@50%", optimizer=optimizer, moments=moments).run()
    model = small()
    plain = optimizer(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for name, number in loop.drt.resolved.groups(4).items():
            if step == {1: 3, 2: 6, 3: 6}.get(number):
                model.get_submodule(name).weight.requires_grad_(False)
        model(**BATCHES[step]).loss.backward()
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(loop.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_weight_that_is_trained_again_begins_with_new_moments():
    loop = Loop("dense@0 frozen[1/2]@25% dense[1/2]@50%", moments="project").run()
    model = small()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        for name, number in loop.drt.resolved.groups(2).items():
            if number == 1 and step in (3, 6):
                model.get_submodule(name).weight.requires_grad_(step == 6)
                plain.state.pop(model.get_submodule(name).weight, None)
        model(**BATCHES[step]).loss.backward()
        plain.step()
        plain.zero_grad()
    torch.testing.assert_close(loop.model.state_dict(), model.state_dict(), rtol=0, atol=0)


# ---- what a switch does


@pytest.mark.parametrize("after", ["frozen", "adapter", "factored"])
@pytest.mark.parametrize("moments", ["reset", "project"])
def test_a_switch_touches_the_named_layers_alone(after, moments):
    loop = Loop(f"rotate(groups=8,share=80,after={after})", rank=4, moments=moments)
    for step in range(STEPS):
        phase, index = loop.drt.phase, loop.drt.plan.index_at(step)
        named = loop.drt.resolved.parts(index) if index != phase else {}
        others = [name for name in loop.drt.targets if name not in named]
        before = [(id(loop.drt._layer(n)), [id(p) for p in loop.drt._layer(n).parameters()]) for n in others]
        values = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
        states = {id(p): copy.deepcopy(state) for p, state in loop.optimizer.state.items()}
        transition = loop.drt.begin_step(step, loop.optimizer)
        assert (transition.layers if transition else 0) == (len(named) if index else 0)
        assert before == [(id(loop.drt._layer(n)), [id(p) for p in loop.drt._layer(n).parameters()]) for n in others]
        for name in others:
            for leaf, p in loop.drt._layer(name).named_parameters():
                assert torch.equal(p, values[f"{name}.{leaf}"])
                for key, value in loop.optimizer.state.get(p, {}).items():
                    assert torch.equal(value, states[id(p)][key])
        loop.step(step)
    assert len(loop.drt.plan) == 9


@pytest.mark.parametrize("moments", ["reset", "project"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_frozen_layers_have_no_gradient_and_no_state_and_keep_their_places(moments, dtype):
    loop = Loop("rotate(groups=3,share=80,rounds=2)", rank=4, moments=moments, frozen_dtype=dtype)
    for step in range(STEPS):
        loop.drt.begin_step(step, loop.optimizer)
        held = loop.optimizer.param_groups[0]["params"]
        order = [p for p in loop.model.parameters() if p.requires_grad or id(p) in {id(q) for q in held}]
        assert [id(p) for p in held] == [id(p) for p in order]
        owned = {id(w) for name in loop.drt.targets for w in trainable_weights(loop.drt._layer(name))}
        assert owned <= {id(p) for p in held}
        loop.model(**BATCHES[step]).loss.backward()
        frozen = [n for n, form in loop.forms().items() if isinstance(form, Dense) and form.frozen]
        weights = [w for name in frozen for w in trainable_weights(loop.drt._layer(name))]
        assert all(w.grad is None and not loop.optimizer.state.get(w) for w in weights)
        assert all(p.grad is not None for p in held if p.requires_grad)
        before = [w.detach().clone() for w in weights]
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=step % 2 == 0)
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert frozen


def test_weight_decay_leaves_frozen_weights_alone_where_gradients_are_set_to_zero():
    loop = Loop("dense@0 frozen[1/2]@50%")
    for group in loop.optimizer.param_groups:
        group["weight_decay"] = 0.5
    for step in range(STEPS):
        loop.drt.begin_step(step, loop.optimizer)
        if step == 6:
            before = [layer.weight.detach().clone() for layer in loop.layers(1, of=2)]
        loop.model(**BATCHES[step]).loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(loop.layers(1, of=2), before, strict=True))


def test_a_group_that_is_named_again_in_low_rank_restarts_and_others_do_not():
    loop = Loop("adapter@0 adapter[1/2]@50%", rank=4).run(end=6)
    kept = {id(layer) for layer in loop.layers(2, of=2)}
    loop.drt.begin_step(6, loop.optimizer)
    assert {id(layer) for layer in loop.layers(2, of=2)} == kept
    assert all(not layer.lora_B.any() for layer in loop.layers(1, of=2))
    assert all(layer.lora_B.any() for layer in loop.layers(2, of=2))


def test_a_rank_of_its_own_is_of_the_named_group():
    loop = Loop("factored@0 factored:2[1/2]+adapter:3[2/2]@50%", rank=4).run()
    assert {form_of(layer) for layer in loop.layers(1, of=2)} == {Factored(2)}
    assert {form_of(layer) for layer in loop.layers(2, of=2)} == {Adapter(3)}


def test_the_group_that_has_lost_most_effective_rank_is_next():
    loop = Loop("rotate(groups=4,share=50,order=need)", rank=4)
    start = loop.drt.effective_ranks()
    with torch.no_grad():  # group 3 loses a direction
        for layer in loop.layers(3, of=4):
            layer.U[:, -1] = 0
    loop.run(end=7)
    row = loop.drt.turns.trace[0]
    assert (row["group"], row["phase"], row["step"]) == (3, 1, 6)
    assert loop.drt.turns.reference == start
    assert max(row["needs"], key=row["needs"].get) == "3"
    assert str(loop.drt.plan).startswith("factored@0 dense[3/4]@6 dense[next/4]+frozen[last/4]@")
    assert {form_of(layer) for layer in loop.layers(3, of=4)} == {Dense()}


@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_weight_that_is_no_number_is_named_where_the_need_is_measured(step):
    loop = Loop("rotate(groups=4,share=80,order=need)", rank=4).run(end=step)
    name = next(name for name in loop.drt.targets if form_of(loop.drt._layer(name)) == Factored(4))
    with torch.no_grad():
        trainable_weights(loop.drt._layer(name))[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match=rf"the effective rank of {name}: .* holds inf or nan\. The training has div"):
        loop.step(step)


def test_layers_that_begin_at_zero_have_no_need_of_their_own():
    model = tiny.llama()
    for name, p in model.named_parameters():
        if "o_proj" in name:
            nn.init.zeros_(p)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 dense[next/2]@50%"), 2)
    drt.apply(0)
    drt.apply(1)
    assert all(abs(need) < 1e-6 for need in drt.turns.trace[0]["needs"].values())


def test_phases_that_are_skipped_are_decided_too():
    loop = Loop("rotate(groups=4,share=80,order=need)", rank=4)
    loop.drt.apply(STEPS - 1, loop.optimizer)
    assert sorted(row["group"] for row in loop.drt.turns.trace) == [1, 2, 3, 4]
    assert "next" not in str(loop.drt.plan)
    assert loop.forms() == dict(loop.drt.forms(4))


def test_to_dense_trains_on_with_the_optimizer():
    for dtype in (None, "bfloat16"):
        loop = Loop(EIGHT, rank=4, frozen_dtype=dtype).run(end=8)
        expected = tiny.logits(loop.model, tiny.batch())
        loop.drt.to_dense(loop.optimizer)
        assert (tiny.logits(loop.model, tiny.batch()) - expected).abs().max() <= 1e-5
        assert set(loop.forms().values()) == {Dense()}
        fresh = list(small().named_parameters())
        found = list(loop.model.named_parameters())
        assert [(n, p.dtype, p.shape) for n, p in found] == [(n, p.dtype, p.shape) for n, p in fresh]
        held = loop.optimizer.param_groups[0]["params"]
        assert [id(p) for p in held] == [id(p) for p in loop.model.parameters()]
        loop.model.train()
        loop.model(**tiny.batch()).loss.backward()
        assert all(p.requires_grad and p.grad is not None for p in held)
        loop.optimizer.step()


def test_a_failed_switch_leaves_all_as_it_was():
    loop = Loop("factored@0 dense[next/2]@50%", rank=4).run(end=6)
    with torch.no_grad():
        for layer in loop.layers(1, 2, of=2):
            layer.U[0, 0] = torch.nan
    weights, forms, held = (
        copy.deepcopy(loop.model.state_dict()),
        loop.forms(),
        loop.optimizer.param_groups[0]["params"],
    )
    with pytest.raises(ValueError, match="holds inf or nan"):
        loop.drt.begin_step(6, loop.optimizer)
    assert loop.forms() == forms
    assert loop.optimizer.param_groups[0]["params"] is held
    torch.testing.assert_close(loop.model.state_dict(), weights, rtol=0, atol=0, equal_nan=True)


def test_different_divisions_follow_each_other():
    loop = Loop("factored@0 dense[1/2]@20% frozen[1/4]@40% dense[3/4]@60% frozen[8/8]@80%", rank=4).run()
    kinds = [str({form_of(layer) for layer in loop.layers(n)}) for n in range(1, 9)]
    frozen, dense, low = "{Dense(frozen=True)}", "{Dense()}", "{Factored(rank=4)}"
    assert kinds == [frozen, frozen, dense, dense, dense, dense, low, frozen]


def test_a_plan_by_hand_is_run_as_its_text():
    text = "factored@0 dense[1/2]@5 dense[2/2]+frozen[1/2]@10"
    parts = [(Part("dense", None, Group(1, 2)),), (Part("dense", None, Group(2, 2)), Part("frozen", None, Group(1, 2)))]
    plan = Plan((Phase(0, "factored"), *(Phase(5 * i, "mixed", None, p) for i, p in enumerate(parts, 1))), STEPS)
    assert plan == Schedule.parse(text).resolve(Run(STEPS))
    assert_same(Loop(plan, rank=4).run(), Loop(text, rank=4).run())


@pytest.mark.parametrize("text", ["factored@0 frozen@50%", "factored@0 frozen@30% factored@60% dense@80%"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_all_layers_can_be_frozen_at_once(text, dtype):
    loop = Loop(text, rank=4, frozen_dtype=dtype).run()
    assert {form_of(layer) for layer in loop.layers(*range(1, 9))} == {
        Dense() if text.endswith("80%") else Dense(frozen=True, dtype=dtype)
    }


# ---- memory


def live_bytes() -> int:
    """Of all tensors that exist, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def state_bytes(loop: Loop) -> int:
    """Of weights, gradients and optimizer state, as a phase holds them."""
    trained = [p for p in loop.model.parameters() if p.requires_grad]
    held = sum(p.numel() * p.element_size() for p in loop.model.parameters())
    states = (v for state in loop.optimizer.state.values() for v in state.values())
    return held + sum(p.numel() * p.element_size() for p in trained) + sum(v.numel() * v.element_size() for v in states)


def test_a_rotation_holds_less_than_half_of_dense_training():
    dense = state_bytes(Loop("dense@0", include=None).run(end=2))
    for dtype, share in ((None, 0.55), ("bfloat16", 0.5)):
        loop, peaks = Loop(EIGHT, rank=2, include=None, frozen_dtype=dtype), []
        for step in range(STEPS):
            loop.step(step)
            peaks.append(state_bytes(loop))
        assert max(peaks) <= share * dense


def test_what_a_turn_leaves_is_freed():
    loop = Loop("rotate(groups=8,share=80)", rank=4)
    sizes = []
    for step in range(STEPS):
        loop.step(step)
        sizes.append(live_bytes())
    layer = sum(p.numel() * 4 for p in loop.layers(1)[0].parameters())
    starts = [phase.start for phase in loop.drt.plan.phases[1:]]
    for one, other in pairwise(starts):  # a frozen group more in place of its factors with their two moments
        assert sizes[other] - sizes[one] <= 8 * layer


@pytest.mark.parametrize("moments", ["project", "reset"])
@pytest.mark.parametrize("after", ["frozen", "adapter", "lowrank"])
def test_a_switch_needs_the_dense_state_of_the_new_group_and_a_layer_beside_it(after, moments):
    """W and the two moments of AdamW of each of its layers; one layer's change needs a few of its weights in float64 on
    the way."""
    loop = Loop(f"rotate(groups=8,share=80,after={after})", rank=2, include=None, moments=moments)
    for step in range(STEPS):
        if step and loop.drt.match(step):
            counter = StepCounter()
            for tensor in (*loop.model.parameters(), *held_by(loop.optimizer)):
                counter.add(tensor)
            before = counter.now
            with counter:
                loop.drt.begin_step(step, loop.optimizer)
            sizes = [layer.weight.nbytes for layer in loop.layers(loop.drt.phase)]
            assert 3 * sum(sizes) < before / 2
            assert counter.peak - before <= 3 * sum(sizes) + 8 * max(sizes)
        loop.step(step)


def held_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
