"""An engine is one class: a toy one, known to this file alone, trains through every form as a single process does."""

import contextlib
import copy
import re
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch.utils._pytree import tree_map

from hf_drt import DRTConfig, DynamicRank, effective_weight, find_targets
from hf_drt.engines import ENGINES, Engine, engine_of, is_wrapper, unwrapped
from hf_drt.forms import trainable_weights

STEPS = 12
SCHEDULE = "factored@0 dense@3 adapter@6 factored@9"


class Boxed(torch.Tensor):
    """A parameter whose values lie elsewhere, as an engine that cuts or offloads weights has them."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        flags = {"dtype": inner.dtype, "device": inner.device, "strides": inner.stride()}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **flags)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Boxed(args[0].inner)
        own, options = tree_map(opened, (args, kwargs or {}))
        result = func(*own, **options)
        return args[0] if func._schema.is_mutable and isinstance(args[0], Boxed) else result


def opened(value):
    return value.inner if isinstance(value, Boxed) else value


class Toy(Engine):
    """Linear layers' parameters are boxed, and a process has room for one layer at a time that is not."""

    help = "boxes"
    sharded = True
    tensors = (f"{Boxed.__module__}.{Boxed.__qualname__}",)
    calls: list[str]

    @classmethod
    def manages(cls, model):
        return any(isinstance(p, Boxed) for p in model.parameters())

    @classmethod
    def inside(cls, module):
        return module.inner if isinstance(module, Wrapper) else None

    def held(self, tensor):
        return opened(tensor)

    def full(self, value):
        return opened(value).clone() if isinstance(value, Boxed) else value

    def whole(self, layer):
        self.calls.append("whole")
        plain = copy.copy(layer)
        plain._parameters = {
            name: None if p is None else nn.Parameter(self.full(p), requires_grad=p.requires_grad)
            for name, p in layer._parameters.items()
        }
        return plain

    def like(self, value, weight):
        return value

    def admit(self, layers):
        self.calls.append("admit")
        self.layers = {id(layer) for layer in layers}

    def agree(self, error):
        self.calls.append("agree")
        if error is not None:
            raise error

    def install(self, old, plain, new):
        self.calls.append("install")
        self.layers.remove(id(old))
        taken = {id(p): old._parameters[name] for name, p in plain._parameters.items() if p is not None}
        for name, p in new._parameters.items():
            if p is not None and id(p) in taken:
                new._parameters[name] = taken[id(p)]
                new._parameters[name].inner.copy_(p.detach())
                new._parameters[name].requires_grad_(p.requires_grad)
            elif p is not None:
                new._parameters[name] = boxed(p)

    def settle(self):
        assert not self.layers
        self.calls.append("settle")

    def around_switch(self, options):
        return contextlib.nullcontext()


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


