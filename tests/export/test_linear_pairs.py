"""The format linear-pairs: what is written loads without hf_drt, computes the same, and is found by others."""

import json
import subprocess
import sys
from pathlib import Path

import mixed as kit
import pytest
import tiny
import torch
import transformers as T
from safetensors import safe_open
from torch import nn

from hf_drt import Factored, convert, declare, find_targets, save_linear_pairs
from hf_drt.checkpoint import CheckpointError
from hf_drt.export import Written, save_export
from hf_drt.forms import AdapterLinear, FactoredLinear, form_of
from hf_drt.registry import EXPORTERS
from hf_drt.targets import Swap, replace

ROOT = Path(__file__).parents[2]
FILE = "modeling_linear_pairs.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Where transformers copies the code of checkpoints before it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def factored(kind: str = "llama", rank: int = 4, model: nn.Module | None = None) -> nn.Module:
    """A model with every linear target in factors; experts stay dense."""
    model = model if model is not None else kit.MODELS[kind]()
    layers = {name: layer for name, layer in find_targets(model).targets.items() if isinstance(layer, nn.Module)}
    layers = {name: layer for name, layer in layers.items() if "experts" not in name}
    replace(model, [Swap(name, layer, convert(layer, Factored(rank)).module) for name, layer in layers.items()])
    declare(model)
    return model


def load(folder: Path, kind: str = "llama", **options) -> nn.Module:
    return tiny.AUTO[kind].from_pretrained(folder, trust_remote_code=True, **options)


def linears(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Linear) for module in model.modules())


@pytest.mark.parametrize("kind", kit.MODELS)
def test_logits_are_those_of_the_native_model_to_the_bit(tmp_path, kind):
    model = factored(kind)
    low = [name for name, layer in model.named_modules() if isinstance(layer, FactoredLinear)]
    assert save_linear_pairs(model, tmp_path) == "linear-pairs"
    loaded = load(tmp_path, kind)
    assert kit.difference(loaded, model, kind) == 0
    assert linears(loaded) == linears(model) + 2 * len(low)
    for name in low:
        pair, layer = loaded.get_submodule(name), model.get_submodule(name)
        assert isinstance(pair, nn.Sequential)
        assert [type(part) for part in pair] == [nn.Linear, nn.Linear]
        assert torch.equal(pair[0].weight, layer.V)
        assert torch.equal(pair[1].weight, layer.U)
        assert pair[0].bias is None
        assert (pair[1].bias is None) == (layer.bias is None)


@pytest.mark.parametrize("kind", kit.MODELS)
def test_of_mixed_forms_adapters_are_merged_and_what_is_loaded_saves_to_the_same_bytes(tmp_path, kind):
    model = kit.mixed(kind)
    model.save_pretrained(tmp_path / "native")  # which writes architecture and dtype into the configuration
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    save_linear_pairs(model, tmp_path / "a")
    loaded = load(tmp_path / "a", kind)
    assert kit.difference(loaded, model, kind) < 2e-6
    adapters = [name for name, layer in model.named_modules() if type(layer) is AdapterLinear]
    assert adapters
    for name in adapters:
        W = loaded.get_submodule(name).weight
        torch.testing.assert_close(W, model.get_submodule(name).weight.detach() + 0, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "b")
    assert kit.files(tmp_path / "b") == kit.files(tmp_path / "a")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.to_dict() == config


WITHOUT_HF_DRT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_drt":
            raise ImportError("hf_drt is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(12).view(2, 6)
with torch.no_grad():
    torch.save({
        "logits": model(input_ids=ids).logits,
        "text": model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids)),
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
    }, sys.argv[2])
