"""A native checkpoint that does not fit, or is damaged, is refused by from_pretrained: no wrong weights are used."""

import re

import pytest
import tiny
import torch
import transformers as T
from mixed import edit_block, edit_weights, mixed
from transformers.quantizers import auto

from hf_drt import Adapter, CheckpointError
from hf_drt.export import NativeConfig
from hf_drt.native_format import make_known

LAYER = "model.layers.0.self_attn.k_proj"  # Factored(rank=4), of shape (32, 32)


@pytest.fixture
def saved(tmp_path):
    mixed().save_pretrained(tmp_path)
    return tmp_path


def refused(folder, message: str, cls=T.AutoModelForCausalLM, **options) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        cls.from_pretrained(folder, **options)


# ---- the block


@pytest.mark.parametrize("version", [None, "1", 0, 1.5, True])
def test_a_damaged_version(saved, version):
    edit_block(saved, lambda block: block.update(format_version=version))
    refused(saved, f"quantization_config has format_version {version!r}: config.json is damaged.")


def test_a_newer_version(saved):
    edit_block(saved, lambda block: block.update(format_version=2))
    refused(saved, "native format version 2; this hf_drt reads 1 to 1. Upgrade hf_drt.")
    with pytest.raises(ValueError, match=r"Upgrade hf_drt\."):
        T.pipeline("text-generation", model=str(saved))


@pytest.mark.parametrize("layers", [None, {}, ["model.layers.0"]])
def test_damaged_layers(saved, layers):
    edit_block(saved, lambda block: block.update(layers=layers))
    refused(saved, f"quantization_config declares the layers {layers!r}; allowed is a JSON object")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        "factored",
        {"form": "factored", "rank": 4},
        {"shape": [32], "form": "factored", "rank": 4},
        {"shape": [32, "32"], "form": "factored", "rank": 4},
        {"shape": [32, 32], "form": "factored"},
        {"shape": [32, 32], "form": "factored", "rank": 33},
        {"shape": [32, 32], "form": "factored", "rank": "4"},
        {"shape": [32, 32], "form": "tensor_train", "rank": 4},
        {"shape": [32, 32], "form": "dense"},
        {"shape": [32, 32], "form": "adapter", "rank": 4, "alpha": None},
        {"shape": [32, 32], "form": "factored", "rank": 4, "alpha": 1.0},
    ],
)
def test_a_damaged_entry(saved, entry):
    edit_block(saved, lambda block: block["layers"].update({LAYER: entry}))
    refused(saved, f"quantization_config describes {LAYER} as {entry!r}; allowed are a shape [out, in], and a form")


def test_a_decomposition_of_another_package_is_asked_for_by_name(saved):
    entry = {"shape": [32, 32], "form": "factored", "rank": 4, "decomposition": "tensor_train"}
    edit_block(saved, lambda block: block["layers"].update({LAYER: entry}))
    refused(
        saved,
        f"{LAYER} is of the decomposition 'tensor_train', which is not registered; registered are svd, tucker, cp. "
        "Import the package that adds it before loading the checkpoint",
    )


# ---- the model


def test_a_layer_that_the_model_lacks(saved):
    edit_block(saved, lambda block: block["layers"].update({"model.layers.7.mlp": block["layers"].pop(LAYER)}))
    refused(
        saved, "LlamaForCausalLM lacks model.layers.7.mlp, which the checkpoint holds in low-rank form. Load it with"
    )


def test_a_model_with_fewer_blocks(saved):
    more = sum(name.startswith("model.layers.1.") for name in mixed().config.quantization_config["layers"]) - 3
    refused(saved, f" and {more} more, which the checkpoint holds in low-rank form", num_hidden_layers=1)


@pytest.mark.parametrize("cls", [T.GPT2LMHeadModel, T.GPT2Model])
def test_a_model_without_any_of_the_layers(saved, cls):
    config = tiny.gpt2().config
    config.quantization_config = mixed().config.quantization_config
    refused(saved, f"{cls.__name__} lacks model.layers.0.", cls, config=config)


