"""Checkpoints read layer by layer, against the dense weights and numpy's singular values."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hf_drt import Adapter, CheckpointError, Dense, Factored, convert, declare, dense_state_dict, find_targets
from hf_drt.inspect.checkpoint import Spectrum, read_checkpoint, spectra
from hf_drt.inspect.comparison import common_layers, weight_differences
from hf_drt.targets.surgery import Swap, replace


def mixed(kind="llama"):
    """A model with factored, adapter and dense layers in turn."""
    model = tiny.MODELS[kind]()
    forms = [Factored(6), Adapter(4, alpha=8.0), Dense()]
    for index, (name, layer) in enumerate(find_targets(model).targets.items()):
        new = convert(layer, forms[index % 3]).commit()
        if isinstance(new.form if hasattr(new, "form") else None, Adapter):
            torch.nn.init.normal_(new.lora_B, std=0.1)
        replace(model, [Swap(name, layer, new)])
    declare(model)
    return model


@pytest.fixture
def native(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path / "native")
    return model, tmp_path / "native"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_spectra_are_those_of_the_effective_weights(kind, tmp_path):
    model = mixed(kind)
    model.save_pretrained(tmp_path)
    dense = dense_state_dict(model)
    found = read_checkpoint(tmp_path)
    assert found.kind == "native model"
    assert {layer.name for layer in found.layers} == set(find_targets(model).targets)
    for spectrum in spectra(found.layers):
        W = dense[f"{spectrum.layer.name}.weight"].numpy()
        values = np.linalg.svd(W, compute_uv=False)
        ours = spectrum.values.numpy()
        np.testing.assert_allclose(ours, values[: len(ours)], atol=2e-5)
        p = values / values.sum()
        assert spectrum.effective_rank == pytest.approx(np.exp(-(p * np.log(p + 1e-30)).sum()), rel=2e-2)
        assert spectrum.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-4)
        # stored W is (in, out) in GPT-2; a low-rank layer's matrix is (out, in)
        matrix = spectrum.layer.matrix().numpy()
        low_rank = not isinstance(spectrum.layer.form, Dense)
        np.testing.assert_allclose(matrix, W.T if kind == "gpt2" and low_rank else W, atol=1e-5)


def test_forms_and_ranks(native):
    forms = [layer.form for layer in read_checkpoint(native[1]).layers]
    assert Factored(6) in forms
    assert Adapter(4, alpha=8.0) in forms
    assert Dense() in forms


def test_what_could_be_truncated_is_the_smallest_rank_within_the_error(native):
    layer = next(layer for layer in read_checkpoint(native[1]).layers if layer.form == Dense())
    W = layer.matrix().numpy()
    U, S, Vh = np.linalg.svd(W, full_matrices=False)

    def error(rank):
        return np.linalg.norm(W - U[:, :rank] * S[:rank] @ Vh[:rank]) / np.linalg.norm(W)

    spectrum = layer.spectrum()
    form = spectrum.truncated(0.8)
    assert error(form.rank) <= 0.8 < error(form.rank - 1)
    assert spectrum.truncated(1e-6) == Dense()
    rank = round(0.25 * min(W.shape))
    assert spectrum.error(0.25) == pytest.approx(error(rank), rel=1e-4)
    assert spectrum.energy(0.25) == pytest.approx(1 - error(rank) ** 2, rel=1e-4)
    assert (S[: spectrum.energy_rank(0.9)] ** 2).sum() >= 0.9 * (S**2).sum()
    assert (S[: spectrum.energy_rank(0.9) - 1] ** 2).sum() < 0.9 * (S**2).sum()


def test_shards_are_read_as_one_file_is(tmp_path):
    model = tiny.llama()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (read_checkpoint(tmp_path / name) for name in ("one", "many"))
    assert (one.kind, one.parameters) == (many.kind, many.parameters) == ("dense model", model.num_parameters())
    for a, b in zip(spectra(one.layers), spectra(many.layers), strict=True):
        assert a.layer.name == b.layer.name
        assert torch.equal(a.values, b.values)


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    tiny.llama().save_pretrained(tmp_path)
    import hf_drt.inspect.checkpoint as inspection

    read = []
    original = inspection.StoredLayer.tensor
    monkeypatch.setattr(inspection.StoredLayer, "tensor", lambda s, n: read.append(s.name) or original(s, n))
    found = read_checkpoint(tmp_path)
    assert read == []
    stream = spectra(found.layers)
    next(stream)
    assert read == [found.layers[0].name]


def test_of_a_dense_model_the_linear_layers_of_blocks_are_shown(tmp_path):
    for kind in ("llama", "gpt2", "t5"):
        model = tiny.MODELS[kind]()
        model.save_pretrained(tmp_path / kind)
        assert {layer.name for layer in read_checkpoint(tmp_path / kind).layers} == set(find_targets(model).targets)


def test_layers_are_in_natural_order(tmp_path):
    tensors = {f"layers.{index}.fc.weight": torch.randn(4, 4) for index in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    names = [layer.name for layer in read_checkpoint(tmp_path / "model.safetensors").layers]
    assert names == [f"layers.{index}.fc" for index in range(12)]


def test_a_training_checkpoint_shows_plan_and_targets(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=1,
                           drt_schedule="factored@0 dense@2", drt_exclude=["mlp"])  # fmt: skip
    trainer.train()
    found = read_checkpoint(tmp_path / "checkpoint-2")
    assert found.kind == "training checkpoint"
    assert found.plan == ("factored@0 dense@2", 4, 0)
    assert {layer.name for layer in found.layers} == set(trainer.drt.targets)
    assert all(isinstance(layer.form, Factored) for layer in found.layers)
    assert all(layer.form == Dense() for layer in read_checkpoint(tmp_path / "checkpoint-4").layers)
    _check_damaged_states(tmp_path / "checkpoint-2")


def _check_damaged_states(folder):
    path = folder / "drt_state.json"
    whole = json.loads(path.read_text())
    for change, message in [
        ({"format_version": 99}, "format version 99; this hf_drt reads 1 to 1. Upgrade hf_drt"),
        ({"plan": "factored@0 dnse@2"}, r"its plan 'factored@0 dnse@2' cannot be read \('dnse' in"),
        ({"plan": None}, "its plan None cannot be read"),
        ({"phase": 7}, r"its plan .* cannot be read \(phase 7 of 2"),
        ({"layers": {"a": {"form": "cubic", "shape": [2, 2]}}}, "is damaged: its layers cannot be read"),
    ]:
        path.write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(folder)


def test_what_is_no_checkpoint(tmp_path, native):
    with pytest.raises(CheckpointError, match=r"there is no such path: .*nowhere\. Give the folder of a checkpoint"):
        read_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is not a checkpoint: it holds neither"):
        read_checkpoint(tmp_path / "empty")
    for name, message in [
        ("adapter_config.json", "holds a PEFT adapter, which holds no weights of its own"),
        ("pytorch_model.bin", "holds weights as pytorch_model.bin: load them and save them again"),
        ("pytorch_model_fsdp_0", r"holds weights in FSDP's shards: save the whole model with trainer.save_model\(\)"),
    ]:
        other = tmp_path / f"other-{name}"
        other.mkdir()
        (other / name).touch()
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(other)
    save_file({"embed.weight": torch.zeros(4, 4)}, tmp_path / "embed.safetensors")
    with pytest.raises(CheckpointError, match="holds no linear layer inside a block, so there is nothing to inspect"):
        read_checkpoint(tmp_path / "embed.safetensors")


def test_damaged_and_newer_native_models(tmp_path, native):
    folder = native[1]

    def changed(name, **changes):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        config["quantization_config"] |= changes
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    with pytest.raises(CheckpointError, match="native format version 9; this hf_drt reads 1 to 1"):
        read_checkpoint(changed("newer", format_version=9))
    layers = {"model.layers.0.mlp.nothing": {"shape": [4, 4], "form": "factored", "rank": 2}}
    with pytest.raises(CheckpointError, match=r"the weights lack model\.layers\.0\.mlp\.nothing\.U, which Factored"):
        read_checkpoint(changed("missing", layers=layers))
    cut = changed("cut")
    path = cut / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors is cut short or damaged"):
        read_checkpoint(cut)
    broken = changed("broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        read_checkpoint(broken)


def test_weights_that_cannot_be_decomposed(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    for value, message in [
        (torch.full((64, 32), float("nan")), f"{name}: svd got a matrix"),
        (torch.zeros(64, 32, dtype=torch.int8), f"{name}.weight is quantized"),
    ]:
        save_file(tensors | {f"{name}.weight": value}, tmp_path / "model.safetensors")
        layer = next(layer for layer in read_checkpoint(tmp_path).layers if layer.name == name)
        with pytest.raises(CheckpointError, match=message):
            layer.spectrum()


def test_a_spectrum_of_zeros():
    layer = type("Layer", (), {"shape": (8, 8)})()
    spectrum = Spectrum(layer, torch.zeros(8))
    assert (spectrum.effective_rank, spectrum.stable_rank, spectrum.error(0.5)) == (0, 0, 0)
    assert spectrum.truncated(0.1) == Factored(1)


def test_a_weight_that_is_no_number_is_named_where_models_are_compared(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    for folder, value in ("a", 0.5), ("b", np.nan):
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
        model.save_pretrained(tmp_path / folder)
    pairs = common_layers(*(read_checkpoint(tmp_path / folder).layers for folder in "ab"))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp\.up_proj\.?\w*: .* holds inf or nan"):
        list(weight_differences(pairs))