def boxed(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(Boxed(parameter.detach().clone()), requires_grad=parameter.requires_grad)


def box(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module._parameters = {name: None if p is None else boxed(p) for name, p in module._parameters.items()}
    return model


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(Toy, "calls", [], raising=False)
    ENGINES.add("toy", Toy)
    yield Toy
    ENGINES.remove("toy")


def begun(model: nn.Module, state: dict | None = None):
    config = DRTConfig(schedule=SCHEDULE, rank_multiple=4, moments="project", factored_lr_scale=0.5)
    drt = DynamicRank(model, config, STEPS)
    if state is None:
        drt.apply(0)
    else:
        drt.load_state_dict(state)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, foreach=False)
    drt.install(optimizer)
    return drt, optimizer


def train(model, drt, optimizer, steps) -> list[float]:
    losses = []
    for step in steps:
        drt.begin_step(step, optimizer)
        ids = torch.randint(1, tiny.VOCAB, (4, tiny.LENGTH), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model, drt) -> dict[str, torch.Tensor]:
    engine = engine_of(model)
    return {name: effective_weight(engine.whole(model.get_submodule(name))) for name in drt.targets}


def small() -> nn.Module:
    return tiny.llama(attention_bias=True, mlp_bias=True)


def test_a_toy_engine_trains_through_every_form_bit_for_bit_as_a_single_process(toy):
    alone, model = small(), box(small())
    assert type(engine_of(model)) is Toy
    assert find_targets(model).targets.keys() == find_targets(alone).targets.keys()
    runs = {}
    for net in (alone, model):
        drt, optimizer = begun(net)
        losses = train(net, drt, optimizer, range(STEPS))
        moments = [
            optimizer.state[w]["exp_avg"] for name in drt.targets for w in trainable_weights(net.get_submodule(name))
        ]
        runs[net] = (
            losses,
            weights(net, drt),
            drt.effective_ranks(),
            moments,
            [len(g["params"]) for g in optimizer.param_groups],
        )
        order = {id(p): place for place, p in enumerate(net.parameters())}
        for group in optimizer.param_groups:
            assert [order[id(p)] for p in group["params"]] == sorted(order[id(p)] for p in group["params"])
        drt.to_dense(optimizer)
    torch.testing.assert_close(runs[model], runs[alone], rtol=0, atol=0)
    boxes = {name for name, p in model.named_parameters() if isinstance(p, Boxed)}
    assert boxes == {name for name, p in box(small()).named_parameters() if isinstance(p, Boxed)}
    torch.testing.assert_close(
        {name: opened(p.detach()) for name, p in model.named_parameters()},
        {name: p.detach() for name, p in alone.named_parameters()},
        rtol=0,
        atol=0,
    )


def test_every_layer_is_made_whole_once_for_its_turn_and_installed_once(toy):
    """An inflation decomposes nothing; a deflation has made every layer whole before, for that."""
    model = box(small())
    drt, optimizer = begun(model)
    train(model, drt, optimizer, range(3))
    toy.calls.clear()
    drt.begin_step(3, optimizer)
    layers = len(drt.targets)
    assert toy.calls == ["admit", "agree"] + ["whole", "install"] * layers + ["settle"]
    train(model, drt, optimizer, range(4, 9))
    toy.calls.clear()
    drt.begin_step(9, optimizer)
    assert toy.calls == ["admit", "agree"] + ["whole"] * layers + ["whole", "install"] * layers + ["settle"]


def test_a_toy_engines_checkpoint_resumes_bit_for_bit(toy, tmp_path):
    model = box(small())
    drt, optimizer = begun(model)
    train(model, drt, optimizer, range(8))
    saved = {"model": {name: opened(p) for name, p in model.state_dict().items()}, "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    state = drt.state_dict()
    expected = train(model, drt, optimizer, range(8, STEPS)), weights(model, drt)
    other = box(tiny.llama(attention_bias=True, mlp_bias=True, initializer_range=0.5))
    again, made = begun(other, state)
    saved = torch.load(tmp_path / "saved.pt")
    other.load_state_dict(saved["model"])
    made.load_state_dict(saved["optimizer"])
    torch.testing.assert_close(
        (train(other, again, made, range(8, STEPS)), weights(other, again)), expected, rtol=0, atol=0
    )


def test_a_weight_that_is_not_finite_is_told_of_before_anything_changes(toy):
    model = box(small())
    drt, optimizer = begun(model)
    name = list(drt.targets)[3]
    model.get_submodule(name).U.inner[0, 0] = float("nan")
    before = list(model.modules())
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: U of a layer .* holds inf or nan"):
        drt.begin_step(3, optimizer)
    assert list(model.modules()) == before


def test_a_toy_engines_wrapper_is_known_everywhere(toy):
    model = small()
    wrapper = Wrapper(model)
    assert unwrapped(wrapper) is model
    assert unwrapped(model) is model
    assert is_wrapper(wrapper)
    assert not is_wrapper(model)


def test_the_engines_are_named_nowhere_else():
    """Whoever wants to know what an engine does asks it."""
    root = Path(__file__).parents[2] / "hf_drt"
    words = re.compile(r"\b(DTensor|FSDPModule|DistributedDataParallel|to_local|full_tensor|isinstance\(.*Single)\b")
    outside = [path for path in root.rglob("*.py") if path.parent.name != "engines"]
    code = {path: re.sub(r'"""[\s\S]*?"""|"[^"\n]*"|#.*', "", path.read_text()) for path in outside}
    assert not {str(path.relative_to(root)) for path, text in code.items() if words.search(text)}


@pytest.mark.parametrize("boxes", [False, True])
def test_a_switch_looks_through_the_model_as_often_whatever_the_number_of_layers(toy, boxes):
    """What looks through the model once for each layer costs the square of their number."""
    looks = []
    modules = nn.Module.named_modules
    for blocks in (2, 6):
        model = tiny.llama(num_hidden_layers=blocks)
        drt, optimizer = begun(box(model) if boxes else model)
        drt.begin_step(0, optimizer)
        counts = []

        def counted(module, *args, counts=counts, model=model, **kwargs):
            counts.append(module is model)
            return modules(module, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.Module, "named_modules", counted)
            drt.begin_step(3, optimizer)
        looks.append(sum(counts))
    assert looks[0] == looks[1]
