"""LoRA checkpoints to and from the PEFT library, against PEFT itself."""

import copy
import json
import math

import pytest
import tiny
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_drt import Adapter, Dense, DRTConfig, DynamicRank, Factored, convert, dense_state_dict, find_targets, form_of
from hf_drt.export import CONFIG_NAME, WEIGHTS_NAME, base_state_dict, load_peft_adapter, save_peft_adapter
from hf_drt.targets.surgery import Swap, replace

peft = pytest.importorskip("peft")

FORMS = [Adapter(2), Adapter(4, 8.0, "principal"), Adapter(3, 5.5), Adapter(4), Dense()]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def change(model, forms):
    """Layers in forms, by name; adapters with something learned in them."""
    for name, form in forms.items():
        layer = model.get_submodule(name)
        replace(model, [Swap(name, layer, convert(layer, form).module)])
        if isinstance(form, Adapter):
            nn.init.normal_(model.get_submodule(name).lora_B, std=0.1)


def adapted(kind="llama"):
    """A model most of whose layers are adapters of several ranks and alphas; every weight trained a little."""
    model = tiny.MODELS[kind]()
    change(model, {name: FORMS[i % len(FORMS)] for i, name in enumerate(find_targets(model).targets)})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    return model


def difference(a, b, inputs):
    return (tiny.logits(a, inputs) - tiny.logits(b, inputs)).abs().max().item()


def snapshot(model):
    return [(name, id(module)) for name, module in model.named_modules()], copy.deepcopy(model.state_dict())


def assert_untouched(model, before):
    modules, state = before
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


# ---- adapter form -> PEFT


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_peft_computes_what_the_model_does(kind, tmp_path):
    model, inputs = adapted(kind), tiny.batch(kind)
    before = snapshot(model)
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    assert [id(m) for _, m in model.named_modules()] == [module for _, module in before[0]]

    config = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert config["fan_in_fan_out"] == (kind == "gpt2")
    base = tiny.AUTO[kind].from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, base.state_dict()[key]) for key, value in base_state_dict(model).items())
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert difference(theirs, model, inputs) == 0
    assert difference(tiny.AUTO[kind].from_pretrained(tmp_path / "adapter"), model, inputs) == 0

    merged, dense = theirs.merge_and_unload().state_dict(), dense_state_dict(model)
    assert merged.keys() == dense.keys()
    assert max((merged[key] - dense[key]).abs().max().item() for key in dense) < 1e-6


def test_a_run_that_ends_in_adapter_form_is_published_with_its_base(tmp_path):
    model, inputs = tiny.llama(), tiny.batch()
    drt = DynamicRank(
        model, DRTConfig(schedule="factored@0 dense@2 adapter@4", rank_pattern={"mlp": 4, "attn": 6}), max_steps=6
    )
    drt.apply(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(6):
        drt.begin_step(step, optimizer)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    config = json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())
    assert (config["r"], len(config["rank_pattern"])) == (6, 6)
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert isinstance(theirs.get_base_model(), T.LlamaForCausalLM)
    assert difference(theirs, model, inputs) == 0
    assert (theirs.get_base_model().model.embed_tokens.weight != tiny.llama().model.embed_tokens.weight).any()


class Nested(nn.Module):
    """A Conv1D beside an nn.Linear, and layers whose names end in those of others."""

    def __init__(self, inner=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 8), "b": Conv1D(8, 8)}) for _ in range(2))
        self.inner = Nested(inner=False) if inner else None

    def forward(self, x):
        for layer in self.layers:
            x = layer["b"](layer["a"](x).tanh())
        return self.inner(x) if self.inner is not None else x


