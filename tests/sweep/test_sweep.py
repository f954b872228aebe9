"""The sweep over architectures: shrinking, the table, crashing processes, and a few types for real."""

import json

import pytest
import torch
from transformers import PretrainedConfig

from tests.sweep import pool
from tests.sweep.__main__ import main
from tests.sweep.attempt import FAILED, NOTHING, PASSED, UNBUILT, Result, attempt, built
from tests.sweep.catalog import model_types
from tests.sweep.cycle import TOLERANCE, Blind, Fault, _altered, _compare, forward
from tests.sweep.inputs import learned
from tests.sweep.own_inputs import INPUTS
from tests.sweep.own_sizes import CONFIGS
from tests.sweep.shrink import Variant, tiny_config
from tests.sweep.table import short, summary

DIVERSE = (
    "bert", "clip", "gpt2", "llama4_text", "llava", "longcat_flash", "mixtral", "reformer", "t5", "vit", "whisper",
)  # fmt: skip


def test_every_type_of_automodel_is_counted_and_parts_are_types_of_their_own():
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    types = model_types()
    assert set(MODEL_MAPPING_NAMES) <= set(types)
    assert types["clip_vision_model"] == "CLIPVisionModel"


def test_a_tiny_llama_has_heads_that_divide_its_width_and_derived_fields_that_follow():
    config = tiny_config("llama")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 64, 4)
    assert config.head_dim * config.num_attention_heads == config.hidden_size
    assert tiny_config("llama", Variant(layers=None)).num_hidden_layers == 32


def test_a_configuration_inside_another_is_shrunk_and_shares_placeholder_tokens():
    config = tiny_config("llava")
    assert isinstance(config.vision_config, PretrainedConfig)
    assert config.vision_config.image_size == 3 * config.vision_config.patch_size
    assert config.image_token_id < config.text_config.vocab_size


def test_an_error_of_a_forward_pass_tells_the_number_of_placeholders():
    message = "Image features and image tokens do not match, tokens: 0, features: 18"
    assert learned(message) == {"image": 18}
    assert learned("something else") == {}


def test_outputs_that_differ_are_a_fault_and_infinite_masks_are_not():
    a = [torch.tensor([1.0, float("-inf")])]
    assert _compare(a, [a[0].clone()], torch.float32, "x") == 0
    with pytest.raises(Fault, match=r"x: relative difference 1.0e-01, allowed is 0.0001"):
        _compare(a, [torch.tensor([1.1, float("-inf")])], torch.float32, "x")


def test_the_table_counts_outcomes_and_joins_equal_causes():
    facts = {"targets": 3, "reached": 2, "dense": {"tied": 1}, "error": 1e-6, "dtype": "float32"}
    passed = Result("clip", "A", PASSED, facts=facts | {"variant": {"text_only": True}})
    results = [passed, Result("clip_text_model", "B", UNBUILT, "x|y"), Result("c", "C", UNBUILT, "x|y")]
    text = summary([*results, Result("d", "D", FAILED, "z"), Result("e", "E", NOTHING, "none")])
    assert "| passed | 1 |" in text
    assert "| all | 5 |" in text
    assert "| x/y | c, clip_text_model |" in text
    assert "Passed: 1 types with 3 target layers, of which 2 got gradients; 1 of the types were fed text alone" in text
    assert "Types in which no target layer got gradients: none." in text
    assert "of 4, 1 have a type that has passed, 1 have nothing to select; the others: c, d." in text
    assert "| tied | clip |" in text


def test_a_cause_is_one_short_line():
    text = "ImportError: M requires the timm library but it was not found in your environment. (import_utils.py:1)"
    assert short(text) == "needs timm, which is not installed"
    assert short("ValueError: 172,277,121 parameters after shrinking, more than 60") == "too large after shrinking"
    text = "E: Validation error for field 'backbone': TypeError: Field 'backbone' with value PosixPath('/x') does not"
    assert short(text) == "its from_pretrained takes a name of timm, not a folder"
    assert short("KeyError: 'x' (modeling_y.py:7)") == "KeyError: 'x' (modeling_y.py:7)"
    assert short("E: " + "a" * 200 + " (modeling_y.py:7)") == "E: " + "a" * 94 + "... (modeling_y.py:7)"


def test_a_tiny_backbone_gives_as_many_maps_as_the_full_one():
    backbone = tiny_config("rt_detr").backbone_config
    assert list(backbone.out_indices) == [2, 3, 4]