assert not any(name.split(".")[0] == "hf_drt" for name in sys.modules)
"""


def test_without_hf_drt_it_loads_from_shards_and_generates(tmp_path):
    model = factored(model=tiny.llama(tie_word_embeddings=True))
    save_linear_pairs(model, tmp_path / "pairs", max_shard_size="10KB")
    assert len(list((tmp_path / "pairs").glob("model-*.safetensors"))) > 1
    command = [sys.executable, "-c", WITHOUT_HF_DRT, str(tmp_path / "pairs"), str(tmp_path / "seen")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = torch.load(tmp_path / "seen")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(seen["logits"], tiny.logits(model, {"input_ids": ids}))
    text = model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))
    assert torch.equal(seen["text"], text)
    assert seen["tied"]


def test_the_dtype_is_kept_and_may_be_chosen(tmp_path):
    model = factored().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "native")
    save_linear_pairs(model, tmp_path / "pairs")
    for dtype, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        loaded = load(tmp_path / "pairs", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {expected}
        assert kit.difference(loaded, tiny.AUTO["llama"].from_pretrained(tmp_path / "native", dtype=dtype)) == 0


def test_config_json_has_the_ranks_and_the_file_holds_what_is_small(tmp_path):
    save_linear_pairs(factored(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["linear_pairs"].values()) == {4}
    assert len(config["linear_pairs"]) == 14
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_linear_pairs.LinearPairsLlamaForCausalLM"
    assert config["architectures"] == ["LinearPairsLlamaForCausalLM"]
    assert "quantization_config" not in config
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    up = {key.removeprefix("model.layers.0.mlp.up_proj."): size for key, size in shapes.items() if "0.mlp.up" in key}
    assert up == {"0.weight": (4, 32), "1.weight": (64, 4), "weight": (0, 32)}


def test_the_code_that_is_written_passes_ruff(tmp_path):
    save_linear_pairs(factored("bert"), tmp_path)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check"], ["format", "--check"]):
        options = ["--config", str(ROOT / "pyproject.toml"), str(tmp_path / FILE)]
        done = subprocess.run([*ruff, *command, *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_without_trust_in_the_code_loading_stops(tmp_path):
    save_linear_pairs(factored(), tmp_path)
    for cls in (T.AutoModelForCausalLM, T.LlamaForCausalLM, T.AutoModel):
        with pytest.raises(RuntimeError, match="You set `ignore_mismatched_sizes` to `False`"):
            cls.from_pretrained(tmp_path)


def test_the_builder_keeps_shared_layers_shared():
    from hf_drt.export.pairs.modeling import LinearPair, put_pairs

    model = tiny.llama()
    first, second = model.model.layers
    second.mlp = first.mlp
    second.self_attn.q_proj = first.self_attn.q_proj
    names = [f"model.layers.{i}.{name}" for i in (0, 1) for name in ("mlp.up_proj", "self_attn.q_proj")]
    put_pairs(model, dict.fromkeys(names, 3))
    assert isinstance(first.mlp.up_proj, LinearPair)
    assert second.self_attn.q_proj is first.self_attn.q_proj
    assert sum(isinstance(module, LinearPair) for module in model.modules()) == 2


# ---- what others find


def int8_layers(model: nn.Module) -> int:
    from torchao.quantization import Int8Tensor

    return sum(isinstance(p, Int8Tensor) for p in model.parameters())


def test_quantize_of_torchao_skips_factored_layers_and_reaches_pairs(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = factored()
    save_linear_pairs(model, tmp_path)
    pairs = load(tmp_path)
    expected = tiny.logits(pairs, tiny.batch())
    for quantized in (model, pairs):
        quantize_(quantized, Int8WeightOnlyConfig())
    assert int8_layers(model) == 1  # the head; the fourteen factored layers are passed over in silence
    assert int8_layers(pairs) == 1 + 2 * 14
    difference = (tiny.logits(pairs, tiny.batch()) - expected).abs().max()
    assert 0 < difference < 0.02 * expected.abs().max()


def test_transformers_quantizes_pairs_as_it_loads_them(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    save_linear_pairs(factored(), tmp_path)
    loaded = load(tmp_path, quantization_config=T.TorchAoConfig(Int8WeightOnlyConfig()))
    assert int8_layers(loaded) == 2 * 14  # transformers leaves the head alone


# ---- what cannot be pairs


def test_convolutions_and_experts_are_merged_and_named(tmp_path, caplog):
    model = kit.mixed("mixtral")
    save_linear_pairs(model, tmp_path)
    (said,) = [r.getMessage() for r in caplog.records if "are merged" in r.getMessage()]
    assert "model.layers.0.mlp.experts.down_proj" in said
    assert "export=native keeps their factors" in said
    assert not any("experts" in name for name in json.loads((tmp_path / "config.json").read_text())["linear_pairs"])


def test_without_a_factored_linear_layer_the_model_is_saved_dense(tmp_path, caplog):
    model = tiny.resnet()
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3))
    replace(model, [Swap(name, layer, convert(layer, Factored(2)).module)])
    declare(model)
    assert save_linear_pairs(model, tmp_path) == "dense"
    assert "export=linear-pairs, but no linear layer is factored. The model is saved in dense form." in caplog.text
    assert not (tmp_path / FILE).exists()
    loaded = T.AutoModelForImageClassification.from_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(loaded.eval()(pixels).logits, model.eval()(pixels).logits)


class Mine(T.LlamaForCausalLM):
    """A class of a user's."""