def test_a_layer_of_another_shape(saved):
    edit_block(saved, lambda block: block["layers"][LAYER].update(shape=[16, 32]))
    refused(saved, f"{LAYER} of LlamaForCausalLM has shape (out, in) = (32, 32), and (16, 32) in the checkpoint.")


def test_a_model_of_another_width(saved):
    refused(
        saved, "down_proj of LlamaForCausalLM has shape (out, in) = (32, 48), and (32, 64) in", intermediate_size=48
    )


def test_a_layer_that_is_not_linear_in_the_model(saved):
    edit_block(saved, lambda b: b["layers"].update({"model.embed_tokens": b["layers"].pop(LAYER)}))
    refused(
        saved, "model.embed_tokens of LlamaForCausalLM is a Embedding, and in the checkpoint a linear layer of shape"
    )


# ---- the weights


def test_a_missing_tensor(saved):
    edit_weights(saved, lambda weights: weights.pop(f"{LAYER}.U"))
    refused(saved, f"the weights lack {LAYER}.U, which Factored(rank=4) in config.json needs. Save or download")
    refused(saved, f"the weights lack {LAYER}.U", T.AutoModel)


def test_a_missing_bias(tmp_path):
    mixed("gpt2").save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop("transformer.h.0.attn.c_proj.bias"))
    refused(tmp_path, "the weights lack transformer.h.0.attn.c_proj.bias")


@pytest.mark.parametrize("name", ["lora_A", "bias"])
def test_an_unexpected_tensor(saved, name):
    edit_weights(saved, lambda weights: weights.update({f"{LAYER}.{name}": torch.zeros(4, 32)}))
    refused(saved, f"the weights hold {LAYER}.{name}, which Factored(rank=4) in config.json does not have.")


def test_a_tensor_of_another_rank(saved):
    edit_block(saved, lambda block: block["layers"][LAYER].update(rank=6))
    refused(saved, f"{LAYER}.U has shape (32, 4) in the weights, where Factored(rank=6) in config.json needs (32, 6).")
    refused(saved, f"{LAYER}.U has shape (32, 4) in the weights", ignore_mismatched_sizes=True)


def test_another_form_than_declared(saved):
    entry = {"shape": [32, 32], "form": "adapter", "rank": 4, "alpha": 16.0, "init": "zero"}
    edit_block(saved, lambda block: block["layers"].update({LAYER: entry}))
    refused(saved, f"the weights lack {LAYER}.base, which {Adapter(4, 16.0)} in config.json needs.")


def test_dense_weights_with_the_configuration_of_a_low_rank_model(saved):
    model = mixed()
    T.LlamaForCausalLM(model.config).save_pretrained(saved / "dense")
    refused(saved / "dense", "in dense form, while config.json declares it as Adapter(")


def test_a_file_that_was_cut_short(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(saved, f"{path} is cut short or damaged", dtype=torch.float32)


@pytest.mark.parametrize(
    "change", [lambda state: state.pop(f"{LAYER}.U"), lambda state: state.update({f"{LAYER}.U": torch.zeros(32, 5)})]
)
def test_a_state_dict_without_or_with_another_tensor(change):
    model = mixed()
    state = model.state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=rf"the weights lack {LAYER}\.U, or hold them in another"):
        T.LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=state, ignore_mismatched_sizes=True)


# ---- other ways


@pytest.mark.filterwarnings("ignore:Passing `tp_plan`")
def test_tensor_parallelism(saved):
    refused(saved, "low-rank layers cannot be spread by tensor parallelism.", tp_plan="auto")


def test_the_format_is_no_way_to_convert_a_dense_checkpoint(tmp_path):
    model = mixed()
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hf_drt does require the model to be pre-quantized"):
        T.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=NativeConfig(**model.config.quantization_config)
        )


def test_registering_twice_is_harmless(saved):
    make_known(auto)
    make_known(auto)
    T.AutoModelForCausalLM.from_pretrained(saved)
