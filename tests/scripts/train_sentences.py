"""sentence-transformers as its users train it: no word of dynamic-rank training in it."""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

parser = argparse.ArgumentParser()
parser.add_argument("--encoder", required=True)
parser.add_argument("--sentences", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--resume")
options = parser.parse_args()

torch.manual_seed(0)
encoder = Transformer(options.encoder)
model = SentenceTransformer(modules=[encoder, Pooling(32)])
sentences = json.loads(Path(options.sentences).read_text())
half = len(sentences) // 2
data = Dataset.from_dict({"anchor": sentences[:half], "positive": sentences[half:]})
arguments = SentenceTransformerTrainingArguments(
    output_dir=options.output_dir, max_steps=12, save_steps=3, per_device_train_batch_size=8, learning_rate=1e-3,
    report_to=[], disable_tqdm=True, use_cpu=True,
)  # fmt: skip
trainer = SentenceTransformerTrainer(
    model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
)
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(f"{options.output_dir}/final")
model.save_pretrained(f"{options.output_dir}/bare")
