"""A layer that does more than its class: it is left as it is, with its reason, and nothing of it gets into another."""

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as T
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

from hf_drt import Adapter, Dense, DRTConfig, DynamicRank, Factored, convert, declare, find_targets, form_of
from hf_drt.compress import compress
from hf_drt.forms import ExpertStack, trainable_weights
from hf_drt.forms.modules import with_weight
from hf_drt.forms.plain import own_behaviour
from hf_drt.targets.surgery import Swap, replace

CYCLE = "factored:2@0 dense@2 adapter:2@4 dense@6"


class Block(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.a, self.b = layer(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Net(nn.Module):
    """Two blocks; ``blocks.0.a`` is the layer in question."""

    def __init__(self, layer=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(layer), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    @property
    def layer(self) -> nn.Module:
        return self.blocks[0].a


class ConvBlock(nn.Module):
    def __init__(self, layer=nn.Conv2d):
        super().__init__()
        self.a, self.b = layer(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.b(self.a(x).relu())


class ConvNet(Net):
    def __init__(self, layer=nn.Conv2d):
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([ConvBlock(layer), ConvBlock()])


def inputs(model: nn.Module) -> torch.Tensor:
    return torch.randn(
        3, 8, *((5, 5) if isinstance(model, ConvNet) else ()), generator=torch.Generator().manual_seed(1)
    )


# ---- what an instance may have of its own


def nothing(*args, **kwargs) -> None:
    return None


def wrapped(layer: nn.Module, name: str = "forward") -> None:
    """A wrapper that does nothing, as libraries set it to measure, cast or move."""
    inner = getattr(layer, name)
    setattr(layer, name, lambda *args, **kwargs: inner(*args, **kwargs))


def wired(layer: nn.Module) -> None:
    object.__setattr__(layer, "weight", layer.weight.detach().clone())


INSTANCE = {
    "forward": (wrapped, "own forward on the instance"),
    "the machinery of calls": (lambda m: wrapped(m, "_call_impl"), "own _call_impl on the instance"),
    "a method of the state dict": (lambda m: wrapped(m, "state_dict"), "own state_dict on the instance"),
    "compiled on its own": (lambda m: m.compile(backend="eager"), "own _compiled_call_impl on the instance"),
    "accelerate's hook": (lambda m: add_hook_to_module(m, ModelHook()), "own forward on the instance"),
    "accelerate's devices": (lambda m: add_hook_to_module(m, AlignDevicesHook()), "own forward on the instance"),
    "forward hook": (lambda m: m.register_forward_hook(nothing), "hooked (forward)"),
    "forward pre-hook": (lambda m: m.register_forward_pre_hook(nothing), "hooked (forward pre)"),
    "backward hook": (lambda m: m.register_full_backward_hook(nothing), "hooked (backward)"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(nothing), "hooked (backward pre)"),
    "state dict post-hook": (lambda m: m.register_state_dict_post_hook(nothing), "hooked (state dict)"),
    "state dict pre-hook": (lambda m: m.register_state_dict_pre_hook(nothing), "hooked (state dict pre)"),
    "load pre-hook": (lambda m: m.register_load_state_dict_pre_hook(nothing), "hooked (load state dict pre)"),
    "load post-hook": (lambda m: m.register_load_state_dict_post_hook(nothing), "hooked (load state dict post)"),
    "buffer": (lambda m: m.register_buffer("scale", torch.ones(8)), "holds more than weight and bias"),
    "child": (lambda m: m.add_module("inner", nn.Dropout(0.1)), "holds more than weight and bias"),
    "parameter": (lambda m: setattr(m, "gain", nn.Parameter(torch.ones(8))), "holds more than weight and bias"),
}
OF_WEIGHT = {
    "gradient hook": (lambda w: w.register_hook(lambda g: g), "hooked weight"),
    "hook after accumulation": (lambda w: w.register_post_accumulate_grad_hook(nothing), "hooked weight"),
}
DENSE = INSTANCE | {
    name: (lambda m, change=change: change(m.weight), reason) for name, (change, reason) in OF_WEIGHT.items()
}
DENSE |= {
    "a tensor in front of the parameter": (wired, "own weight on the instance"),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "parametrized"),
    "a pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "holds more than weight and bias"),
    "weight norm": (parametrizations.weight_norm, "parametrized"),
    "weight norm, the old one": (nn.utils.weight_norm, "parametrized"),
    "spectral norm": (parametrizations.spectral_norm, "parametrized"),
    "spectral norm, the old one": (nn.utils.spectral_norm, "parametrized"),
}


def cycle(model: nn.Module) -> DynamicRank:
    """All phases, with two update steps in each."""
    drt = DynamicRank(model, DRTConfig(schedule=CYCLE), 8)
    drt.apply(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = inputs(model)
    for step in range(8):
        drt.begin_step(step, optimizer)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return drt


@pytest.mark.parametrize("make", [Net, ConvNet])
@pytest.mark.parametrize(("change", "reason"), DENSE.values(), ids=DENSE.keys())
def test_a_layer_with_behaviour_of_its_own_stays_the_same_object_through_all_phases(make, change, reason):
    model = make()
    change(model.layer)
    layer = model.layer
    drt = cycle(model)
    assert drt.skipped == {"blocks.0.a": reason}
    assert model.layer is layer
    assert form_of(layer) == Dense()


@pytest.mark.parametrize("make", [Net, ConvNet])
@pytest.mark.parametrize(("change", "reason"), DENSE.values(), ids=DENSE.keys())
def test_such_a_layer_cannot_be_converted(make, change, reason):
    layer = make().layer
    change(layer)
    before = dict(vars(layer)), dict(layer._parameters)
    for form in (Factored(2), Adapter(2)):
        with pytest.raises(ValueError, match="cannot change form: ") as error:
            convert(layer, form)
        assert f"cannot change form: {reason}. Its new form would give x W^T + b alone." in str(error.value)
    assert before == (dict(vars(layer)), dict(layer._parameters))


def test_a_dense_layer_that_shall_be_dense_needs_no_conversion():
    layer = Net().layer
    wrapped(layer)
    assert convert(layer, Dense()).module is layer


LOW_RANK = INSTANCE | {
    "gradient hook on a factor": (lambda m: trainable_weights(m)[0].register_hook(lambda g: g), "hooked weight"),
}


@pytest.mark.parametrize("make", [Net, ConvNet])
@pytest.mark.parametrize("form", [Factored(2), Adapter(2)], ids=str)
@pytest.mark.parametrize(("change", "reason"), LOW_RANK.values(), ids=LOW_RANK.keys())
def test_a_layer_in_low_rank_form_is_left_in_it(make, form, change, reason):
    model = make()
    replace(model, [Swap("blocks.0.a", model.layer, convert(model.layer, form).module)])
    change(model.layer)
    layer = model.layer
    drt = cycle(model)
    assert drt.skipped == {"blocks.0.a": reason}
    assert model.layer is layer
    assert form_of(layer) == form
    with pytest.raises(ValueError, match="cannot change form: "):
        convert(layer, Dense())


@pytest.mark.parametrize(("form", "factor"), [(Factored(2), "U"), (Adapter(2), "lora_B")])
def test_a_layer_with_a_pruned_factor_is_left_in_its_form(form, factor):
    model = Net()
    replace(model, [Swap("blocks.0.a", model.layer, convert(model.layer, form).module)])
    layer = model.layer
    prune.random_unstructured(layer, factor, 0.5)
    assert cycle(model).skipped == {"blocks.0.a": "parametrized"}
    assert model.layer is layer


def test_a_native_model_keeps_the_hooks_that_it_got_after_loading(tmp_path):
    model = tiny.llama()
    for name, layer in find_targets(model).targets.items():
        replace(model, [Swap(name, layer, convert(layer, Factored(4)).module)])
    declare(model)
    model.save_pretrained(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    layer, calls = model.model.layers[0].mlp.up_proj, []
    layer.register_forward_hook(lambda *_: calls.append(1))
    drt = DynamicRank(model, DRTConfig(schedule="dense@0"), 2)
    drt.apply(0)
    assert drt.skipped["model.layers.0.mlp.up_proj"] == "hooked (forward)"
    assert {form_of(m) for m in map(model.get_submodule, drt.targets)} == {Dense()}
    model(**tiny.batch())
    assert (model.model.layers[0].mlp.up_proj, form_of(layer), calls) == (layer, Factored(4), [1])


@pytest.mark.parametrize(("change", "reason"), OF_WEIGHT.values(), ids=OF_WEIGHT.keys())
def test_fused_experts_whose_weight_has_hooks_stay_dense(change, reason):
    model = tiny.mixtral()
    change(model.model.layers[0].mlp.experts.down_proj)
    assert find_targets(model).skipped["model.layers.0.mlp.experts.down_proj"] == reason
    with pytest.raises(ValueError, match=reason):
        convert(ExpertStack(model.model.layers[0].mlp.experts.down_proj, False), Factored(2))


def test_a_model_that_accelerate_offloads_says_so():
    with pytest.raises(ValueError, match="as follows: 4 own forward on the instance"):
        find_targets(cpu_offload(Net()))


def test_compress_leaves_such_layers_and_has_all_others():
    model = tiny.llama()
    layer = model.model.layers[0].mlp.up_proj
    wrapped(layer)
    model.model.layers[0].mlp.down_proj.weight.register_hook(lambda g: g)
    result = compress(model, rank=2)
    left = {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    assert {row.name for row in result.layers} == set(find_targets(tiny.llama()).targets) - left
    assert model.model.layers[0].mlp.up_proj is layer


# ---- what a class may have of its own


class Dropped(nn.Linear):
    """A linear map in evaluation mode, and something else in training."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Calls(nn.Module):
    def __call__(self, *args):
        return 2 * super().__call__(*args)


class CallsFirst(Calls, nn.Linear):
    pass


class CallsBetween(nn.Linear, Calls):
    """nn.Linear has no __call__ of its own: that of Calls comes before nn.Module's."""


class SavesHalf(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = destination[prefix + "weight"].half()


class Masked(nn.Linear):
    @property
    def weight(self):
        return self._parameters["weight"] * (self._parameters["weight"] > 0)


def masked(*sizes: int) -> nn.Linear:
    layer = nn.Linear(*sizes)
    layer.__class__ = Masked  # as torch's parametrizations do
    return layer


class Masking(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * (weight > 0), bias)


class Quantized(nn.Parameter):
    """A tensor class with behaviour of its own."""


def quantized() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = Quantized(layer.weight.data)
    return layer


CLASSES = {
    "dropout": (Net, Dropped, "its class overrides forward"),
    "a mixin before": (Net, CallsFirst, "its class overrides __call__"),
    "a mixin after": (Net, CallsBetween, "its class overrides __call__"),
    "what it saves": (Net, SavesHalf, "its class overrides _save_to_state_dict"),
    "a property in place of the weight": (Net, masked, "its class overrides weight"),
    "a convolution's kernel": (ConvNet, Masking, "its class overrides _conv_forward"),
    "a tensor class": (Net, lambda *_: quantized(), "quantized or not a plain matrix"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "layer", "reason"), CLASSES.values(), ids=CLASSES.keys())
def test_a_class_is_judged_in_either_mode_and_without_running_it(make, layer, reason, training):
    model = make(layer).train(training)
    assert find_targets(model).skipped == {"blocks.0.a": reason}
    with pytest.raises(ValueError, match=f"cannot change form: {reason}"):
        convert(model.layer, Factored(2))


def test_a_layer_without_a_weight_yet_stays_dense():
    model = Net(lambda out, _: nn.LazyLinear(out))
    assert find_targets(model).skipped == {"blocks.0.a": "quantized or not a plain matrix"}
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.0"):
        convert(model.layer, Factored(2))


class Cosmetic(nn.Linear):
    """All that a class may change without its layers doing anything else."""

    __doc__ = "A linear layer of another name and start."
    kind = "cosmetic"

    def __init__(self, *args):
        super().__init__(*args)
        self.note = "the user's"

    def reset_parameters(self):
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self):
        return "cosmetic"

    def __repr__(self):
        return "Cosmetic()"

    def helper(self):
        return self.note


def materialized(out: int, into: int) -> nn.Linear:
    layer = nn.LazyLinear(out)
    layer(torch.zeros(1, into))
    return layer


def unhooked(layer: nn.Module) -> None:
    """What accelerate takes off again leaves the class's own forward on the instance."""
    add_hook_to_module(layer, ModelHook())
    remove_hook_from_module(layer)
    assert "forward" in vars(layer)


@pytest.mark.parametrize("layer", [Cosmetic, materialized])
def test_a_class_that_computes_nothing_else_is_taken(layer):
    model = Net(layer)
    assert "blocks.0.a" in cycle(model).targets
    assert type(model.layer) is type(layer(8, 8))


def test_hooks_that_were_taken_off_again_leave_a_plain_layer():
    model = Net()
    unhooked(model.layer)
    for register in (model.layer.register_forward_hook, model.layer.weight.register_hook):
        register(nothing).remove()
    assert own_behaviour(model.layer) is None
    before = model.layer
    assert "blocks.0.a" in cycle(model).targets
    assert model.layer is not before
    assert "forward" not in vars(model.layer)


def test_a_hook_on_the_bias_stays_with_it():
    """The bias is the same object in all forms."""
    model, calls = Net(), []
    model.layer.bias.register_hook(lambda g: calls.append(1))
    cycle(model)
    assert len(calls) == 8


def test_what_is_selected_does_not_depend_on_how_the_weights_are_held():
    names = list(find_targets(tiny.llama()).targets)
    with torch.device("meta"):
        assert list(find_targets(tiny.llama()).targets) == names
    with FakeTensorMode():
        assert list(find_targets(tiny.llama()).targets) == names


def test_convert_takes_layers_only():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), None
            self.in_features = self.out_features = 4

    with pytest.raises(ValueError, match=r"a Own of shape .* cannot change form: neither a linear layer nor a convol"):
        convert(Own(), Factored(2))


# ---- numbers


def test_a_pruned_model_with_gradient_masks_trains_as_it_does_without_dynamic_rank():
    """Plain PyTorch in comparison, where the layers that change form have a learning rate of 0 in both."""

    def pruned() -> Net:
        model = Net()
        for layer in (model.layer, model.blocks[1].b):
            mask = (layer.weight.detach().abs() > 0.2).float()
            layer.weight.data.mul_(mask)
            layer.weight.register_hook(lambda g, mask=mask: g * mask)
        return model

    masked = ("blocks.0.a.weight", "blocks.1.b.weight")

    def optimizer_of(model: Net) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        rest = [p for name, p in named.items() if name not in masked and p.requires_grad]
        groups = [{"params": [named[name] for name in masked], "lr": 0.1}, {"params": rest, "lr": 0.0}]
        return torch.optim.SGD(groups, momentum=0.9)

    plain = pruned()
    optimizer, x = optimizer_of(plain), inputs(plain)
    for _ in range(8):
        plain(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model = pruned()
    drt = DynamicRank(model, DRTConfig(schedule="adapter:2@0 dense@3 adapter:2@5 dense@7"), 8)
    drt.apply(0)
    optimizer = optimizer_of(model)
    for step in range(8):
        drt.begin_step(step, optimizer)
        model(x).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(drt.targets) == {"blocks.0.b", "blocks.1.a"}
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters())
    assert (model.layer.weight == 0).any()
    assert not torch.equal(model.layer.weight, pruned().layer.weight)


# ---- behaviour that a layer gets after the selection

LATER = {
    name: row
    for name, row in (DENSE | {"nothing": (nothing, "")}).items()
    if row[1] != "parametrized" and name not in ("parameter", "a pruned bias", "a tensor in front of the parameter")
}


@pytest.mark.parametrize(("change", "reason"), LATER.values(), ids=LATER.keys())
def test_what_a_layer_gets_in_mid_run_is_warned_of_and_does_not_follow_into_other_forms(change, reason, caplog):
    model = Net()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 adapter:2@1 dense@2 factored:2@3 dense@4"), 5)
    drt.apply(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = model.layer
    change(old)
    for step in range(1, 5):
        drt.begin_step(step, optimizer)
        model.train()
        model(inputs(model)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    warnings = [record.message for record in caplog.records if "behaviour of its own" in record.message]
    expected = f"blocks.0.a has got behaviour of its own since it was selected ({reason}), which is lost as it changes"
    assert bool(warnings) == bool(reason)
    assert all(text.startswith(expected) for text in warnings)
    layer = model.layer
    hooks = {key for key in vars(layer) if "hooks" in key}
    assert len(hooks) >= 8
    assert all(vars(layer)[key] is not vars(old)[key] and not vars(layer)[key] for key in hooks)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.state_dict()["weight"], layer.weight)


@pytest.mark.parametrize(
    ("change", "reason"), [row for row in DENSE.values() if row not in LATER.values()] + [INSTANCE["parameter"]]
)
def test_a_layer_whose_parameters_are_changed_in_mid_run_is_refused_before_anything_changes(change, reason):
    model = Net()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored:2@1"), 2)
    drt.apply(0)
    change(model.layer)
    with pytest.raises(ValueError, match=rf"blocks\.0\.a has been changed since it was selected \({reason}\)"):
        drt.begin_step(1, torch.optim.SGD(model.parameters(), lr=0.1))
    assert {form_of(m) for m in model.modules()} == {Dense()}
    assert drt.phase == 0


def test_going_back_to_dense_warns_too(caplog):
    model = Net()
    drt = DynamicRank(model, DRTConfig(schedule="factored:2@0"), 2)
    drt.apply(0)
    wrapped(model.layer)
    drt.to_dense()
    assert "blocks.0.a has got behaviour of its own since it was selected (own forward on the instance)" in caplog.text


def test_a_copy_shares_no_hooks_keeps_data_and_has_its_own_methods():
    layer = nn.Linear(8, 8)
    layer.note, layer.table, layer.original = "the user's", {"k": 1}, layer.forward
    wrapped(layer)
    layer.register_forward_hook(nothing)
    other = with_weight(layer, nn.Parameter(torch.eye(8)), nn.Parameter(torch.zeros(8)), True)
    x = torch.randn(2, 8)
    assert (other.note, other.table is layer.table, "forward" in vars(other)) == ("the user's", True, False)
    assert torch.equal(other(x), x)
    assert torch.equal(other.original(x), x)
    other.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert copy.deepcopy(layer).note == "the user's"
