"""What PEFT's variants of LoRA compute, against what is read; and the ways out of what is refused, tried in PEFT."""

import dataclasses
import json
import re
import sys
import typing
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_drt.export import CONFIG_NAME, WEIGHTS_NAME, load_peft_adapter
from hf_drt.export.peft.patterns import _as_in_peft, _matcher
from hf_drt.export.peft.variants import CONVERTIBLE_STARTS, PLAIN_FIELDS, PLAIN_STARTS, VARIANTS

peft = pytest.importorskip("peft")
from peft.tuners.lora import config as lora  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "peft.md"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def logits(model):
    return tiny.logits(model, tiny.batch())


def difference(a, b):
    return (logits(a) - logits(b)).abs().max().item()


def trained(folder, model=None, **settings):
    """A LoRA that PEFT has trained for a few steps, and saved."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], **settings})
    model = peft.get_peft_model(model or tiny.llama(), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    for _ in range(3):
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model


def loaded_by_peft(folder):
    return peft.PeftModel.from_pretrained(tiny.llama(), folder)


def refused(folder, field):
    """The model is left as it was, and the message ends in the way out of the field's row."""
    model = tiny.llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = rf"sets {field}=.*, which is more than W \+ s B A\. {re.escape(VARIANTS[field].way_out)}$"
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, folder)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- read


BY_PARAMETER = {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight", "k_proj.weight"]}
READ = {
    "velora_config": ({"velora_config": lora.VeloraConfig(num_groups=4)}, 0),
    "monteclora_config": ({"monteclora_config": lora.MontecloraConfig()}, 0),
    "use_qalora": ({"use_qalora": True, "qalora_group_size": 8}, 0),
    "use_bdlora": (
        {"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["k_proj"])}, 0,
    ),
    "target_parameters": (BY_PARAMETER, 1e-6),  # PEFT computes (W + s B A) x
    "patterns of parameters": (
        {**BY_PARAMETER, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj.weight": 3}}, 1e-6,
    ),
    "mica": ({"init_lora_weights": "mica"}, 0),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "tolerance"), READ.values(), ids=READ)
def test_what_is_plain_in_evaluation_is_read(settings, tolerance, tmp_path):
    theirs, model = trained(tmp_path, **settings), tiny.llama()
    assert difference(theirs, model) > 2e-5, "otherwise this test could not fail"
    forms = load_peft_adapter(model, tmp_path)
    assert difference(theirs, model) <= tolerance
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert {name: form.scaling for name, form in forms.items()} == {n: m.scaling["default"] for n, m in layers.items()}


# ---- refused, and the way out


def peft_merges(folder):
    return loaded_by_peft(folder).merge_and_unload()


def peft_merges_with_biases(folder):
    model = loaded_by_peft(folder)
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        loaded_by_peft(folder).merge_and_unload()
    for base_layer in [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]:
        base_layer.bias = torch.nn.Parameter(torch.zeros(base_layer.out_features))
    return model.merge_and_unload()


def peft_merges_with_own_weights(folder):
    model = loaded_by_peft(folder)
    for base_layer in [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]:
        base_layer.weight = torch.nn.Parameter(base_layer.weight.detach().clone())
    return model.merge_and_unload()


REFUSED = {
    "use_dora": ({"use_dora": True}, peft_merges),
    "kasa_config": ({"kasa_config": lora.KasaConfig()}, peft_merges),
    "trainable_token_indices": ({"trainable_token_indices": [1, 2]}, peft_merges),
    "use_bdlora": ({"use_bdlora": lora.BdLoraConfig(target_modules_bd_a=["q_proj", "k_proj"], nblocks=2)}, peft_merges),
    "lora_bias": ({"lora_bias": True}, peft_merges_with_biases),
    "layer_replication": ({"layer_replication": [[0, 2], [0, 2]]}, peft_merges_with_own_weights),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "way_out"), REFUSED.values(), ids=REFUSED)
def test_what_is_more_is_refused_and_the_way_out_works(settings, way_out, tmp_path, request):
    theirs = trained(tmp_path, **settings)
    refused(tmp_path, request.node.callspec.id)
    assert difference(way_out(tmp_path), theirs) < 1e-6


def test_copies_of_a_layer_merged_into_the_weight_they_share_are_another_model(tmp_path):
    """Why the way out of layer_replication has a first step."""
    theirs = trained(tmp_path, layer_replication=[[0, 2], [0, 2]])
    assert difference(peft_merges(tmp_path), theirs) > 1e-4


@pytest.mark.filterwarnings("ignore:aLoRA")
def test_what_acts_on_some_tokens_is_refused_and_peft_merges_it_no_more_than_we_do(tmp_path):
    trained(tmp_path, alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")
    refused(tmp_path, "alora_invocation_tokens")
    with pytest.raises(NotImplementedError, match="does not support merging"):
        peft_merges(tmp_path)


def test_a_router_is_refused_and_the_adapters_that_it_was_made_from_are_read(tmp_path):
    theirs = trained(tmp_path / "a")
    trained(tmp_path / "b", lora_alpha=4)
    router = peft.create_arrow_model(
        tiny.llama(), [str(tmp_path / "a"), str(tmp_path / "b")], peft.ArrowConfig(top_k=1)
    )
    router.save_pretrained(tmp_path / "all")
    refused(tmp_path / "all" / "arrow_router", "arrow_config")
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        router.merge_and_unload()
    model = tiny.llama()
    load_peft_adapter(model, tmp_path / "all" / "task_0")
    assert difference(model, theirs) == 0


def edit(folder, **fields):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_defaults_of_a_variant_are_a_variant(tmp_path):
    """PEFT reads an empty mapping so."""
    trained(tmp_path)
    edit(tmp_path, kasa_config={})
    refused(tmp_path, "kasa_config")
    edit(tmp_path, kasa_config=None, megatron_config={"hidden_size": 32})
    refused(tmp_path, "megatron_config")


def test_averages_over_groups_of_inputs_are_refused(tmp_path):
    """What use_qalora trains over quantized layers: factors for one input of every group."""
    trained(tmp_path, use_qalora=True, qalora_group_size=8)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    save_file({k: t[:, ::8].contiguous() if "lora_A" in k else t for k, t in tensors.items()}, tmp_path / WEIGHTS_NAME)
    message = r"has lora_A of shape \(4, 4\) with use_qalora=True, in place of \(4, 32\)\. PEFT has no way to merge it"
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(tiny.llama(), tmp_path)


NO_LINEAR_WEIGHT = r"sets target_parameters=.*, and .* is not the weight of an nn\.Linear, .* Merge it in PEFT"


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (tiny.gpt2, "attn.c_proj.weight", NO_LINEAR_WEIGHT),  # (in, out), so that the factors are its transpose's
        (tiny.mixtral, "experts.down_proj", r"\(a MixtralExperts, no linear layer\)\. Merge it in PEFT"),
    ],
    ids=["Conv1D", "3-D"],
)
def test_parameters_that_are_no_weight_of_a_linear_layer_are_refused(make, target, message, tmp_path):
    trained(tmp_path, make(), target_modules=[], target_parameters=[target])
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(make(), tmp_path)