def test_conv1d_beside_linear_and_names_that_end_alike(tmp_path):
    model, x = Nested(), torch.randn(4, 8)
    forms = {"layers.0.a": Adapter(3), "layers.0.b": Adapter(2), "inner.layers.0.a": Adapter(2, 4.0)}
    change(model, forms | {"inner.layers.1.b": Adapter(2)})
    save_peft_adapter(model, tmp_path, "elsewhere")
    base = Nested()
    base.load_state_dict(base_state_dict(model))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    adapters = [name for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert {name.removeprefix("base_model.model.") for name in adapters} == {*forms, "inner.layers.1.b"}
    assert torch.equal(theirs(x), model(x))
    torch.testing.assert_close(theirs.merge_and_unload()(x), model(x), atol=1e-6, rtol=0)


def test_the_base_is_named_as_asked_else_by_its_folder_else_by_where_the_model_came_from(tmp_path):
    def named(model, *args, **kwargs):
        save_peft_adapter(model, tmp_path / "adapter", *args, **kwargs)
        return json.loads((tmp_path / "adapter" / CONFIG_NAME).read_text())["base_model_name_or_path"]

    model, base = adapted(), tmp_path / "base"
    assert named(model) is None
    assert named(model, base_folder=base) == str(base)
    assert named(model, "org/name", base_folder=base) == "org/name"
    assert named(model, "org/name") == "org/name"
    loaded = T.AutoModelForCausalLM.from_pretrained(base)
    change(loaded, {Q: Adapter(4)})
    assert named(loaded) == str(base)


def test_an_adapter_without_its_base_comes_with_a_warning_that_names_the_signs(tmp_path, caplog):
    model = adapted()
    save_peft_adapter(model, tmp_path, "org/name")
    assert "Whether 'org/name' holds them cannot be checked" in caplog.text
    # The embeddings, the head, five norms, and the two layers that are dense.
    assert "9 other parameters are trainable: model.embed_tokens.weight, " in caplog.text
    assert "adapter_init='principal' has moved part of W" in caplog.text
    assert "pass base_folder=" in caplog.text
    caplog.clear()
    plain = tiny.llama()
    change(plain, {Q: Adapter(4)})
    for name, p in plain.named_parameters():
        p.requires_grad_("lora" in name)
    save_peft_adapter(plain, tmp_path)
    assert "Whether the base you will load holds them cannot be checked; any dense or factored phase" in caplog.text
    assert "trainable" not in caplog.text
    assert "principal" not in caplog.text
    caplog.clear()
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    assert caplog.text == ""


def shared():
    model = Nested()
    change(model, {"layers.0.a": Adapter(2)})
    model.inner.layers[0]["a"] = model.layers[0]["a"]
    return model


def with_forms(**forms):
    model = tiny.llama()
    change(model, {Q: forms.get("q", Dense()), V: forms.get("v", Dense())})
    return model


def mixture(name):
    """A DeepSeek whose experts are one tensor, with one adapter."""
    config = T.DeepseekV3Config(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        v_head_dim=8, qk_nope_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.DeepseekV3ForCausalLM(config)
    change(model, {name: Adapter(4)})
    return model


def test_attention_in_a_mixture_of_experts(tmp_path):
    model = mixture("model.layers.1.self_attn.o_proj")
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    base = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert difference(theirs, model, tiny.batch()) == 0


REFUSED = {
    "experts": (lambda: mixture("model.layers.1.mlp.shared_experts.up_proj"), {},
                r"layers\.1\.mlp\.shared_experts\.up_proj has the name of a projection of the experts, .*Keep such"),
    "dense": (tiny.llama, {}, r"no layer of LlamaForCausalLM is in adapter form \(0 are factored, the others dense\), "
              r".*Export after a phase 'adapter'.*export=dense or native"),
    "factored": (lambda: with_forms(q=Factored(4)), {}, r"in adapter form \(1 are factored, the others dense\)"),
    "mixed": (lambda: with_forms(q=Factored(4), v=Adapter(4)), {}, 
              rf"{Q} is in factored form, which PEFT does not have"),
    "wrapped": (lambda: nn.DataParallel(adapted()), {}, r"DataParallel wraps the model, .* Pass the model itself"),
    "compiled": (lambda: torch.compile(adapted()), {}, r"OptimizedModule wraps the model, .* Pass the model itself"),
    "shared": (shared, {}, r"layers\.0\.a, inner\.layers\.0\.a is one layer under several names"),
    "no base": (shared, {"base_folder": "base"}, r"one layer under several names"),
    "one folder": (adapted, {"base_folder": "adapter"},
                   r"folder and base_folder are both .*adapter; .* a folder of its own"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_cannot_express_is_refused_and_nothing_written(make, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        save_peft_adapter(make(), tmp_path / "adapter", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_transformers_cannot_save_is_refused(tmp_path):
    model = Nested()
    change(model, {"layers.0.a": Adapter(2)})
    with pytest.raises(ValueError, match=r"Nested has no save_pretrained\. Save hf_drt\.export\.base_state_dict"):
        save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_the_way_out_of_a_factored_layer_works(tmp_path):
    model = with_forms(q=Factored(4), v=Adapter(4))
    model.set_submodule(Q, convert(model.get_submodule(Q), Dense()).module)  # as the error says
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    assert difference(T.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), model, tiny.batch()) == 0


# ---- PEFT -> adapter form


def trained(folder, kind="llama", steps=3, model=None, **settings):
    """A LoRA that PEFT has trained for a few steps, and saved."""
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings})
    model = peft.get_peft_model(model or tiny.MODELS[kind](), config)
    inputs = tiny.batch(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model


RUNS = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "exclude_modules": "cls.*"}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"]}),
    "rslora": ("llama", {"use_rslora": True, "r": 3}),
    "patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"mlp.*": 3}},
    ),
    "one block": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "biases": ("bert", {"target_modules": ["query", "output.dense"], "bias": "all"}),
    "biases of adapted layers": ("bert", {"target_modules": ["query", "output.dense"], "bias": "lora_only"}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize(("kind", "settings"), RUNS.values(), ids=RUNS)
def test_the_model_computes_what_peft_has_trained(kind, settings, tmp_path):
    theirs, inputs = trained(tmp_path, kind, **settings), tiny.batch(kind)
    model = tiny.MODELS[kind]()
    moved = difference(theirs, model, inputs)
    forms = load_peft_adapter(model, tmp_path)
    assert moved > 1e-4, "otherwise this test could not fail"
    assert difference(theirs, model, inputs) == 0
    layers = {n.removeprefix("base_model.model."): m for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(forms) == set(layers)
    for name, form in forms.items():
        assert form_of(model.get_submodule(name)) == form
        assert form.rank == layers[name].r["default"]
        assert form.scaling == pytest.approx(layers[name].scaling["default"])
        assert not model.get_submodule(name).base.requires_grad


def test_scaling_of_rank_stabilized_lora_is_alpha_over_root_r(tmp_path):
    trained(tmp_path, use_rslora=True, r=4, lora_alpha=6, target_modules=["q_proj"])
    assert load_peft_adapter(tiny.llama(), tmp_path)[Q] == Adapter(4, 12.0)  # 6 / sqrt(4) = 12 / 4


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lora_run_can_be_inflated(kind, tmp_path):
    settings = {"use_rslora": True} if kind == "llama" else {"fan_in_fan_out": True}
    theirs, inputs = trained(tmp_path, kind, **settings), tiny.batch(kind)
    model = tiny.MODELS[kind]()
    forms = load_peft_adapter(model, tmp_path)
    learned = {name: model.get_submodule(name).lora_A for name in forms}
    alpha = {form.alpha for form in forms.values()}.pop()
    config = DRTConfig(schedule="adapter@0 dense@50%", rank=4, adapter_alpha=alpha)
    drt = DynamicRank(model, config, max_steps=4)
    drt.apply(0)
    assert all(model.get_submodule(name).lora_A is A for name, A in learned.items()), "it goes on with these weights"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(4):
        before = tiny.logits(model, inputs)
        transition = drt.begin_step(step, optimizer)
        assert (transition is not None) == (step == 2)
        torch.testing.assert_close(tiny.logits(model, inputs), before, atol=1e-5, rtol=1e-4)
        loss = model(**inputs).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(theirs.eval()(**inputs).loss.item())
    assert losses[-1] < losses[2] < losses[0]
    drt.to_dense()
    twin = tiny.MODELS[kind]()
    twin.load_state_dict(model.state_dict())
    assert difference(twin, model, inputs) == 0


def test_an_adapter_phase_of_another_rank_merges_what_peft_has_learned(tmp_path):
    theirs, inputs = trained(tmp_path, r=4), tiny.batch()
    model = tiny.llama()
    load_peft_adapter(model, tmp_path)
    DynamicRank(model, DRTConfig(schedule="adapter@0", rank=6), max_steps=1).apply(0)
    assert form_of(model.get_submodule(Q)) == Adapter(6)
    torch.testing.assert_close(tiny.logits(model, inputs), tiny.logits(theirs, inputs), atol=1e-5, rtol=1e-4)


def test_there_and_back(tmp_path):
    model, inputs = adapted("gpt2"), tiny.batch("gpt2")
    save_peft_adapter(model, tmp_path / "adapter", base_folder=tmp_path / "base")
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    forms = load_peft_adapter(again, tmp_path / "adapter")
    wanted = {name: form_of(m) for name, m in find_targets(model).targets.items() if form_of(m) != Dense()}
    assert {name: (f.rank, f.alpha) for name, f in forms.items()} == {n: (f.rank, f.alpha) for n, f in wanted.items()}
    assert difference(again, model, inputs) == 0


def test_weights_are_cast_to_the_layer_and_dropout_is_left_behind_with_a_warning(tmp_path, caplog):
    trained(tmp_path, lora_dropout=0.1, target_modules=["q_proj"])
    model = tiny.llama().bfloat16()
    load_peft_adapter(model, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "lora_dropout=0.1 is left behind" in caplog.text
    A = load_file(tmp_path / WEIGHTS_NAME)[f"base_model.model.{Q}.lora_A.weight"]
    assert torch.equal(model.get_submodule(Q).lora_A, A.bfloat16())


def test_a_repository_on_the_hub_is_found(tmp_path, monkeypatch):
    repository = tmp_path / "models--org--lora"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    theirs = trained(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = tiny.llama()
    load_peft_adapter(model, "org/lora")
    assert difference(model, theirs, tiny.batch()) == 0
    with pytest.raises(ValueError, match=r"org/other is no folder here, and could not be had from the Hub \(.*Give a"):
        load_peft_adapter(tiny.llama(), "org/other")
    with pytest.raises(ValueError, match=r"no/such/folder is no folder here, and could not be had from the Hub"):
        load_peft_adapter(tiny.llama(), "no/such/folder")


def test_the_blocks_of_the_run_are_those_of_the_loaded_adapter(tmp_path):
    trained(tmp_path, steps=0, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj, which cannot take adapter form here \(outside of the blocks\)"):
        load_peft_adapter(tiny.llama(), tmp_path, blocks=["LlamaMLP"])
    model = tiny.llama()
    assert len(load_peft_adapter(model, tmp_path, blocks=["LlamaAttention"])) == 2
    with pytest.raises(ValueError, match="ignore_source: 'q_proj' overrides nothing"):
        load_peft_adapter(tiny.llama(), tmp_path, ignore_source=["q_proj"])


VARIANTS = {
    "dora": ({"use_dora": True}, r"sets use_dora=True, which is more than W \+ s B A\. Merge it in PEFT"),
    "lora_bias": ({"lora_bias": True}, r"sets lora_bias=True"),
    "tokens": ({"trainable_token_indices": [1, 2]}, r"sets trainable_token_indices="),
    "invocation": ({"alora_invocation_tokens": [1]}, r"sets alora_invocation_tokens=\[1\]"),
    "pissa": ({"init_lora_weights": "pissa"},
              r"has init_lora_weights='pissa', which changes W before training, .* Convert"),
    "olora": ({"init_lora_weights": "olora"}, r"has init_lora_weights='olora'"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]},
                   r"holds model\.embed_tokens.*no LoRA weight of a linear layer, and no tensor of LlamaForCausalLM"),
    "head": ({"target_modules": ["q_proj", "lm_head"]},
             r"weights for lm_head, which cannot take adapter form here \(outside of the blocks\)\. Merge it in PEFT"),
    "rank": ({"r": 40}, r"r=40 exceeds min\(out, in\) = 32\. Merge it in PEFT"),
    "negative": ({"lora_alpha": -8}, r"lora_alpha must be a number above 0, got -8"),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), VARIANTS.values(), ids=VARIANTS)
def test_what_is_no_plain_lora_on_linear_layers_is_refused_and_the_model_left_alone(settings, message, tmp_path):
    trained(tmp_path, steps=0, **{"target_modules": ["q_proj"], **settings})
    model = tiny.llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_another_type_of_adapter_is_refused(tmp_path):
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    peft.get_peft_model(tiny.llama(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"describes an adapter of type 'IA3'; only LORA is W \+ s B A"):
        load_peft_adapter(tiny.llama(), tmp_path)


def edit(folder, **fields):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file(change(tensors), folder / WEIGHTS_NAME)


def renamed(old, new):
    """The adapter's tensors under names of another model."""
    return lambda folder: rewrite(folder, lambda t: {key.replace(old, new): value for key, value in t.items()})


def with_tensor(name, *shape):
    tensor = {f"base_model.model.{name}": torch.ones(shape)}
    return lambda folder: rewrite(folder, lambda t: t | tensor)


CONFIGS = {
    "missing": (lambda f: (f / CONFIG_NAME).unlink(), r"has no adapter_config\.json: it is no adapter of PEFT"),
    "cut": (lambda f: (f / CONFIG_NAME).write_text('{"r": '), r"adapter_config\.json is damaged \("),
    "a list": (lambda f: (f / CONFIG_NAME).write_text("[4]"), r"describes an adapter of type \[4\]"),
    "no type": (lambda f: edit(f, peft_type=None), r"describes an adapter of type None"),
    "unknown": (lambda f: edit(f, use_new_lora={"a": 1}), r"sets use_new_lora={'a': 1}, which is more than W"),
    "other r": (lambda f: edit(f, r=5),
                rf"{Q} of shape \(out, in\) = \(32, 32\) with r=5 needs lora_A \(5, 32\) and lora_B \(32, 5\); "
                r"the adapter has \(4, 32\) and \(32, 4\)\. Load it into the model"),
    "no r": (lambda f: edit(f, r=None), r"with r=None needs"),
    "alpha": (lambda f: edit(f, lora_alpha="8"), r"lora_alpha must be a number above 0, got '8'"),
    "pattern": (lambda f: edit(f, rank_pattern={"(": 4}), r"rank_pattern or alpha_pattern holds '\(', which is not a"),
}  # fmt: skip
KEY = f"base_model.model.{Q}.lora_A.weight"
WEIGHTS = {
    "missing": (lambda f: (f / WEIGHTS_NAME).unlink(), r"has no adapter_model\.safetensors: .* Save the adapter again"),
    "pickled": (lambda f: (f / WEIGHTS_NAME).rename(f / "adapter_model.bin"), r"Load adapter_model\.bin in PEFT and"),
    "cut": (lambda f: (f / WEIGHTS_NAME).write_bytes((f / WEIGHTS_NAME).read_bytes()[:-9]),
            r"adapter_model\.safetensors is damaged \("),
    "empty": (lambda f: rewrite(f, lambda t: {}), r"holds no LoRA weight \(base_model\.model\.<layer>\.lora_A"),
    "half": (lambda f: rewrite(f, lambda t: {key: t[key] for key in t if key != KEY}),
             rf"is damaged: {Q} has only one of lora_A and lora_B"),
    "nan": (lambda f: rewrite(f, lambda t: t | {KEY: t[KEY] * math.nan}), r"lora_A\.weight holds inf or nan; that"),
    "unknown layer": (renamed("layers.1", "layers.7"),
                      r"weights for model\.layers\.7\.self_attn\.q_proj, and LlamaForCausalLM has no layer of that"),
    "no linear layer": (renamed("self_attn.q_proj", "input_layernorm"),
                        r"weights for model\.layers\.\d\.input_layernorm, .* \(a LlamaRMSNorm, no linear layer\)"),
    "unknown tensor": (with_tensor("score.weight", 2, 32),
                       r"holds score\.weight, which is no LoRA weight of a linear layer, and no tensor of Llama"),
    "other vocabulary": (with_tensor("lm_head.weight", 2, 32),
                         r"lm_head\.weight has shape \(2, 32\), and \(64, 32\) in LlamaForCausalLM"),
}  # fmt: skip
DAMAGES = {f"config {name}": case for name, case in CONFIGS.items()}
DAMAGES |= {f"weights {name}": case for name, case in WEIGHTS.items()}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_damaged_or_of_another_model_is_refused_and_the_model_left_alone(
    damage, message, tmp_path
):
    trained(tmp_path, steps=0, target_modules=["q_proj"])
    damage(tmp_path)
    model = tiny.llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_peft_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_a_model_that_is_not_dense_or_diverged_or_frozen_is_refused(tmp_path):
    trained(tmp_path, steps=0, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=rf"{V} is in form Factored\(rank=4\) already\. Load the adapter into"):
        load_peft_adapter(with_forms(v=Factored(4)), tmp_path)
    frozen = tiny.llama()
    frozen.get_submodule(Q).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"weights for {Q}, which cannot take adapter form here \(frozen\)"):
        load_peft_adapter(frozen, tmp_path)
    diverged = tiny.llama()
    diverged.model.layers[1].self_attn.q_proj.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="holds inf or nan"):
        load_peft_adapter(diverged, tmp_path)
    assert {form_of(m) for m in find_targets(diverged).targets.values()} == {Dense()}


def test_a_saved_module_that_the_model_ties_to_another_is_refused(tmp_path):
    tied = tiny.llama(tie_word_embeddings=True)
    trained(tmp_path, model=tied, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = tiny.llama(tie_word_embeddings=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"holds lm_head\.weight, but .*ties it to .*tie_word_embeddings=False"):
        load_peft_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_a_layer_under_two_names_is_refused(tmp_path):
    trained(tmp_path, steps=0, target_modules=["q_proj"])
    model = tiny.llama()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    save_file({key: value for key, value in tensors.items() if "layers.0" in key}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=rf"{Q} is one layer under several names"):
        load_peft_adapter(model, tmp_path)
