"""Train a sentence classifier on CSV files; a script of the usual kind, which knows nothing of hf_drt."""

import logging
import os
import sys
from dataclasses import dataclass, field

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint


@dataclass
class DataTrainingArguments:
    """Which data."""

    train_file: str = field(metadata={"help": "CSV file with the columns sentence and label."})
    validation_file: str = field(metadata={"help": "CSV file with the same columns."})
    max_seq_length: int = field(default=16, metadata={"help": "Longer sentences are cut."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad all sentences, not each batch."})


@dataclass
class ModelArguments:
    """Which model."""

    config_name: str = field(metadata={"help": "Configuration of the model."})
    tokenizer_name: str = field(metadata={"help": "Its tokenizer."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Weights to start from."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where prepared data is kept."})


class WeightedTrainer(Trainer):
    """A trainer of the script's own, with a loss that weighs the classes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(**inputs)
        weights = outputs.logits.new_ones(outputs.logits.shape[-1])
        weights[0] = 2.0
        loss = (outputs.logits.log_softmax(-1).gather(1, labels[:, None])[:, 0] * -weights[labels]).mean()
        return (loss, outputs) if return_outputs else loss


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(json_file=sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.WARNING)
    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
    set_seed(training_args.seed)

    raw_datasets = load_dataset(
        "csv",
        data_files={"train": data_args.train_file, "validation": data_args.validation_file},
        cache_dir=model_args.cache_dir,
    )
    label_list = sorted(set(raw_datasets["train"]["label"]))
    config = AutoConfig.from_pretrained(model_args.config_name, num_labels=len(label_list))
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name)
    if model_args.model_name_or_path:
        model = AutoModelForSequenceClassification.from_pretrained(model_args.model_name_or_path, config=config)
    else:
        model = AutoModelForSequenceClassification.from_config(config)
    padding = "max_length" if data_args.pad_to_max_length else False

    def preprocess_function(examples):
        result = tokenizer(examples["sentence"], padding=padding, max_length=data_args.max_seq_length, truncation=True)
        result["label"] = [label_list.index(label) for label in examples["label"]]
        return result

    with training_args.main_process_first(desc="dataset map pre-processing"):
        raw_datasets = raw_datasets.map(preprocess_function, batched=True)

    def compute_metrics(p: EvalPrediction):
        preds = np.argmax(p.predictions[0] if isinstance(p.predictions, tuple) else p.predictions, axis=1)
        return {"accuracy": float((preds == p.label_ids).mean())}

    trainer = WeightedTrainer(
        model=model,
        args=training_args,
        train_dataset=raw_datasets["train"],
        eval_dataset=raw_datasets["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=None if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        train_result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or last_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", train_result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate(eval_dataset=raw_datasets["validation"]))
    if training_args.do_predict:
        predictions = trainer.predict(raw_datasets["validation"].remove_columns("label")).predictions
        np.savetxt(f"{training_args.output_dir}/predict_results.txt", np.argmax(predictions, axis=1), fmt="%d")


if __name__ == "__main__":
    main()
