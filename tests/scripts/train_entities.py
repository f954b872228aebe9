"""GLiNER as its users train it: no word of dynamic-rank training in it."""

import argparse
import random

import torch
from gliner import GLiNER
from gliner.training import Trainer

parser = argparse.ArgumentParser()
parser.add_argument("--encoder", required=True)
parser.add_argument("--output_dir", required=True)
parser.add_argument("--resume")
options = parser.parse_args()

torch.manual_seed(0)
model = GLiNER.from_config(
    {
        "model_name": options.encoder, "hidden_size": 32, "max_width": 4, "max_types": 5, "max_len": 64,
        "dropout": 0.1, "span_mode": "markerV0", "words_splitter_type": "whitespace", "num_rnn_layers": 0,
    }
)  # fmt: skip
rng = random.Random(1)
texts = [rng.choices(["good", "bad", "film", "plot", "a", "the", "was", "is"], k=8) for _ in range(40)]
data = [
    {"tokenized_text": text, "ner": [[i, i, "thing"] for i, word in enumerate(text) if word in ("film", "plot")]}
    for text in texts
]
arguments = model.create_training_args(
    output_dir=options.output_dir, max_steps=12, save_steps=3, learning_rate=1e-3, per_device_train_batch_size=8,
    use_cpu=True, dataloader_num_workers=0, disable_tqdm=True,
)  # fmt: skip
trainer = Trainer(
    model=model, args=arguments, train_dataset=data, eval_dataset=data[:8],
    data_collator=model._create_data_collator(), processing_class=model.data_processor.transformer_tokenizer,
)  # fmt: skip
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(f"{options.output_dir}/final")
model.save_pretrained(f"{options.output_dir}/bare")
