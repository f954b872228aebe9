"""What the rules of shrinking and of inputs do not reach, by model type.

``CONFIGS``: fields of the tiny configuration (``base``: of the full one that is shrunk). ``INPUTS``: see
:mod:`hf_drt.sweep.inputs`.
"""

from typing import Any

_RESNET = {
    "base": {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
        "backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]},
    },
}  # fmt: skip
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}

CONFIGS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _RESNET,
    "detr": _RESNET,
    "informer": _SERIES,
    "reformer": {"axial_pos_embds_dim": [32, 32]},
    "table-transformer": _RESNET,
    "time_series_transformer": _SERIES,
    "vipllava": {"vision_feature_layers": [-2, -1]},
}

INPUTS: dict[str, Any] = {}
NEVER: dict[str, tuple[str, ...]] = {}
