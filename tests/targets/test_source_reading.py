"""What the source code of a class says of its layers' weights, what it hides, and how a setting overrides it."""

import functools

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hf_drt import DRTConfig, DynamicRank, dense_state_dict, find_targets
from hf_drt.compress import compress

READ = "weight read by its owner"
HIDDEN = "source of its owner cannot be read"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())

    def fused(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class Uncalled(Block):
    """As diffusers' attention: `fuse` is for the user to call."""

    def forward(self, x):
        return self.b(self.a(x).relu())

    @torch.no_grad()
    def fuse(self):
        self.ab = nn.Linear(4, 8)
        self.ab.weight.copy_(torch.cat([self.a.weight, self.b.weight]))


class OnlyInitial(Block):
    def __init__(self):
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.a.weight.data)


class Shadowed(Block):
    """Its own `fused` takes the place of the base's."""

    def forward(self, x):
        return self.fused(x)

    def fused(self, x):
        return self.b(self.a(x))


def apply(fn, x):
    return fn(x)


def by_name(owner, name, x):
    return getattr(owner, name)(x)


class Plain:
    def __call__(self, owner, x):
        return owner.b(owner.a(x))


class CallsOnly(Block):
    def __init__(self):
        super().__init__()
        self.processor = Plain()

    def forward(self, x):
        return self.processor(self, x)


HARMLESS = [Uncalled, OnlyInitial, Shadowed, CallsOnly]


class Direct(Block):
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight))


class ByMethod(Block):
    def forward(self, x):
        return self.step(x)

    def step(self, x):
        return self.fused(x)


class Inherited(Direct):
    """Nothing of it stands in the class's own source code."""


class BySuper(Direct):
    def forward(self, x):
        return super().forward(x)


class ByBase(Direct):
    def forward(self, x):
        return Direct.forward(self, x)


class ByCall(Block):
    def __call__(self, x):
        return self.fused(x)


class ByProperty(Block):
    @property
    def matrix(self):
        return self.a.weight * 2

    def forward(self, x):
        return self.b(F.linear(x, self.matrix))


class ByCachedProperty(Block):
    @functools.cached_property
    def matrix(self):
        return self.a.weight * 2

    def forward(self, x):
        return self.b(F.linear(x, self.matrix))


class PassedOn(Block):
    def forward(self, x):
        return apply(self.fused, x)


class PassedByName(Block):
    def forward(self, x):
        return by_name(self, "fused", x)


class LookedUp(Block):
    kernel = "fu" + "sed"

    def forward(self, x):
        return getattr(self, self.kernel)(x)


class InNestedFunction(Block):
    def forward(self, x):
        def step(y):
            return self.fused(y)

        return step(x)


def read_by_a_function(x, owner):
    return owner.b(F.linear(x, owner.a.weight))


class HandsItselfOn(Block):
    def forward(self, x):
        return read_by_a_function(x, owner=self)


class Kernel:
    def __call__(self, attn, x):
        return attn.b(F.linear(x, attn.a.weight))


class HasAProcessor(Block):
    """As diffusers' attention: what computes is an object that is no module."""

    def __init__(self):
        super().__init__()
        self.processor = Kernel()

    def forward(self, x):
        return self.processor(self, x)


def telling(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def silent(function):
    def wrapper(*args):
        return function(*args)

    return wrapper


class Decorated(Block):
    @telling
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight))


class SilentlyDecorated(Block):
    @silent
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight))


class Assigned(Block):
    """Its forward is a function of the module, whose first parameter has another name."""


def another_forward(this, x):
    return this.b(F.linear(x, this.a.weight))


Assigned.forward = another_forward


class Outdented(Block):
    def forward(self, x):
        """Text
        without indentation."""
        return self.b(F.linear(x, self.a.weight))


READERS = [
    Direct, ByMethod, Inherited, BySuper, ByBase, ByCall, ByProperty, ByCachedProperty, PassedOn, PassedByName,
    LookedUp, InNestedFunction, HandsItselfOn, HasAProcessor, Decorated, SilentlyDecorated, Assigned, Outdented,
]  # fmt: skip


def without_source(body: str = "return self.b(self.a(x))", name: str = "Hidden") -> type:
    """A class as a notebook's cell or `exec` makes it."""
    scope = {"Block": Block, "F": F, "__name__": "hidden"}
    exec(f"class {name}(Block):\n    def forward(self, x):\n        {body}\n", scope)
    return scope[name]


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def net(cls: type) -> Net:
    torch.manual_seed(0)
    return Net(cls(), Block())


@pytest.mark.parametrize("cls", HARMLESS)
def test_what_a_forward_pass_does_not_reach_does_not_count(cls):
    assert len(find_targets(net(cls)).targets) == 4


@pytest.mark.parametrize("cls", READERS)
def test_what_a_forward_pass_reaches_counts(cls):
    found = find_targets(net(cls))
    assert found.skipped == {"blocks.0.a": READ}
    assert list(found.targets) == ["blocks.0.b", "blocks.1.a", "blocks.1.b"]


def test_all_methods_of_a_class_without_a_forward_count():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def run(self, x):
            return self.b(F.linear(x, self.a.weight))

    assert find_targets(net(Layers)).skipped == {"blocks.0.a": READ}


