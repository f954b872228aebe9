"""open_clip's models and lerobot's ACT, whose attention is torch's: `pytest -m slow` where they are installed.

`pip install --no-deps open_clip_torch==3.3.0 ftfy lerobot==0.4.4`, and what the second imports.
"""

import copy
import importlib
import sys
import types

import pytest
import torch
from torch import nn

from hf_drt import Factored, convert, dense_state_dict, find_targets, split_attention
from hf_drt.targets import Swap, replace

pytestmark = pytest.mark.slow
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def clip() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16}
    text = {"context_length": 12, "vocab_size": 100, "width": 64, "heads": 4, "layers": 2}
    return open_clip.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)


def clip_at_full_size() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    return open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))


def of_lerobot(name: str):
    """A module of lerobot. ``lerobot.policies`` is not run: GR00T's dataclass fails there under transformers 5."""
    lerobot = pytest.importorskip("lerobot")
    if "lerobot.policies" not in sys.modules:
        package = sys.modules["lerobot.policies"] = types.ModuleType("lerobot.policies")
        package.__path__ = [f"{lerobot.__path__[0]}/policies"]
    return importlib.import_module(name)


def act_at_full_size(**sizes) -> nn.Module:
    kinds = of_lerobot("lerobot.configs.types")
    feature, kind = kinds.PolicyFeature, kinds.FeatureType
    config = of_lerobot("lerobot.policies.act.configuration_act").ACTConfig(
        input_features={
            "observation.state": feature(type=kind.STATE, shape=(14,)),
            "observation.images.top": feature(type=kind.VISUAL, shape=(3, 64, 64)),
        },
        output_features={"action": feature(type=kind.ACTION, shape=(14,))},
        pretrained_backbone_weights=None, device="cpu", **sizes,
    )  # fmt: skip
    return of_lerobot("lerobot.policies.act.modeling_act").ACT(config)


def act() -> nn.Module:
    return act_at_full_size(
        dim_model=64, n_heads=4, dim_feedforward=128, n_encoder_layers=2, n_vae_encoder_layers=2, chunk_size=8,
        n_action_steps=8, dropout=0.0,
    )  # fmt: skip


def features(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    images, texts, *_ = model(torch.randn(2, 3, 32, 32), torch.randint(0, 100, (2, 12)))
    return torch.cat([images, texts])


def actions(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)  # its latent is drawn
    batch = {
        "observation.state": torch.randn(2, 14), "observation.images": [torch.randn(2, 3, 64, 64)],
        "action": torch.randn(2, 8, 14), "action_is_pad": torch.zeros(2, 8, dtype=torch.bool),
    }  # fmt: skip
    return model.train()(batch)[0]


MODELS = {"open_clip": (clip, features), "ACT": (act, actions)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()  # a gradient may be zero


def gradient_of(dense: nn.Module, layer: str) -> torch.Tensor | None:
    owner, _, leaf = layer.rpartition(".")
    held = dense.get_submodule(owner)
    if isinstance(held, nn.MultiheadAttention) and leaf in PROJECTIONS:
        return held.in_proj_weight.grad.chunk(3)[PROJECTIONS.index(leaf)]
    return dense.get_submodule(layer).weight.grad


@pytest.mark.parametrize(("make", "run"), MODELS.values(), ids=MODELS)
def test_at_full_rank_outputs_and_gradients_are_the_dense_ones_and_the_export_loads_strictly(make, run):
    torch.manual_seed(0)
    model = make()
    dense = copy.deepcopy(model)
    targets = find_targets(model).targets
    assert sum(name.endswith(PROJECTIONS) for name in targets) >= 12
    split_attention(model)
    found = find_targets(model).targets
    full = {name: Factored(min(layer.weight.flatten(1).shape)) for name, layer in found.items()}
    replace(model, [Swap(name, layer, convert(layer, full[name]).module) for name, layer in found.items()])
    expected, y = run(dense), run(model)
    assert distance(y, expected) < 1e-5
    expected.sin().sum().backward()
    y.sin().sum().backward()
    for name in found:
        layer, G = model.get_submodule(name), gradient_of(dense, name)
        if G is not None and G.ndim == 2:
            assert distance(layer.U.grad, G @ layer.V.detach().T) < 1e-5
            assert distance(layer.V.grad, layer.U.detach().T @ G) < 1e-5
    plain = make()
    plain.load_state_dict(dense_state_dict(model))
    assert distance(run(plain), y) < 1e-5


def shares(model: nn.Module) -> tuple[float, float]:
    """Of the model's parameters, those that were selected while attention stayed packed, and those that are now."""
    targets, total = find_targets(model).targets, sum(p.numel() for p in model.parameters())
    attention = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    sizes = {name: layer.weight.numel() for name, layer in targets.items()}
    before = sum(size for name, size in sizes.items() if name.rpartition(".")[0] not in attention)
    return round(100 * before / total, 1), round(100 * sum(sizes.values()) / total, 1)


@pytest.mark.parametrize(("make", "expected"), [(clip_at_full_size, (54.1, 81.1)), (act_at_full_size, (78.4, 98.7))])
def test_more_of_the_parameters_is_reached(make, expected):
    with torch.device("meta"):
        model = make()
    assert shares(model) == expected
