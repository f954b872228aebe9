"""Train an image classifier from scratch in dynamic rank, on Fashion-MNIST.

With no argument: a vision transformer for 300 update steps through the phases factored -> dense -> adapter; about four
minutes on one core. It wants the packages of the `recipes` extra, and

    apt-get install dataset-fashion-mnist

    python recipes/train_image_classifier.py
    python recipes/train_image_classifier.py --plain --output_dir runs/plain
    python recipes/train_image_classifier.py --model resnet20 --plain --optim sgd --optim_args momentum=0.9 \\
        --learning_rate 0.1 --label_smoothing_factor 0.1

What it shows: the same flags as for language models. When it does not help: pictures this small are soon learned, and a
short run in low rank ends behind `--plain`.
"""

import sys
from dataclasses import dataclass, field

import torch
from accuracy_metric import Accuracy
from fashion_mnist import CLASSES, SIZES, FashionMNIST
from image_models import FAMILIES, new_image_classifier
from phase_table import print_phase_table
from transformers import EvalPrediction, HfArgumentParser, set_seed

from hf_drt import DRTTrainer, DRTTrainingArguments
from hf_drt.trainer.arguments import turn_off

DEFAULTS = {
    "output_dir": "runs/train_image_classifier",
    "max_steps": 300,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 250,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "weight_decay": 0.05,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "drt_schedule": "paper",
    "drt_log_rank_steps": 100,
    "drt_evaluate_at_switch": True,
}


@dataclass
class RecipeArguments:
    """Which model is trained, on how much."""

    model: str = field(default="vit", metadata={"help": f"One of {', '.join(FAMILIES)}."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many; for a quick try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many; for a quick try."})
    plain: bool = field(default=False, metadata={"help": "Dense training throughout, to compare with."})

    def __post_init__(self) -> None:
        for name, split in (("max_train_samples", "train"), ("max_eval_samples", "t10k")):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= SIZES[split]:
                raise ValueError(f"{name} must be from 1 to {SIZES[split]}, got {value}.")


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The metric, from the logits of the whole evaluation set."""
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions.argmax(-1), references=prediction.label_ids)


def build_trainer(recipe: RecipeArguments, args: DRTTrainingArguments) -> DRTTrainer:
    """Model, data and trainer."""
    set_seed(args.seed)
    return DRTTrainer(
        model=new_image_classifier(recipe.model, classes=len(CLASSES)),
        args=args,
        train_dataset=FashionMNIST("train", recipe.max_train_samples),
        eval_dataset=FashionMNIST("t10k", recipe.max_eval_samples),
        compute_metrics=accuracy,
    )


def main(arguments: list[str] | None = None) -> DRTTrainer:
    """Train, evaluate, print the table, save the dense model."""
    parser = HfArgumentParser((RecipeArguments, DRTTrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    recipe, args = parser.parse_args_into_dataclasses(arguments)
    if recipe.plain:
        turn_off(args)
    trainer = build_trainer(recipe, args)
    trainer.train(args.resume_from_checkpoint)
    result = trainer.evaluate()
    if trainer.drt is not None:
        print_phase_table(trainer, metric="eval_accuracy")
    trainer.save_model()
    print(f"accuracy {result['eval_accuracy']:.4f}. The dense model is in {args.output_dir}; load it with")
    if recipe.model == "vit":
        print(f'    AutoModelForImageClassification.from_pretrained("{args.output_dir}")')
    else:
        print(f'    model = new_image_classifier("{recipe.model}")  # its stem is in no configuration')
        print(f'    model.load_state_dict(safetensors.torch.load_file("{args.output_dir}/model.safetensors"))')
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
