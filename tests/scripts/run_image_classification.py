"""Train an image classifier; a script of the usual kind, which knows nothing of hf_drt."""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForImageClassification, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer import Trainer
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class DataTrainingArguments:
    """Which data."""

    train_file: str = field(metadata={"help": "JSON lines with image (rows of grey values, 0 to 255) and label."})
    image_column_name: str = field(default="image", metadata={"help": "Column of the images."})
    label_column_name: str = field(default="label", metadata={"help": "Column of the labels."})
    train_val_split: float = field(default=0.25, metadata={"help": "Share that is held out."})


@dataclass
class ModelArguments:
    """Which model."""

    config_name: str = field(metadata={"help": "Configuration of the model."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Weights to start from."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data is kept."})


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    set_seed(training_args.seed)

    dataset = load_dataset(
        "json", data_files={"train": data_args.train_file}, cache_dir=model_args.cache_dir, split="train"
    )
    dataset = dataset.train_test_split(data_args.train_val_split, seed=0)
    labels = sorted(set(dataset["train"][data_args.label_column_name]))

    def to_pixel_values(image):
        return torch.tensor(image, dtype=torch.float32)[None] / 127.5 - 1

    def transforms(rows):
        rows["pixel_values"] = [to_pixel_values(image) for image in rows[data_args.image_column_name]]
        return rows

    def collate_fn(examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {
            "pixel_values": pixel_values,
            "labels": torch.tensor([labels.index(example[data_args.label_column_name]) for example in examples]),
        }

    def compute_metrics(p):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    config = AutoConfig.from_pretrained(
        model_args.config_name,
        label2id={name: i for i, name in enumerate(labels)},
        id2label=dict(enumerate(labels)),
    )
    if model_args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(model_args.model_name_or_path, config=config)
    else:
        model = AutoModelForImageClassification.from_config(config)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=dataset["train"].with_transform(transforms),
        eval_dataset=dataset["test"].with_transform(transforms),
        compute_metrics=compute_metrics,
        data_collator=collate_fn,
    )
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint
        train_result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", train_result.metrics)
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
