"""The commands on checkpoints of a model with fused experts in low-rank form."""

import pytest
import tiny
import torch
import transformers as T

EXPERTS = "model.layers.0.mlp.experts"
NONE = "holds no linear layer to inspect beside 2 weights of fused experts"


@pytest.fixture(params=[None, ["experts"]], ids=["all", "experts alone"])
def run(tmp_path, request):
    """checkpoint-2, in factored form, and checkpoint-4, in adapter form."""
    tiny.trainer(
        tmp_path / "run", tiny.mixtral(), max_steps=4, save_strategy="steps", save_steps=2,
        gradient_accumulation_steps=1, learning_rate=1e-2, drt_schedule="factored@0 adapter@2",
        drt_include=request.param,
    ).train()  # fmt: skip
    return tmp_path / "run"


def logits(folder):
    return tiny.logits(T.AutoModelForCausalLM.from_pretrained(folder), tiny.batch())


@pytest.mark.parametrize("step", [2, 4])
def test_export_and_compare(hf_drt, run, tmp_path, step):
    source = run / f"checkpoint-{step}"
    for format in ("dense", "native"):
        result = hf_drt("export", source, tmp_path / format, "--format", format)
        assert result.code == 0, result.err
        assert torch.allclose(logits(tmp_path / format), logits(source), atol=1e-5)
    plain = T.MixtralForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(isinstance(p, torch.nn.Parameter) for p in plain.get_submodule(EXPERTS)._parameters.values())
    result = hf_drt("compare", source, tmp_path / "native", "--tolerance", 1e-6)
    assert result.code == 0, result.err
    assert f"weights of fused experts: not compared, 2, e.g. {EXPERTS}.gate_up_proj" in result.out


def test_an_adapter_of_experts_is_refused(hf_drt, run, tmp_path):
    result = hf_drt("export", run / "checkpoint-4", tmp_path / "x", "--format", "adapter")
    assert (result.code, "is of fused experts, whose adapters PEFT lays out in another way" in result.err) == (1, True)
    assert not (tmp_path / "x").exists()


def test_inspect_passes_over_them(hf_drt, run, request):
    result = hf_drt("inspect", run / "checkpoint-4")
    attention = "experts alone" not in request.node.name
    assert result.code == (0 if attention else 1)
    expected = f"not shown: 2 weights of fused experts, e.g. {EXPERTS}.gate_up_proj" if attention else NONE
    assert expected in (result.out if attention else result.err)
    assert ("self_attn.q_proj" in result.out) == attention
    assert not any(line.startswith(EXPERTS) for line in result.out.splitlines())
