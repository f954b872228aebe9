"""A recovery leaves nothing behind but new factors, and takes models and batches as they come."""

import copy
import random

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from hf_drt.compress import compress
from hf_drt.recovery import compress_and_recover, recover, recovering


def pair(kind="llama", **criterion):
    """A reference and a smaller model, at random."""
    reference = getattr(tiny, kind)().eval()
    model = copy.deepcopy(reference)
    compress(model, **(criterion or {"rank_ratio": 0.25, "rank_multiple": 2}))
    return model, reference


def batches(kind="llama", count=3):
    return [tiny.batch(kind, rows=4) for _ in range(count)]


def attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_trainer_and_accelerate_put_into_a_model_is_gone(dtype):
    model, reference = pair()
    before, hooks = attributes(model), [len(m._forward_pre_hooks) for m in model.modules()]
    assert model.config.use_cache
    recover(model, reference, batches(), steps=2, dtype=dtype)
    assert attributes(model) == before  # no forward under autocast
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert model.config.use_cache


def test_a_configuration_without_a_cache_gets_none():
    model, reference = pair("vit")
    recover(model, reference, batches("vit"), steps=2)
    assert "use_cache" not in vars(model.config)


def test_random_generators_go_on_as_if_nothing_had_been():
    model, reference = pair()

    def drawn(recovering):
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        if recovering:
            recover(model, reference, batches(), steps=2)
        return torch.rand(1).item(), np.random.rand(), random.random()

    assert drawn(recovering=True) == drawn(recovering=False)


@pytest.mark.parametrize("learning_rate", [1e-3, 30.0])
def test_running_statistics_stay_and_are_those_that_are_trained_with(learning_rate):
    model, reference = pair("resnet")
    before, modes = {n: b.clone() for n, b in model.named_buffers()}, []
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    handle = norm.register_forward_hook(lambda m, args, y: modes.append(m.training))
    model.train()
    recover(model, reference, batches("resnet"), steps=3, learning_rate=learning_rate)
    handle.remove()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert modes
    assert not any(modes)
    assert norm.training


def test_an_earlier_trainers_autocast_does_not_decide_what_is_computed_in():
    """It is marked as prepared, so that Accelerate would leave it as it is; it is back afterwards."""
    model, reference = pair()
    plain, data = copy.deepcopy(model), batches()
    recover(plain, reference, data, steps=3, dtype="bf16", least_squares=False)
    model._is_accelerate_prepared = True
    before = attributes(model)
    recover(model, reference, data, steps=3, dtype="bf16", least_squares=False)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert attributes(model) == before


def test_under_no_grad():
    model, reference = pair()
    with torch.no_grad():
        assert len(recover(model, reference, batches(), steps=2).stages) == 4
        assert not torch.is_grad_enabled()


def test_one_batch_given_many_times_is_many_batches():
    model, reference = pair()
    assert len(recover(model, reference, [tiny.batch()] * 8, steps=2).stages) == 4


def test_a_frozen_reference():
    model, reference = pair()
    reference.requires_grad_(False)
    assert recover(model, reference, batches(), steps=2).layers
    assert not any(p.requires_grad for p in reference.parameters())


class Plain(nn.Module):
    """No model of transformers, and one whose blocks nobody would find."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_plain_module_whose_layers_were_named_by_blocks():
    torch.manual_seed(0)
    reference = Plain().eval()
    model = copy.deepcopy(reference)
    compress(model, rank=4, blocks=["^first$", r"^layers\.\d$"])
    result = recover(model, reference, [torch.randn(8, 32) for _ in range(3)], steps=20, learning_rate=1e-2)
    assert [layer.name for layer in result.layers] == ["first.0", "first.2", "layers.0.0", "layers.1.0"]
    assert result.stages[-1].distance < result.stages[1].distance


def test_a_plain_module_with_packed_attention():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    reference = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model, packed = copy.deepcopy(reference), attributes(reference)
    compress(model, rank=4)
    result = recover(model, reference, [torch.randn(4, 6, 32) for _ in range(3)], steps=10, learning_rate=1e-2)
    assert len(result.layers) == 12
    assert attributes(reference) == packed
    assert result.stages[-1].distance < result.stages[1].distance


def test_batches_of_which_some_have_no_labels_tell_no_loss():
    model, reference = pair("vit")
    data = batches("vit", 4)
    del data[-1]["labels"]  # which is kept aside
    assert {stage.loss for stage in recover(model, reference, data, steps=2).stages} == {None}


def test_nan_in_what_is_judged_by_is_an_error_and_nothing_has_changed():
    model, reference = pair("vit")
    before, data = {n: v.clone() for n, v in model.state_dict().items()}, batches("vit", 4)
    data[-1]["pixel_values"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="hold inf or nan on batches that are kept aside: there is nothing to judge"):
        recover(model, reference, data, steps=2)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_experts_that_are_modules_are_given_other_tokens():
    """Each of a list of its own: how many rows it gets depends on the router, so on the layers before."""
    config = SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_decoder_layers=2, num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1, num_heads=2, num_experts=4, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in (p for p in reference.parameters() if p.ndim > 1):
            weight *= 4
    model = copy.deepcopy(reference)
    compress(model, rank_ratio=0.25, rank_multiple=2)
    result = recover(model, reference, batches("t5"), steps=5, learning_rate=1e-3)
    assert result.stages[-1].distance < result.stages[1].distance


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"recover_steps": -1}, ValueError, "steps must be a whole number of at least 0"),
        ({"recover_options": {"dtype": "fp8"}}, ValueError, "dtype must be one of"),
        ({"recover_steps": 0, "recover_options": {"training": [1]}}, ValueError, "training has no effect with steps=0"),
        ({"recover_options": {"lr": 1e-3}}, TypeError, "unexpected keyword argument 'lr'"),
    ],
)
def test_what_recover_would_refuse_is_refused_before_the_compression(given, error, message):
    model = tiny.llama()
    before = attributes(model)
    with pytest.raises(error, match=message):
        compress_and_recover(model, calibration=batches(), rank_ratio=0.25, **given)
    assert attributes(model) == before


def test_rounding_leaves_no_distance_below_zero(monkeypatch):
    monkeypatch.setattr(recovering, "distance", lambda *given: torch.tensor(-1e-9))
    assert {stage.distance for stage in recover(*pair(), batches(), steps=0).stages} == {0.0}