def test_a_start_that_changes_the_base_is_refused_and_the_ways_out_work(tmp_path):
    theirs = trained(tmp_path, init_lora_weights="olora")
    with pytest.raises(ValueError, match=r"init_lora_weights='olora', .* Convert it .*, or merge it in PEFT"):
        load_peft_adapter(tiny.llama(), tmp_path)
    assert difference(peft_merges(tmp_path), theirs) < 1e-6
    edit(tmp_path, init_lora_weights="loftq")
    with pytest.raises(ValueError, match=r"init_lora_weights='loftq', .* published base\. Merge it in PEFT"):
        load_peft_adapter(tiny.llama(), tmp_path)


# ---- patterns that PEFT has sorted


def test_ranks_are_read_from_the_tensors_where_sorting_has_broken_the_pattern(tmp_path, caplog):
    theirs = trained(tmp_path, rank_pattern={"q_proj": 2, ".*_proj": 6})
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded_by_peft(tmp_path)
    model = tiny.llama()
    forms = load_peft_adapter(model, tmp_path)
    assert (forms[Q].rank, forms[K].rank) == (2, 6)
    assert difference(model, theirs) == 0
    assert f"for {Q}, model.layers.1.self_attn.q_proj rank_pattern gives another rank than the tensors" in caplog.text
    assert "PEFT sorts the patterns as it saves" in caplog.text
    caplog.clear()
    trained(tmp_path, rank_pattern={".*_proj": 6, "q_proj": 2})
    assert load_peft_adapter(tiny.llama(), tmp_path)[Q].rank == 6
    assert caplog.text == ""


