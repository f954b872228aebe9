"""Native checkpoints of layers at the largest rank that their form allows: they load, and one more is refused."""

import re

import pytest
import tiny
import torch
import transformers as T
from mixed import edit_block

from hf_drt import Adapter, CheckpointError, DRTConfig, DynamicRank, Factored, convert, declare, form_of
from hf_drt.forms import weight_shape
from hf_drt.forms.convert import rank_limit
from hf_drt.planning import resolve_form
from hf_drt.targets.surgery import Swap, replace

# (out, channels, kernel): narrow to wide, wide to narrow, one channel in, one out, 1x1, and a matrix.
CONVOLUTIONS = {
    "resnet.encoder.stages.0.layers.0.layer.0.convolution": (16, 8, 3, 3),
    "resnet.encoder.stages.1.layers.0.layer.1.convolution": (32, 32, 3, 3),
    "resnet.encoder.stages.0.layers.0.shortcut.convolution": (16, 8, 1, 1),
    "resnet.embedder.embedder.convolution": (8, 3, 7, 7),
}


def forms(form: type) -> dict[str, Factored | Adapter]:
    """Of the limit by decomposition, whatever the layer; the rank is filled in by :func:`largest`."""
    more = {} if form is Factored else {"alpha": 8.0}
    return {
        "svd": form(1, **more),
        "tucker": form(1, decomposition="tucker", rank_in=1, **more),
        "cp": form(1, decomposition="cp", **more),
    }


def largest(size: tuple[int, ...], form: Factored | Adapter) -> Factored | Adapter:
    """With the limits written out: every W is met exactly from there on."""
    out, channels, height, width = size
    into = channels * height * width
    limits = {"svd": min(out, into), "tucker": out, "cp": out * into // max(size)}
    rank_in = channels if form.decomposition == "tucker" else None
    return type(form)(**{**vars(form), "rank": limits[form.decomposition], "rank_in": rank_in})


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp"])
@pytest.mark.parametrize("kind", [Factored, Adapter])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_largest_rank_of_a_convolution_is_saved_and_loaded(tmp_path, name, kind, decomposition):
    model = tiny.resnet()
    layer = model.get_submodule(name)
    assert tuple(layer.weight.shape) == CONVOLUTIONS[name]
    form = largest(CONVOLUTIONS[name], forms(kind)[decomposition])
    expected = tiny.logits(model, tiny.batch("resnet"))
    replace(model, [Swap(name, layer, convert(layer, form).module)])
    declare(model)
    model.save_pretrained(tmp_path)
    native = T.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert form_of(native.get_submodule(name)) == form
    assert torch.equal(tiny.logits(native, tiny.batch("resnet")), tiny.logits(model, tiny.batch("resnet")))
    assert (tiny.logits(native, tiny.batch("resnet")) - expected).abs().max() < 1e-4  # nothing is truncated
    more = type(form)(**{**vars(form), "rank": form.rank + 1})
    with pytest.raises(ValueError, match=rf"rank must lie in 1\.\.{form.rank} for a layer"):
        convert(tiny.resnet().get_submodule(name), more)
    edit_block(tmp_path, lambda block: block["layers"][name].update(rank=form.rank + 1))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        T.AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_rank_between_the_block_and_the_layer_is_refused_by_its_limit(tmp_path):
    """The block alone, which has no kernel, would allow any CP rank up to in = 72."""
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution"
    model = tiny.resnet(hidden_sizes=[4, 8])
    layer = model.get_submodule(name)  # (4, 8, 3, 3)
    replace(model, [Swap(name, layer, convert(layer, Factored(36, "cp")).module)])
    declare(model)
    model.save_pretrained(tmp_path)
    edit_block(tmp_path, lambda block: block["layers"][name].update(rank=37))
    message = f"{name} of ResNetForImageClassification cannot have the form Factored(rank=37, decomposition='cp')"
    with pytest.raises(CheckpointError, match=re.escape(message) + r".*rank must lie in 1\.\.36"):
        T.AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"form": "factored", "rank": 17, "decomposition": "tucker", "rank_in": 8},
        {"form": "factored", "rank": 16, "decomposition": "tucker", "rank_in": 73},
        {"form": "factored", "rank": 73, "decomposition": "cp"},
        {"form": "factored", "rank": 17},
    ],
)
def test_what_no_layer_of_the_shape_has_is_refused_by_the_block(tmp_path, change):
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution"  # (out, in) = (16, 72)
    model = tiny.resnet()
    replace(model, [Swap(name, layer := model.get_submodule(name), convert(layer, Factored(2)).module)])
    declare(model)
    model.save_pretrained(tmp_path)
    edit_block(tmp_path, lambda block: block["layers"][name].update(change))
    with pytest.raises(CheckpointError, match=r"of a convolution up to what its decomposition allows\."):
        T.AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_cp_rank_above_the_outputs_is_not_taken_for_one_above_break_even():
    """32 x 32 x 3 x 3 in rank 40: 40 (32 + 32 + 6) = 2800 weights in place of 9216."""
    shape = weight_shape(tiny.resnet().get_submodule("resnet.encoder.stages.1.layers.0.layer.1.convolution"))
    config = DRTConfig(schedule="factored@0", decomposition="cp", rank=40)
    form = resolve_form("factored", shape, config, "", None)
    assert form == Factored(40, "cp")
    assert rank_limit(form, shape) == 288
    model = tiny.resnet()
    drt = DynamicRank(model, config, 2)
    drt.apply(0)
    assert Factored(40, "cp") in {form_of(model.get_submodule(name)) for name in drt.targets}