def test_a_process_that_hangs_or_dies_costs_one_type(monkeypatch):
    import os
    import time

    def work(model_type, name):
        if model_type == "hangs":
            time.sleep(60)
        if model_type == "dies":
            os._exit(3)
        return Result(model_type, name, PASSED)

    monkeypatch.setattr(pool, "attempt", work)
    found = {r.model_type: r for r in pool.sweep([(n, "X") for n in ("hangs", "dies", "works")], 2, 1.0)}
    assert found["works"].outcome == PASSED
    assert found["dies"].cause == "the process ended with exit code 3"
    assert found["hangs"].cause == "no result after 1 s"


def test_a_pattern_that_matches_no_type_is_refused(capsys, tmp_path):
    assert main(["--only", "^nosuch$", "--output", str(tmp_path / "x")]) == 2
    assert "matches none of the model types" in capsys.readouterr().err


@pytest.mark.parametrize("model_type", DIVERSE)
def test_a_type_goes_through_all_forms(model_type):
    result = attempt(model_type, model_types()[model_type])
    assert (result.outcome, result.cause) == (PASSED, "")
    assert result.facts["reached"] > 0


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "model_type", ["clap", "dia", "granite4_vision", "idefics", "kosmos-2", "minicpm_ocr", "omdet-turbo", "tvp"]
)
def test_images_and_sounds_reach_every_layer_of_a_whole_model(model_type):
    result = attempt(model_type, model_types()[model_type])
    assert (result.outcome, result.cause) == (PASSED, "")
    assert result.facts["reached"] == result.facts["targets"]
    assert not result.facts["variant"]["text_only"]


def test_overrides_are_in_alphabetical_order_and_inputs_are_those_of_types_that_are_swept():
    assert list(CONFIGS) == sorted(CONFIGS)
    assert list(INPUTS) == sorted(INPUTS)
    assert set(INPUTS) <= set(model_types())


def test_a_model_that_takes_a_session_with_the_frames_of_a_film_goes_through_all_forms():
    result = attempt("sam2_video", "Sam2VideoModel")
    assert (result.outcome, result.cause) == (PASSED, "")
    assert result.facts["reached"] == 0  # its forward pass runs in inference mode


def test_a_type_whose_outputs_do_not_feel_its_layers_passes_with_larger_weights_alone(monkeypatch):
    result = attempt("sam_vision_model", "SamVisionModel")  # begins with weights of 1e-10
    assert (result.outcome, result.facts["enlivened"], result.facts["error"] > 0) == (PASSED, True, True)
    monkeypatch.setattr("tests.sweep.attempt.enlivened", lambda model: model)
    result = attempt("sam_vision_model", "SamVisionModel")
    assert (result.outcome, result.cause) == (UNBUILT, "no output depends on the target layers")


def test_outputs_that_are_nan_before_and_after_the_truncation_prove_nothing():
    with pytest.raises(Blind, match="no output depends on the target layers"):
        _altered([torch.tensor([float("nan")])], [torch.tensor([float("nan")])])


def test_what_older_weights_made_of_a_text_is_forgotten():
    model, inputs, _ = built("omdet-turbo", "OmDetTurboForObjectDetection")
    before = forward(model, inputs)
    with torch.no_grad():
        for parameter in model.language_backbone.parameters():
            parameter.mul_(1.5)
    assert any(not torch.equal(a, b) for a, b in zip(before, forward(model, inputs), strict=True))


@pytest.mark.parametrize("model_type", ["bert", "mixtral"])
def test_what_rounding_may_have_changed_is_tried_in_double_precision(model_type, monkeypatch):
    monkeypatch.setitem(TOLERANCE, torch.float32, 0.0)
    result = attempt(model_type, model_types()[model_type])
    assert (result.outcome, result.cause, result.facts["dtype"]) == (PASSED, "", "float64")


def test_a_form_that_computes_another_function_fails(monkeypatch):
    from hf_drt.forms.modules import AdapterLinear

    right = AdapterLinear.forward
    monkeypatch.setattr(AdapterLinear, "forward", lambda self, x: 1.1 * right(self, x))
    result = attempt("bert", "BertModel")
    assert result.outcome == FAILED
    assert "phase 2 (adapter) differs from phase 0" in result.cause


def test_results_are_kept_and_resumed(tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert main(["--only", "^bert$", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["outcome"] == PASSED
    assert main(["--only", "^bert$", "--output", str(output), "--resume"]) == 0
    assert len(output.read_text().splitlines()) == 1
    assert "| passed | 1 |" in capsys.readouterr().out


@pytest.mark.slow
def test_as_many_types_pass_as_the_documentation_says(tmp_path):
    output = tmp_path / "all.jsonl"
    assert main(["--output", str(output)]) == 0
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(results) == len(model_types())
    assert sum(r["outcome"] == PASSED for r in results) >= 628
    failed = {r["model_type"] for r in results if r["outcome"] == FAILED}
    assert failed <= {"timm_backbone"}  # with timm installed; from_pretrained takes a name of timm, not a folder
