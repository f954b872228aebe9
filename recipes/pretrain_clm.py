"""Pretrain a causal language model in dynamic rank.

With no argument: a small Llama-style model from scratch on the source text of Python's standard library, with a
tokenizer trained on it, by the schedule `auto`: in low rank throughout, the factors trained by the matrix optimizer;
two to five minutes on two cores.

    python recipes/pretrain_clm.py
    python recipes/pretrain_clm.py --drt_schedule auto_late
    python recipes/pretrain_clm.py --drt_schedule paper
    python recipes/pretrain_clm.py --drt_schedule "factored@0 dense@30% factored@50%" --max_steps 1000
    python recipes/pretrain_clm.py --resume_from_checkpoint last
    python recipes/pretrain_clm.py --model_name_or_path gpt2 --dataset my_texts/ --output_dir runs/gpt2

What it shows: the cost and the effective rank of every phase, in one table. When it does not help: a model this small
spends much of a step outside of its linear layers, so the seconds saved are fewer than the FLOPs promise; compare with
`--plain` before you believe a schedule.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from phase_table import print_phase_table
from stdlib_text import digest, stdlib_files
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    PreTrainedTokenizerFast,
    default_data_collator,
    set_seed,
)

from hf_drt import DRTConfig, DRTTrainer, DRTTrainingArguments, Schedule
from hf_drt.trainer.arguments import turn_off

EOS = "<|endoftext|>"
DEFAULTS = {
    "output_dir": "runs/pretrain_clm",
    "max_steps": 200,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,  # of AdamW on all weights, as with --plain
    "lr_scheduler_type": "linear",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "logging_steps": 20,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
    "drt_schedule": "auto",
    "drt_log_rank_steps": 50,
    "drt_evaluate_at_switch": True,  # of a schedule of several phases
}
# Of embeddings and norms, where the layers have drt_matrix_lr.
BESIDE_MATRICES = {"learning_rate": 3e-2}


@dataclass
class RecipeArguments:
    """What is trained, on what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Pretrained model; unset: a new one."})
    dataset: str | None = field(
        default=None,
        metadata={"help": "Text file, folder of *.txt, or dataset on the Hub; unset: Python's standard library."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of the dataset that holds the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens per sample."})
    vocab_size: int = field(default=2048, metadata={"help": "Vocabulary of the new tokenizer."})
    hidden_size: int = field(default=384, metadata={"help": "Width of the new model; a multiple of 64."})
    layers: int = field(default=3, metadata={"help": "Transformer blocks of the new model."})
    max_eval_blocks: int = field(default=256, metadata={"help": "Samples to evaluate on, at most."})
    max_texts: int | None = field(default=None, metadata={"help": "Read at most so many texts; for a quick try."})
    cache_dir: str = field(default="~/.cache/hf_drt", metadata={"help": "Folder of the trained tokenizer."})
    plain: bool = field(default=False, metadata={"help": "Dense training throughout by AdamW alone, to compare with."})

    def __post_init__(self) -> None:
        for name, lowest in (("block_size", 2), ("vocab_size", 300), ("layers", 1), ("hidden_size", 64)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        if self.hidden_size % 64:
            raise ValueError(f"hidden_size must be a multiple of 64 (the width of a head), got {self.hidden_size}.")


def load_texts(recipe: RecipeArguments) -> list[str]:
    """The documents to train on."""
    if recipe.dataset is None:
        texts = list(stdlib_files().values())
    elif (path := Path(recipe.dataset)).exists():
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        texts = [file.read_text(encoding="utf-8") for file in files]
    else:
        rows = load_dataset(recipe.dataset, split="train")
        if recipe.text_column not in rows.column_names:
            raise ValueError(
                f"--text_column '{recipe.text_column}' is not in {recipe.dataset}; allowed: {rows.column_names}."
            )
        texts = list(rows[recipe.text_column])
    texts = [text for text in texts[: recipe.max_texts] if text.strip()]
    if len(texts) < 2:
        raise ValueError(f"{recipe.dataset} holds {len(texts)} texts; at least 2 are needed, one of them to evaluate.")
    return texts


def load_tokenizer(recipe: RecipeArguments, texts: list[str]) -> PreTrainedTokenizerFast:
    """The model's own tokenizer, or a byte-level BPE trained on the texts and cached under their digest."""
    if recipe.model_name_or_path:
        return AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    folder = Path(recipe.cache_dir).expanduser() / f"bpe-{recipe.vocab_size}-{digest(texts)}"
    if not (folder / "tokenizer.json").exists():
        print(f"training a tokenizer of {recipe.vocab_size} tokens on {len(texts)} texts ...")
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocab_size=recipe.vocab_size, special_tokens=[EOS], show_progress=False)
        PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=EOS, bos_token=EOS).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, size: int, limit: int | None = None) -> Dataset:
    """The texts, joined with end-of-text tokens and cut into (at most ``limit``) samples of ``size`` tokens."""
    tokens: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        tokens += [*ids, tokenizer.eos_token_id]
    count = len(tokens) // size
    if count == 0:
        raise ValueError(f"the texts hold {len(tokens)} tokens, less than one block of --block_size {size}.")
    rows = [tokens[i * size : (i + 1) * size] for i in range(count)][:limit]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def new_model(recipe: RecipeArguments, vocab_size: int):
    """A Llama-shaped model with tied embeddings, from scratch."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 11 // 4,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden_size // 64,
        max_position_embeddings=max(recipe.block_size, 512),
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def build_trainer(recipe: RecipeArguments, args: DRTTrainingArguments) -> DRTTrainer:
    """Texts, tokenizer, model and trainer."""
    texts = load_texts(recipe)
    tokenizer = load_tokenizer(recipe, texts)
    held_out = max(1, len(texts) // 20)  # whole documents, so that no text is on both sides
    step = len(texts) // held_out
    evaluation = texts[::step][:held_out]
    training = [text for i, text in enumerate(texts) if i % step or i // step >= held_out]
    set_seed(args.seed)
    if recipe.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path)
    else:
        model = new_model(recipe, len(tokenizer))
    return DRTTrainer(
        model=model,
        args=args,
        train_dataset=blocks(training, tokenizer, recipe.block_size),
        eval_dataset=blocks(evaluation, tokenizer, recipe.block_size, recipe.max_eval_blocks),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )


def lowrank(recipe: RecipeArguments, args: DRTTrainingArguments) -> str:
    """What low rank means for the model that is trained."""
    pretrained = recipe.model_name_or_path if args.drt_start == "auto" else args.drt_start == "pretrained"
    return "adapter" if pretrained else "factored"


def switches(recipe: RecipeArguments, args: DRTTrainingArguments) -> bool:
    """Whether the schedule has more than one phase."""
    schedule = Schedule.parse(args.drt_schedule)
    return schedule.trigger is not None or len(schedule.kinds(lowrank(recipe, args))) > 1


def uses_matrix_optimizer(recipe: RecipeArguments, args: DRTTrainingArguments) -> bool:
    """Whether the layers have a learning rate of their own."""
    config = DRTConfig(schedule=args.drt_schedule, matrix_optimizer=args.drt_matrix_optimizer)
    return config.settled(lowrank(recipe, args)).uses_matrix_optimizer


def main(arguments: list[str] | None = None) -> DRTTrainer:
    """Train, evaluate, print the table, save the dense model."""
    parser = HfArgumentParser((RecipeArguments, DRTTrainingArguments), description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    recipe, args = parser.parse_args_into_dataclasses(arguments)
    if not recipe.plain and uses_matrix_optimizer(recipe, args):
        parser.set_defaults(**BESIDE_MATRICES)
        recipe, args = parser.parse_args_into_dataclasses(arguments)
    if recipe.plain:
        turn_off(args)
    elif args.drt_schedule is not None:
        args.drt_evaluate_at_switch &= switches(recipe, args)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_drt").setLevel(logging.INFO)  # the plan and its cost, and every switch
    trainer = build_trainer(recipe, args)
    checkpoint = args.resume_from_checkpoint
    trainer.train(True if checkpoint == "last" else checkpoint)  # True: the last complete one
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_state()  # the log with the last evaluation, for `hf-drt report`
    if trainer.drt is not None:
        print_phase_table(trainer)
    trainer.save_model()
    print(f"eval loss {loss:.4f}. The dense model is in {args.output_dir}; load it with")
    print(f'    AutoModelForCausalLM.from_pretrained("{args.output_dir}")')
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
