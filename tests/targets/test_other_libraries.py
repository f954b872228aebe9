"""timm's and diffusers' models, which are no dependencies: run with `pytest -m slow` where they are installed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank, dense_state_dict, find_targets

pytestmark = pytest.mark.slow


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **sizes)


def conditional_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4, use_linear_projection=True,
    )  # fmt: skip


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def dit() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        norm_num_groups=4,
    )  # fmt: skip


def picture(channels: int, size: int) -> torch.Tensor:
    return torch.randn(2, channels, size, size)


def steps() -> torch.Tensor:
    return torch.tensor([3, 5])


# Model, inputs, number of targets, and of queries, keys and values among them.
MODELS = {
    "timm vit": (timm_vit, lambda: {"x": picture(3, 32)}, 8, 0),
    "timm swin": (timm_swin, lambda: {"x": picture(3, 32)}, 12, 0),
    "conditional unet": (
        conditional_unet,
        lambda: {"sample": picture(4, 8), "timestep": steps(), "encoder_hidden_states": torch.randn(2, 6, 16)},
        74,
        24,
    ),
    "unet": (unet, lambda: {"sample": picture(3, 8), "timestep": steps()}, 41, 12),
    "dit": (dit, lambda: {"hidden_states": picture(4, 8), "timestep": steps(), "class_labels": steps()}, 18, 6),
}
models = pytest.mark.parametrize(("make", "inputs", "targets", "projections"), MODELS.values(), ids=MODELS.keys())


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(make().eval())
    return made[0], made[1]


def output(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    found = model(**inputs)
    return found if isinstance(found, torch.Tensor) else found.sample


@models
def test_all_forms_compute_what_the_dense_model_with_their_weights_computes(make, inputs, targets, projections):
    model, twin = pair(make)
    given = inputs()
    found = find_targets(model).targets
    assert (len(found), sum(name.endswith(("to_q", "to_k", "to_v")) for name in found)) == (targets, projections)
    config = DRTConfig(schedule="factored@0 dense@1 adapter@2 factored@3", rank_multiple=1)
    drt = DynamicRank(model, config, max_steps=4)
    for step in range(4):
        drt.apply(step)
        twin.load_state_dict(dense_state_dict(model))
        y, expected = output(model, given), output(twin, given)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for each, result in ((model, y), (twin, expected)):
            each.zero_grad()
            result.square().mean().backward()
        dense = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
        scale = max(gradient.abs().max() for gradient in dense.values())
        shared = {n: p.grad for n, p in model.named_parameters() if n in dense and p.grad is not None}
        assert all((gradient - dense[n]).abs().max() < 1e-5 * scale for n, gradient in shared.items())


@models
def test_a_cycle_trains(make, inputs, targets, projections):
    model, _ = pair(make)
    given = inputs()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@5 adapter@10", rank_multiple=1), max_steps=15)
    drt.apply(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(15):
        drt.begin_step(step, optimizer)
        loss = output(model, given).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[4] < losses[0]
    assert losses[14] < losses[4]


def test_fusing_projections_during_a_phase_takes_their_weights():
    model, twin = pair(conditional_unet)
    given = MODELS["conditional unet"][1]()
    DynamicRank(model, DRTConfig(schedule="factored@0", rank_multiple=1), max_steps=1).apply(0)
    twin.load_state_dict(dense_state_dict(model))
    model.fuse_qkv_projections()
    twin.fuse_qkv_projections()
    torch.testing.assert_close(output(model, given), output(twin, given), rtol=1e-4, atol=1e-5)
