"""Dynamic-rank training of a ResNet, from the first phase to the saved model."""

import json

import pytest
import tiny
import torch
import transformers as T

from hf_drt import DRTConfig, DRTTrainer, DynamicRank, dense_state_dict
from hf_drt.compress import compress
from hf_drt.forms import Adapter, Factored, form_of

DECOMPOSITIONS = ["svd", "tucker", "cp"]
CYCLE = "factored@0 dense@2 adapter@4 factored@6"


def trainer(folder, decomposition, **changes):
    arguments = {
        "max_steps": 8, "drt_schedule": CYCLE, "drt_decomposition": decomposition, "drt_rank_ratio": 0.25,
        "drt_moments": "project", **changes,
    }  # fmt: skip
    return DRTTrainer(
        model=tiny.resnet(), args=tiny.arguments(folder, **arguments), train_dataset=tiny.dataset("resnet", 32)
    )


def same(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, decomposition):
    whole = trainer(tmp_path / "whole", decomposition, save_strategy="steps", save_steps=5, drt_export="native")
    whole.train()
    forms = {form_of(m).decomposition for m in whole.model.modules() if isinstance(form_of(m), Factored)}
    assert forms == {decomposition}
    resumed = trainer(tmp_path / "whole", decomposition, save_strategy="steps", save_steps=5, drt_export="native")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert same(whole.model.state_dict(), resumed.model.state_dict()) == []


