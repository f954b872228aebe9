"""What merging into the weights' dtype costs, against a calculation in float64."""

import logging

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_drt import Adapter, Factored, convert, dense_state_dict, merge_errors
from hf_drt.export import DenseExporter, save_export
from hf_drt.targets.surgery import Swap, replace

OUT, IN, RANK = 24, 40, 4
LAYERS = {"linear": lambda: nn.Linear(IN, OUT), "conv1d": lambda: Conv1D(OUT, IN)}
FORMS = {"factored": Factored(RANK), "adapter": Adapter(RANK, alpha=6.0)}


class Net(nn.Module):
    """One layer under the name ``layer``, one dense one beside it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.other = layer, nn.Linear(3, 3)


def net(layer: str, form: str, dtype: torch.dtype, size: float = 1e-2) -> Net:
    torch.manual_seed(0)
    low_rank = convert(LAYERS[layer](), FORMS[form]).module
    if form == "adapter":
        nn.init.normal_(low_rank.lora_B, std=size)
    return Net(low_rank).to(dtype)


def expected(model: Net, form: str) -> float:
    """From the stored factors in float64, and the exported weight."""
    held = {key: value.detach().double() for key, value in model.layer.named_parameters()}
    stored = dense_state_dict(model)["layer.weight"].double()
    W = stored.T if isinstance(model.layer._shell[0], Conv1D) else stored
    if form == "factored":
        exact = update = held["U"] @ held["V"]
    else:
        base = held["base"].T if isinstance(model.layer._shell[0], Conv1D) else held["base"]
        update = 6.0 / RANK * held["lora_B"] @ held["lora_A"]
        exact = base + update
    return (torch.linalg.norm(W - exact) / torch.linalg.norm(update)).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_error_is_that_of_the_exported_weight(layer, form, dtype):
    model = net(layer, form, dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = merge_errors(model)
    assert list(errors) == ["layer"]
    assert errors["layer"] == pytest.approx(expected(model, form), rel=1e-3)
    assert errors["layer"] > torch.finfo(dtype).eps / 10
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_cast_in_full_precision(layer, form, dtype):
    model = net(layer, form, dtype)
    assert merge_errors(model) == {"layer": 0.0}
    assert expected(model, form) < 1e-5  # rounding of the product itself, of which the export keeps all digits


def test_an_update_below_the_resolution_is_lost():
    """All of W in [1, 2], where bfloat16 has steps of 1/128, and an update that is far smaller."""
    model = net("linear", "adapter", torch.bfloat16, size=1e-6)
    nn.init.constant_(model.layer.base, 1.5)
    assert merge_errors(model)["layer"] == pytest.approx(1.0, abs=1e-6)


def test_an_adapter_that_has_learned_nothing_loses_nothing():
    assert merge_errors(net("linear", "adapter", torch.bfloat16, size=0.0)) == {"layer": 0.0}


def test_of_a_gathered_state():
    """The state decides, not the model, which may be sharded; a process that gets none has nothing to tell."""
    model, other = net("linear", "adapter", torch.bfloat16), net("linear", "adapter", torch.bfloat16, size=1.0)
    assert merge_errors(model, other.state_dict()) == merge_errors(other) != merge_errors(model)
    assert merge_errors(model, {}) == {}
    assert merge_errors(Net(nn.Linear(2, 2))) == {}


# ---- what the user is told


def low_rank_llama(dtype: torch.dtype, size: float) -> nn.Module:
    model = tiny.llama()
    for name in ("q_proj", "v_proj"):
        path = f"model.layers.1.self_attn.{name}"
        layer = model.get_submodule(path)
        replace(model, [Swap(path, layer, convert(layer, Adapter(2)).module)])
        nn.init.normal_(model.get_submodule(path).lora_B, std=size if name == "v_proj" else 1.0)
    return model.to(dtype)


def messages(caplog, model: nn.Module, export: str) -> list[tuple[int, str]]:
    with caplog.at_level(logging.INFO, logger="hf_drt"):
        save_export(model, "unused", export, lambda folder, state: None)
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name.startswith("hf_drt")]


def test_a_dense_export_logs_the_largest_error(caplog):
    model = low_rank_llama(torch.bfloat16, size=0.5)
    worst = max(merge_errors(model).values())
    assert 0 < worst < 0.1
    said = f"dense export: rounding error of the merge at most {worst:.2g} (2 layers)"
    assert messages(caplog, model, "dense") == [(logging.INFO, said)]


def test_a_loss_is_a_warning_with_the_layer_and_a_way_out(caplog):
    ((level, text),) = messages(caplog, low_rank_llama(torch.bfloat16, size=1e-5), "dense")
    assert level == logging.WARNING
    assert "of what the factors of model.layers.1.self_attn.v_proj hold, the most of 2 layers" in text
    assert "Convert the model to float32 and save it again, or use export=native or adapter." in text


def test_a_native_export_has_nothing_to_round(caplog):
    assert messages(caplog, low_rank_llama(torch.bfloat16, size=1e-5), "native") == []


def test_a_dense_model_is_not_talked_about(caplog):
    with caplog.at_level(logging.INFO):
        DenseExporter().converted(nn.Sequential(nn.Linear(3, 3)), {"0.weight": torch.ones(3, 3)})
    assert not caplog.records