class CallsAMethodOfItsBlocks(nn.Module):
    """As Gemma 3n: the methods of a part are called by the whole."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        return self.step(self.blocks[0], x)

    def step(self, block, x):
        return block.fused(x)


def test_a_method_that_another_module_calls_counts():
    assert find_targets(CallsAMethodOfItsBlocks()).skipped == dict.fromkeys(("blocks.0.a", "blocks.1.a"), READ)


def test_fusing_afterwards_takes_the_weights_as_they_are():
    model, twin = net(Uncalled), net(Uncalled)
    DynamicRank(model, DRTConfig(schedule="factored:1@0"), max_steps=1).apply(0)
    twin.load_state_dict(dense_state_dict(model))
    model.blocks[0].fuse()
    twin.blocks[0].fuse()
    torch.testing.assert_close(model.blocks[0].ab.weight, twin.blocks[0].ab.weight)


# ---- source code that is not there


def test_layers_of_a_class_without_source_code_stay_dense_and_are_named_in_the_log(caplog):
    model = net(without_source())
    found = find_targets(model)
    assert found.skipped == {"blocks.0.a": HIDDEN, "blocks.0.b": HIDDEN}
    DynamicRank(model, DRTConfig(schedule="factored:1@0"), max_steps=1)
    assert "blocks.0.a, blocks.0.b will stay dense, since the source code of the modules that hold them cannot be" in (
        caplog.text
    )


def test_a_model_of_nothing_else_is_refused_with_the_way_out():
    cls = without_source()
    with pytest.raises(
        ValueError,
        match=r"4 source of its owner cannot be read.*what source code keeps dense is overridden by ignore_so",
    ):
        find_targets(Net(cls(), cls()))


def test_so_do_those_of_a_method_without_source_code_that_is_reached():
    reached = type("Reached", (Block,), {"forward": ByMethod.forward, "step": without_source().forward})
    assert set(find_targets(net(reached)).skipped.values()) == {HIDDEN}
    unreached = type("Unreached", (Block,), {"step": without_source().forward})
    assert not find_targets(net(unreached)).skipped


def test_and_those_of_a_scripted_module():
    found = find_targets(Net(torch.jit.script(Block()), Block()))
    assert "blocks.0.a" not in found.targets


def test_a_class_without_source_code_that_owns_no_layer_is_named_in_the_log(caplog):
    Outer = without_source("return super().forward(x)", "Outer")
    Outer.__init__ = lambda self: (nn.Module.__init__(self), setattr(self, "inner", net(Block)))[0]
    model = Outer()
    DynamicRank(model, DRTConfig(schedule="factored:1@0"), max_steps=1)
    assert "the source code of Outer.forward cannot be read; it must not write to the weights of layers" in caplog.text


# ---- the setting


def test_what_source_code_says_can_be_overridden_with_a_warning(caplog):
    model, twin = net(Direct), net(Direct)
    config = DRTConfig(schedule="factored:1@0", ignore_source=[r"\.0\.a"])
    drt = DynamicRank(model, config, max_steps=1)
    assert set(drt.targets) == {"blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"}
    assert "ignore_source: blocks.0.a will change form, although Direct.forward reads its weight." in caplog.text
    drt.apply(0)
    twin.load_state_dict(dense_state_dict(model))
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), twin(x))


def test_and_what_it_hides(caplog):
    model = net(without_source())
    found = find_targets(model, ignore_source=["blocks.0"])
    assert len(found.targets) == 4
    compress(model, rank=1, ignore_source=["blocks.0"])
    text = "ignore_source: blocks.0.a, blocks.0.b will change form, although the source code of Hidden.forward cannot"
    assert text in caplog.text


@pytest.mark.parametrize(
    ("make", "pattern", "others"),
    [(Block, "a", "no other"), (Direct, "b$", r"blocks\.0\.a"), (Direct, "nosuch", r"blocks\.0\.a")],
)
def test_a_pattern_that_overrides_nothing_is_refused(make, pattern, others):
    with pytest.raises(
        ValueError, match=rf"ignore_source: '{pattern[0]}.*' overrides nothing, .* Layers that do: {others}\. Leave it"
    ):
        find_targets(net(make), ignore_source=[pattern])


def test_it_does_not_override_other_reasons():
    model = net(Direct)
    model.blocks[0].a.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="overrides nothing"):
        find_targets(model, ignore_source=["a"])


def test_a_layer_that_was_selected_so_is_selected_again_in_low_rank():
    model = net(Direct)
    config = DRTConfig(schedule="factored:1@0", ignore_source=["a"])
    drt = DynamicRank(model, config, max_steps=1)
    drt.apply(0)
    assert list(find_targets(model, ignore_source=["a"]).targets) == list(drt.targets)
    assert list(find_targets(model).targets) == list(drt.targets)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        return self.inner(x)


class Told(nn.Module):
    """As RWKV, the model writes to its blocks' weights, but only when it is told to."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def rescale(self):
        for block in self.blocks:
            block.inner.a.weight.div_(2)

    def forward(self, x):
        return self.blocks[1](self.blocks[0](x))


class Always(Told):
    def forward(self, x):
        self.rescale()
        return super().forward(x)


@pytest.mark.parametrize(("cls", "written"), [(Told, set()), (Always, {"blocks.0.inner.a", "blocks.1.inner.a"})])
def test_writes_count_if_a_forward_pass_reaches_them(cls, written):
    model = cls()
    found = find_targets(model)
    assert {name for name, reason in found.skipped.items() if reason == "weight written by the model"} == written
    if written:
        assert len(find_targets(model, ignore_source=["inner.a"]).targets) == 4


def test_a_trainer_refuses_a_pattern_that_overrides_nothing(tmp_path):
    with pytest.raises(ValueError, match="ignore_source: 'q_proj' overrides nothing"):
        tiny.trainer(tmp_path, tiny.llama(), drt_schedule="factored@0", drt_rank=4, drt_ignore_source=["q_proj"])
