"""``hf-drt export`` and ``hf-drt compare``."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_drt import EMACallback, EMADecay

HEAD = {"hf_drt_ema": '{"format_version": 1, "updates": 4, "decay": {}}'}


def logits(folder):
    return tiny.logits(AutoModelForCausalLM.from_pretrained(folder), tiny.batch())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_becomes_dense_and_native(hf_drt, checkpoint, tmp_path, kind):
    source = checkpoint(kind) / "checkpoint-4"
    for format in ("dense", "native"):
        result = hf_drt("export", source, tmp_path / format, "--format", format)
        assert result.code == 0, result.err
        assert torch.allclose(logits(tmp_path / format), logits(source), atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" in json.loads((tmp_path / "native" / "config.json").read_text())
    assert not (tmp_path / "dense" / "optimizer.pt").exists()
    assert hf_drt("export", tmp_path / "native", tmp_path / "again").code == 0  # from a native model, too
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "dense"))


def test_a_checkpoint_becomes_an_adapter(hf_drt, checkpoint, tmp_path):
    from peft import PeftModel

    source = checkpoint() / "checkpoint-4"
    assert hf_drt("export", source, tmp_path / "adapter", "--format", "adapter").code == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(tiny.logits(model, tiny.batch()), logits(source), atol=1e-6)


def test_a_checkpoint_becomes_linear_pairs_which_compare_as_equal(hf_drt, checkpoint, tmp_path):
    source = checkpoint(schedule="factored@0") / "checkpoint-4"
    result = hf_drt("export", source, tmp_path / "pairs", "--format", "linear-pairs")
    assert (result.code, "written to" in result.out, "as linear-pairs" in result.out) == (0, True, True), result.err
    compared = hf_drt("compare", source, tmp_path / "pairs", "--tolerance", 0, "--no-spectra")  # runs none of its code
    assert compared.code == 0, compared.err
    again = hf_drt("export", tmp_path / "pairs", tmp_path / "dense")
    assert again.code == 1
    assert "is in linear pairs, of which no other form is made. Export the checkpoint" in " ".join(again.err.split())
    assert not (tmp_path / "dense").exists()


def test_the_average_of_a_checkpoint_becomes_a_dense_model(hf_drt, tmp_path):
    average = EMACallback(EMADecay(0.7, warmup=False))
    trainer = tiny.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, drt_schedule="factored:4@0")
    trainer.add_callback(average)
    trainer.train()
    source, target = tmp_path / "checkpoint-4", tmp_path / "average"
    result = hf_drt("export", source, target, "--average")
    assert result.code == 0, result.err
    assert "the average of its weights, written to" in result.out
    state = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(state[key], value) for key, value in average.ema.state_dict()["averages"].items())
    wrong = hf_drt("export", source, tmp_path / "native", "--average", "--format", "native")
    assert (wrong.code, "an average is dense, got --format native" in wrong.err) == (2, True)
    weights = average.ema.state_dict()["averages"]
    save_file({"other.weight": next(iter(weights.values()))}, source / "drt_ema.safetensors", HEAD)
    foreign = hf_drt("export", source, tmp_path / "foreign", "--average")
    assert (foreign.code, "is of another model: it has other.weight" in foreign.err) == (1, True)


def test_a_tokenizer_goes_along(hf_drt, checkpoint, tmp_path):
    source = checkpoint() / "checkpoint-4"
    _tokenizer().save_pretrained(source)
    assert hf_drt("export", source, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def _tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def test_export_refuses(hf_drt, checkpoint, tmp_path):
    source = checkpoint() / "checkpoint-2"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, code, message in [
        ((source, tmp_path / "full"), 1, "exists and is not an empty folder"),
        (
            (source, tmp_path / "x", "--format", "onnx"),
            2,
            "must be one of dense, native, linear-pairs, adapter, got 'onnx'",
        ),
        ((source, tmp_path / "x", "--format", "adapter"), 1, "has no layer in adapter form"),
        (("/no/such", tmp_path / "x"), 1, "there is no such path"),
        ((source / "model.safetensors", tmp_path / "x"), 1, "is a file. A model is loaded from its folder"),
    ]:
        result = hf_drt("export", *arguments)
        assert result.code == code, result.err
        assert message in " ".join(result.err.split())
        assert not (tmp_path / "x").exists()


def test_compare_measures_what_differs(hf_drt, tmp_path):
    a = tiny.llama()
    a.save_pretrained(tmp_path / "a")
    b = tiny.llama()
    with torch.no_grad():
        b.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        b.lm_head.weight.mul_(2)
    b.save_pretrained(tmp_path / "b")
    data = json.loads(hf_drt("compare", tmp_path / "a", tmp_path / "b", "--samples", 3, "--length", 5, "--json").out)
    ids = torch.randint(0, tiny.VOCAB, (3, 5), generator=torch.Generator().manual_seed(0))
    x, y = (tiny.logits(model, {"input_ids": ids}) for model in (a, b))
    assert data["logits"]["positions"] == 15
    assert data["logits"]["largest"] == pytest.approx((y - x).abs().max().item(), rel=1e-5)
    assert data["logits"]["relative"] == pytest.approx(((y - x).norm() / x.norm()).item(), rel=1e-5)
    p, q = x.softmax(-1), y.softmax(-1)
    assert data["logits"]["divergence"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert data["logits"]["agreement"] == pytest.approx((x.argmax(-1) == y.argmax(-1)).float().mean().item())
    changes = {layer["name"]: layer["relative_difference"] for layer in data["layers"]}
    assert changes.pop("model.layers.0.mlp.up_proj") == pytest.approx(0.5, rel=1e-5)
    assert set(changes.values()) == {0.0}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_forms_of_one_model_compare_as_equal(hf_drt, checkpoint, tmp_path, kind):
    source = checkpoint(kind) / "checkpoint-4"
    hf_drt("export", source, tmp_path / "dense")
    result = hf_drt("compare", source, tmp_path / "dense", "--tolerance", 1e-4)
    assert result.code == 0, result.err
    assert "same largest logit   100.00%" in result.out
    data = json.loads(hf_drt("compare", source, tmp_path / "dense", "--no-logits", "--json").out)
    assert data["logits"] is None
    assert max(layer["relative_difference"] for layer in data["layers"]) < 1e-6
    assert data["layers"][0]["forms"] == ["adapter:8", "dense"]


def test_a_tolerance_decides_the_exit_code(hf_drt, checkpoint):
    folder = checkpoint()
    result = hf_drt("compare", folder / "checkpoint-2", folder / "checkpoint-4", "--tolerance", 1e-6, "--no-spectra")
    assert result.code == 1
    assert "more than 1e-06" in result.err


def test_a_text_is_compared_by_its_tokens(hf_drt, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "a")
    result = hf_drt("compare", tmp_path / "a", tmp_path / "a", "--text", "w1 w2 w3")
    assert (result.code, "holds a tokenizer for --text" in result.err) == (1, True)
    _tokenizer().save_pretrained(tmp_path / "a")
    assert "logits at 3 positions" in hf_drt("compare", tmp_path / "a", tmp_path / "a", "--text", "w1 w2 w3").out


@pytest.mark.parametrize("kind", ["bert", "t5", "vit"])
def test_other_architectures(hf_drt, checkpoint, tmp_path, kind):
    source = checkpoint(kind) / "checkpoint-4"
    assert hf_drt("export", source, tmp_path / "dense").code == 0
    result = hf_drt("compare", source, tmp_path / "dense", "--tolerance", 1e-4)
    assert result.code == 0, result.err
    assert "weights: not compared, since no layer has the same name in both" in result.out or "adapter:8" in result.out


def test_models_that_cannot_be_compared(hf_drt, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "a")
    tiny.llama(vocab_size=80).save_pretrained(tmp_path / "b")
    tiny.llama(hidden_size=64).save_pretrained(tmp_path / "c")
    result = hf_drt("compare", tmp_path / "a", tmp_path / "b")
    assert (result.code, "their logits have shapes (4, 32, 64) and (4, 32, 80)" in result.err) == (1, True)
    result = hf_drt("compare", tmp_path / "a", tmp_path / "c", "--no-logits")
    assert (result.code, "they are of different models" in result.err) == (1, True)
