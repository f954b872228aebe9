"""Tiny models of every kind the suite needs, and batches for them. Seconds, not minutes."""

import re
from collections.abc import Callable

import torch
import transformers as T
from datasets import Dataset
from torch import nn

from hf_drt import DRTConfig, DRTTrainer, DRTTrainingArguments

VOCAB, LENGTH = 64, 8
SIZES = {"vit": 8, "resnet": 16}  # of the pictures
PHASES = "factored@0 dense@40% adapter@70%"


def llama(**changes) -> nn.Module:
    config = T.LlamaConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    return _seeded(lambda: T.LlamaForCausalLM(config))


def gpt2(**changes) -> nn.Module:
    config = T.GPT2Config(
        **{
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **changes,
        }
    )
    return _seeded(lambda: T.GPT2LMHeadModel(config))


def bert() -> nn.Module:
    config = T.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return _seeded(lambda: T.BertForMaskedLM(config))


def t5() -> nn.Module:
    config = T.T5Config(
        vocab_size=VOCAB, d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return _seeded(lambda: T.T5ForConditionalGeneration(config))


def vit() -> nn.Module:
    config = T.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        num_labels=4,
    )  # fmt: skip
    return _seeded(lambda: T.ViTForImageClassification(config))


def mixtral(**changes) -> nn.Module:
    """Fused experts, which are apart in the files of a dense model."""
    config = T.MixtralConfig(
        **{
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
            "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **changes,
        }
    )  # fmt: skip
    return _seeded(lambda: T.MixtralForCausalLM(config))


def resnet(**changes) -> nn.Module:
    """Convolutions alone; not among :data:`MODELS`, whose tests are of linear layers."""
    config = T.ResNetConfig(
        **{
            "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic", "num_labels": 4,
            **changes,
        }
    )  # fmt: skip
    return _seeded(lambda: T.ResNetForImageClassification(config))


# By kind, the class that loads such a model from its folder.
AUTO: dict[str, type] = {
    "llama": T.AutoModelForCausalLM,
    "gpt2": T.AutoModelForCausalLM,
    "bert": T.AutoModelForMaskedLM,
    "t5": T.AutoModelForSeq2SeqLM,
    "vit": T.AutoModelForImageClassification,
    "mixtral": T.AutoModelForCausalLM,
}
MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit}


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def dataset(kind: str = "llama", rows: int = 64) -> Dataset:
    """Random rows that the model of this kind takes, labels included; the same ones every time."""
    generator = torch.Generator().manual_seed(1)
    if kind in SIZES:
        images = torch.randn(rows, 3, SIZES[kind], SIZES[kind], generator=generator)
        labels = torch.randint(0, 4, (rows,), generator=generator)
        return Dataset.from_dict({"pixel_values": images.tolist(), "labels": labels.tolist()}).with_format("torch")
    ids = torch.randint(1, VOCAB, (rows, LENGTH), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def batch(kind: str = "llama", rows: int = 4) -> dict[str, torch.Tensor]:
    """One batch of :func:`dataset`."""
    return dict(dataset(kind, rows).with_format("torch")[:])


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def config(**changes) -> DRTConfig:
    """Settings of a plan with every form, for widths as small as these."""
    return DRTConfig(**{"schedule": PHASES, "rank_multiple": 4} | changes)


def arguments(folder, **changes) -> DRTTrainingArguments:
    """Short runs with everything on that makes resuming hard: accumulation, cosine LR, shuffled data."""
    defaults = {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 4, "report_to": [],
        "gradient_accumulation_steps": 2, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "save_strategy": "no", "logging_steps": 5, "disable_tqdm": True, "dataloader_pin_memory": False,
        "drt_schedule": "factored@0 dense@30% adapter@60% factored@80%",
    }  # fmt: skip
    settings = {**defaults, **changes}
    if "drt_rank" not in settings and _has_shares(settings["drt_schedule"]):
        settings.setdefault("drt_rank_multiple", 4)
    return DRTTrainingArguments(**settings)


def _has_shares(schedule: str | None) -> bool:
    """Whether a rank in the schedule is a share of the width, which is rounded to a multiple."""
    low_rank = [phase for phase in (schedule or "").split() if not phase.startswith("dense")]
    return any(re.search(r":\d+@", phase) is None for phase in low_rank)


def trainer(folder, model: nn.Module | None = None, kind: str = "llama", cls=DRTTrainer, **changes) -> DRTTrainer:
    """A trainer on :func:`dataset`; by default a Llama with dropout."""
    model = model if model is not None else llama(attention_dropout=0.1)
    data = dataset(kind)
    return cls(model=model, args=arguments(folder, **changes), train_dataset=data, eval_dataset=data)