@pytest.mark.parametrize("schedule", ["factored@0", "adapter@0"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_the_saved_model_computes_the_same(tmp_path, decomposition, schedule):
    model = tiny.resnet()
    drt = DynamicRank(model, DRTConfig(schedule=schedule, decomposition=decomposition, rank_multiple=4), 10)
    drt.apply(0)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
    for step in range(2):
        drt.begin_step(step, optimizer)
        model(**tiny.batch("resnet")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inputs = tiny.batch("resnet")
    expected = tiny.logits(model, inputs)
    model.save_pretrained(tmp_path / "native")
    native = T.AutoModelForImageClassification.from_pretrained(tmp_path / "native")
    assert [form_of(m) for m in native.modules()] == [form_of(m) for m in model.modules()]
    assert same(native.state_dict(), model.state_dict()) == []
    assert torch.equal(tiny.logits(native, inputs), expected)
    dense = tiny.resnet()
    dense.load_state_dict(dense_state_dict(model))
    assert (tiny.logits(dense, inputs) - expected).abs().max() <= 1e-5


def test_a_state_of_svd_says_nothing_of_it_and_loads(tmp_path):
    drt = DynamicRank(tiny.resnet(), DRTConfig(schedule="factored@0", rank_multiple=4), 10)
    drt.apply(0)
    state = drt.state_dict()
    assert "decomposition" not in json.dumps(state)
    drt.check_state(state)
    other = DynamicRank(tiny.resnet(), DRTConfig(schedule="factored@0", rank_multiple=4, decomposition="cp"), 10)
    with pytest.raises(ValueError, match="decomposition is 'cp' here, and 'svd' in the state"):
        other.check_state(state)


@pytest.mark.parametrize(("decomposition", "alpha"), [("svd", 16.0), ("tucker", 1.0), ("cp", 64.0)])
def test_the_preset_has_the_settings_of_the_paper(decomposition, alpha):
    drt = DynamicRank(tiny.resnet(), DRTConfig(schedule="paper_conv", decomposition=decomposition), 100)
    assert str(drt.plan) == "factored:0.5@0 dense@37 adapter:0.5@80"
    last = drt.forms(2)["resnet.encoder.stages.1.layers.0.layer.1.convolution"]
    assert last == Adapter(16, alpha, "zero", decomposition, 16 if decomposition == "tucker" else None)
    assert DRTConfig(schedule="paper_conv", decomposition=decomposition, adapter_alpha=5).adapter_alpha == 5
    assert DRTConfig(schedule="paper", decomposition=decomposition).adapter_alpha == 16


def test_shortcuts_stem_and_classifier_stay_dense():
    drt = DynamicRank(tiny.resnet(), DRTConfig(schedule="paper_conv"), 100)
    assert drt.skipped == {
        "resnet.embedder.embedder.convolution": "outside of the blocks",
        "resnet.encoder.stages.0.layers.0.shortcut.convolution": "1x1 shortcut",
        "resnet.encoder.stages.1.layers.0.shortcut.convolution": "1x1 shortcut",
        "classifier.1": "outside of the blocks",
    }
    assert len(drt.targets) == 4


def test_frobenius_decay_is_of_two_factors():
    with pytest.raises(ValueError, match="frobenius_decay is the decay of a product U V"):
        DynamicRank(tiny.resnet(), DRTConfig(schedule="fixed", decomposition="cp", frobenius_decay=True), 100)
    with pytest.raises(ValueError, match="decomposition must be one of svd, tucker, cp"):
        DRTConfig(decomposition="qr")


def test_peft_computes_what_an_svd_adapter_computes(tmp_path):
    peft = pytest.importorskip("peft")
    from hf_drt.export import save_peft_adapter

    model = tiny.resnet()
    DynamicRank(model, DRTConfig(schedule="adapter@0", rank_multiple=4, seed=1), 10).apply(0)
    for module in model.modules():
        if isinstance(form_of(module), Adapter):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    inputs = tiny.batch("resnet")
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    base = T.AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    assert (tiny.logits(base, inputs) - tiny.logits(model, inputs)).abs().max() > 1e-3
    assert torch.equal(
        tiny.logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), inputs), tiny.logits(model, inputs)
    )


@pytest.mark.parametrize("decomposition", ["tucker", "cp"])
def test_peft_does_not_have_other_adapters(tmp_path, decomposition):
    from hf_drt.export import save_peft_adapter

    model = tiny.resnet()
    DynamicRank(model, DRTConfig(schedule="adapter@0", rank_multiple=4, decomposition=decomposition), 10).apply(0)
    with pytest.raises(ValueError, match="has an adapter that PEFT does not have"):
        save_peft_adapter(model, tmp_path)


@pytest.mark.parametrize("schedule", ["factored@0", "adapter@0"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_a_saved_model_can_be_inspected(tmp_path, decomposition, schedule):
    from hf_drt.forms import effective_weight
    from hf_drt.inspect.checkpoint import read_checkpoint

    model = tiny.resnet()
    DynamicRank(model, DRTConfig(schedule=schedule, decomposition=decomposition, rank_multiple=4), 10).apply(0)
    model.save_pretrained(tmp_path)
    layers = [layer for layer in read_checkpoint(tmp_path).layers if layer.form != form_of(torch.nn.Identity())]
    assert len(layers) == 4
    for layer in layers:
        assert torch.allclose(layer.matrix(), effective_weight(model.get_submodule(layer.name)), atol=1e-6)
        assert layer.spectrum().effective_rank > 1


def test_a_budget_of_parameters_is_shared_out_over_convolutions(tmp_path):
    model = tiny.resnet()
    weights = {name: m.weight.detach().flatten(1) for name, m in model.named_modules() if name.endswith("convolution")}
    result = compress(model, parameters=0.6, rank_multiple=1)
    before, after = result.parameters
    assert after <= 0.6 * before
    assert any(layer.rank for layer in result.layers)
    for layer in result.layers:
        S = torch.linalg.svdvals(weights[layer.name])
        tail = 0.0 if layer.rank is None else float((S[layer.rank :].square().sum() / S.square().sum()).sqrt())
        assert layer.error == pytest.approx(tail, abs=1e-5)
    model.save_pretrained(tmp_path)
    loaded = T.AutoModelForImageClassification.from_pretrained(tmp_path)
    inputs = tiny.batch("resnet")
    assert torch.equal(tiny.logits(loaded, inputs), tiny.logits(model, inputs))