def test_a_rank_that_no_pattern_has_is_refused(tmp_path):
    trained(tmp_path, rank_pattern={"q_proj": 2, ".*_proj": 6})
    edit(tmp_path, rank_pattern={".*_proj": 6, "q_proj": 3})
    with pytest.raises(ValueError, match=r"with r=6 needs lora_A \(6, 32\) .* the adapter has \(2, 32\) and \(32, 2\)"):
        load_peft_adapter(tiny.llama(), tmp_path)


def test_an_alpha_that_sorting_may_have_changed_is_refused(tmp_path):
    theirs = trained(tmp_path, alpha_pattern={"q_proj": 16, ".*_proj": 1})
    assert difference(loaded_by_peft(tmp_path), theirs) > 1e-4, "PEFT loads another model, without a word"
    message = (
        rf"several entries of alpha_pattern match {Q}, with the values 1, 16\. PEFT trains with the first, but sorts"
    )
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(tiny.llama(), tmp_path)
    edit(tmp_path, alpha_pattern={"q_proj": 16, "k_proj": 1})  # as the message says
    model = tiny.llama()
    load_peft_adapter(model, tmp_path)
    assert difference(model, theirs) == 0


def test_alphas_that_agree_or_were_not_sorted_are_read(tmp_path):
    theirs = trained(tmp_path, alpha_pattern={"q_proj": 16, ".*_proj": 16})
    model = tiny.llama()
    load_peft_adapter(model, tmp_path)
    assert difference(model, theirs) == 0
    edit(tmp_path, alpha_pattern={"q_proj": 3, ".*_proj": 16})  # not by PEFT, whose order it is not
    assert load_peft_adapter(tiny.llama(), tmp_path)[Q].alpha == 3


# ---- every option of PEFT takes a stand


def rows():
    """The table of docs/peft.md: the first cell's name in code, the second cell, the last."""
    lines = [line.split("|") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return {re.match(r" `(\w+)", cells[1])[1]: (cells[2].strip(), cells[3].strip()) for cells in lines}


def test_every_field_of_peft_is_plain_or_a_variant():
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - PLAIN_FIELDS - set(VARIANTS) == set(), "a new field of PEFT has to take a stand"
    assert (PLAIN_FIELDS & set(VARIANTS), set(VARIANTS) - fields) == (set(), set())


def test_every_start_of_peft_is_known():
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    starts = {name for part in typing.get_args(hint) for name in typing.get_args(part)}
    others = {start for start in starts if not start.startswith(CONVERTIBLE_STARTS)} - set(PLAIN_STARTS)
    assert others == {"loftq"}


def test_the_documentation_has_a_row_for_every_variant_and_says_what_is_done():
    assert set(rows()) == {*VARIANTS, "init_lora_weights"}
    for field, variant in VARIANTS.items():
        done, way_out = rows()[field]
        assert done.startswith("read" if field in READ else "refused"), field
        assert (
            field in READ or field in REFUSED or field in ("alora_invocation_tokens", "arrow_config", "megatron_config")
        )
        assert way_out.replace("`", "") == ("" if done == "read" else variant.way_out), field


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("q_proj", "model.layers.0.self_attn.q_proj"),
        ("q_proj", "model.layers.0.self_attn.q_proj2"),
        ("proj", "model.q_proj"),
        (r"^model\.layers\.0\.q_proj", "model.layers.0.q_proj"),
        (r"layers\.(0|1)\.q", "layers.1.q"),
        (r"layers\.(0|1)\.q", "layers.2.q"),
        ("model.q", "model.q"),
        ("modelxq", "model.q"),
        ("a(b)", "a(b)"),
    ],
)
def test_patterns_match_by_pefts_own_rule(pattern, name, monkeypatch):
    assert get_pattern_key([pattern, "other"], name) == (pattern if _as_in_peft(pattern, name) else name)
    _matcher.cache_clear()
    assert _matcher()(pattern, name) == _as_in_peft(pattern, name)
    monkeypatch.setitem(sys.modules, "peft.utils.other", None)
    _matcher.cache_clear()
    assert _matcher() is _as_in_peft  # without PEFT
    _matcher.cache_clear()