def test_another_class_than_one_of_transformers_is_refused(tmp_path):
    model = factored(model=Mine(tiny.llama().config))
    with pytest.raises(ValueError, match=r"and Mine \(of test_linear_pairs\) is another class\. Use export=dense"):
        save_linear_pairs(model, tmp_path / "x")
    container = nn.Sequential(factored())
    with pytest.raises(ValueError, match=r"and Sequential \(of torch.*\) is another class"):
        save_linear_pairs(container, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_class_that_no_auto_class_loads_is_refused(monkeypatch):
    monkeypatch.setattr("hf_drt.export.pairs.exporter.auto_classes", lambda name: ())
    with pytest.raises(ValueError, match=r"none of them loads LlamaForCausalLM\. Use export=dense"):
        EXPORTERS["linear-pairs"].check_model(tiny.llama())


# ---- in a trainer


def test_a_run_saves_it_checks_what_has_landed_and_a_dense_save_takes_the_code_away(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2, drt_schedule="factored@0", drt_export="linear-pairs")
    trainer.train()
    trainer.save_model()
    assert kit.difference(load(tmp_path), trainer.model) == 0
    assert {type(form_of(layer)) for layer in find_targets(trainer.model).targets.values()} == {Factored}
    save_export(trainer.model, str(tmp_path), "dense", lambda where, state: trainer.model.save_pretrained(where))
    assert not (tmp_path / FILE).exists()
    T.LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "lost"),
    [
        (lambda folder: (folder / FILE).unlink(), r"modeling_linear_pairs\.py"),
        (
            lambda folder: kit.edit_weights(folder, lambda w: w.pop("model.layers.0.mlp.up_proj.1.weight")),
            r"up_proj\.1",
        ),
        (
            lambda folder: kit.edit_weights(folder, lambda w: [t.zero_() for t in w.values()]),
            r"\.0\.weight of the model",
        ),
    ],
    ids=["code", "tensor", "values"],
)
def test_what_has_landed_is_compared_with_the_model(tmp_path, break_it, lost):
    model = factored()
    save_linear_pairs(model, tmp_path)
    EXPORTERS["linear-pairs"].verify(Written(tmp_path, 0), model)
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=rf"should hold a model in linear pairs, but has not .*{lost}"):
        EXPORTERS["linear-pairs"].verify(Written(tmp_path, 0), model)


def test_a_model_that_cannot_be_written_so_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"export=linear-pairs writes code around a model class of transformers"):
        tiny.trainer(tmp_path, Mine(tiny.llama().config), drt_schedule="factored@0", drt_export="linear-pairs")


def test_the_card_says_how_to_load_it():
    code = EXPORTERS["linear-pairs"].code_for("BertForMaskedLM", "user/name")
    assert code == (
        "from transformers import AutoModelForMaskedLM\n\n"
        'model = AutoModelForMaskedLM.from_pretrained("user/name", trust_remote_code=True)'
    )
