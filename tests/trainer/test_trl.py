"""TRL's trainers in dynamic rank; offline, with a tiny Llama and a tokenizer made here."""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as T
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer

from hf_drt import DRTConfig, DRTTrainer, DRTTrainerMixin, DRTTrainingArguments, form_of

pytest.importorskip("trl")

from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from hf_drt.trl import DRTSFTConfig, DRTSFTTrainer

VOCABULARY = 300
PHASES = "factored@0 dense@4 adapter@7"
STEPS = 10
SETTINGS = {"drt_schedule": PHASES, "drt_rank": 4}
# What TRL turns on by itself is off where numbers are compared to float32 rounding.
EXACT = {"bf16": False, "gradient_checkpointing": False}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<eos>"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["def f(x): return x + 1"] * 3, VOCABULARY, special_tokens=["<eos>"], show_progress=False)
    return T.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", chat_template=TEMPLATE)


def rows(kind: str = "pairs", count: int = 40) -> Dataset:
    """Forty examples in one of the shapes that SFTTrainer takes."""
    pairs = [(f"def f{i}(x):", f" return x + {i}" * (1 + i % 3)) for i in range(count)]
    if kind == "text":
        return Dataset.from_dict({"text": [prompt + completion for prompt, completion in pairs]})
    if kind == "chat":
        roles = ("user", "assistant")
        chats = [[{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)] for pair in pairs]
        return Dataset.from_dict({"messages": chats})
    return Dataset.from_dict({"prompt": [p for p, _ in pairs], "completion": [c for _, c in pairs]})


def llama():
    return tiny.llama(vocab_size=VOCABULARY, attention_dropout=0.1, max_position_embeddings=512)


def arguments(folder, cls=DRTSFTConfig, **changes):
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 2,
        "learning_rate": 3e-3, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return cls(**{**defaults, **changes})


def sft(folder, tokenizer, model=None, kind="pairs", **changes) -> DRTSFTTrainer:
    model = llama() if model is None else model
    settings = {**SETTINGS, **changes}
    if settings["drt_schedule"] in (None, "dense@0"):
        del settings["drt_rank"]  # nothing would use it
    args = arguments(folder, **settings)
    return DRTSFTTrainer(model, args, train_dataset=rows(kind), processing_class=tokenizer)


def plain_sft(folder, tokenizer, **changes) -> SFTTrainer:
    args = arguments(folder, SFTConfig, **changes)
    return SFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer)


def logged(trainer, key: str) -> list:
    return [row[key] for row in trainer.state.log_history if key in row]


def assert_equal_weights(trainer, other) -> None:
    weights, expected = trainer.model.state_dict(), other.model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def assert_saves_dense(trainer, folder, tolerance: float = 1e-5) -> None:
    """What save_model writes is a plain model with the trainer's logits."""
    trainer.save_model(folder)
    loaded, info = T.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    assert (tiny.logits(loaded, batch) - tiny.logits(trainer.model, batch)).abs().max() <= tolerance


# ---- whole cycles


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pairs", {}),
        ("text", {}),
        ("text", {"packing": True, "max_length": 32}),
        pytest.param(
            "text", {"packing": True, "max_length": 32, "packing_strategy": "wrapped"}, marks=pytest.mark.slow
        ),
        pytest.param("pairs", {"completion_only_loss": False, "loss_type": "dft"}, marks=pytest.mark.slow),
        ("chat", {"assistant_only_loss": True}),
    ],
    ids=["pairs", "text", "packed", "wrapped", "dft", "chat"],
)
def test_a_whole_cycle_keeps_the_function_and_saves_a_dense_model(tmp_path, tokenizer, kind, changes):
    trainer = sft(tmp_path, tokenizer, kind=kind, **EXACT, **changes)
    trainer.train()
    assert len(logged(trainer, "drt_switch_seconds")) == 3
    errors = logged(trainer, "drt_function_error")
    assert len(errors) == 2
    assert max(errors) <= 1e-5
    assert {type(form_of(m)).__name__ for m in map(trainer.model.get_submodule, trainer.drt.targets)} == {"Dense"}
    assert_saves_dense(trainer, tmp_path / "saved")


def test_trls_own_defaults_train(tmp_path, tokenizer):
    """bf16 autocast and gradient checkpointing: of SFTConfig, not chosen here."""
    trainer = sft(tmp_path, tokenizer)
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    assert len(logged(trainer, "drt_switch_seconds")) == 3
    assert max(logged(trainer, "drt_function_error")) <= 0.02  # logits of about 1 with eight bits of mantissa
    assert_saves_dense(trainer, tmp_path / "saved", tolerance=0.02)  # the trainer's model stays under autocast


def test_off_is_trls_trainer_bit_for_bit(tmp_path, tokenizer):
    ours = sft(tmp_path, tokenizer, drt_schedule=None)
    ours.train()
    theirs = plain_sft(tmp_path, tokenizer)
    theirs.train()
    assert ours.drt is None
    assert_equal_weights(ours, theirs)
    assert logged(ours, "loss") == logged(theirs, "loss")


def test_one_dense_phase_trains_and_logs_what_trls_trainer_does(tmp_path, tokenizer):
    """TRL adds what it has gathered since the last row to any row: not to those of DRT, or the others would lack it."""
    ours = sft(tmp_path, tokenizer, drt_schedule="dense@0", drt_log_rank_steps=1)
    ours.train()
    theirs = plain_sft(tmp_path, tokenizer)
    theirs.train()
    assert_equal_weights(ours, theirs)
    for key in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert logged(ours, key) == logged(theirs, key)
    assert len(logged(ours, "drt_effective_rank_mean")) == STEPS


class Tells(DRTTrainer):
    """A trainer with metrics of its own, which are not TRL's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"mine": 0.5}

    def log(self, logs, *args):
        super().log({**logs, **self._metrics}, *args)


def test_batches_of_dense_phases_are_divided(tmp_path, tokenizer):
    """The same loss, gradient norm and count of tokens as in whole batches; completions differ in length."""
    logs = []
    for pieces in (1, 3):
        settings = {
            "logging_steps": 1,
            "max_steps": 6,
            "gradient_accumulation_steps": 2,
            "drt_schedule": "factored@0 dense@2",
        }
        args = arguments(tmp_path, **SETTINGS | EXACT | settings, drt_dense_accumulation=pieces)
        model = tiny.llama(vocab_size=VOCABULARY, max_position_embeddings=512)
        trainer = DRTSFTTrainer(model, args, train_dataset=rows(), processing_class=tokenizer)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "loss" in row])
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "num_tokens"):
            assert other[key] == pytest.approx(one[key], rel=1e-3), key


def test_a_padding_free_batch_is_not_divided(tmp_path, tokenizer):
    args = arguments(tmp_path, **SETTINGS | EXACT, drt_dense_accumulation=2, padding_free=True, max_length=None)
    with pytest.raises(ValueError, match=r"does not go with padding_free batches, which are one row"):
        DRTSFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer)


def test_a_loss_of_pairs_is_not_divided(tmp_path, tokenizer):
    drt = DRTConfig(schedule=PHASES, rank=4, dense_accumulation=2)
    args = arguments(tmp_path, DPOConfig, **EXACT)
    with pytest.raises(ValueError, match=r"does not go with the compute_loss of trl\..*DPOTrainer, of which it is not"):
        DRTDPOTrainer(llama(), llama(), args, train_dataset=preferences(), processing_class=tokenizer, drt=drt)


def test_metrics_of_another_kind_are_left_alone(tmp_path):
    trainer = tiny.trainer(tmp_path, cls=Tells)
    trainer.train()
    assert [row["mine"] for row in trainer.state.log_history if "drt_phase" in row] == [0.5] * 8


# ---- models, settings, resuming


def test_a_path_is_a_pretrained_model(tmp_path, tokenizer):
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = str(tmp_path / "model")
    args = arguments(tmp_path, drt_schedule="paper", drt_rank=4)
    by_path = DRTSFTTrainer(path, args, train_dataset=rows())  # the tokenizer is the model's
    by_path.train()
    assert str(by_path.drt.plan) == "adapter@0 dense@4 adapter@8"
    by_object = sft(tmp_path, tokenizer, T.AutoModelForCausalLM.from_pretrained(path), drt_schedule="paper")
    by_object.train()
    assert_equal_weights(by_path, by_object)


def test_settings_may_be_a_keyword(tmp_path, tokenizer):
    by_flag = sft(tmp_path, tokenizer, drt_rank=None)
    by_flag.train()
    args = arguments(tmp_path, SFTConfig)
    by_keyword = DRTSFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer, drt=PHASES)
    by_keyword.train()
    assert_equal_weights(by_flag, by_keyword)


def test_the_config_has_every_flag():
    parser = T.HfArgumentParser(DRTSFTConfig)
    words = "--drt_schedule fixed --drt_rank 8 --packing --use_cpu"
    (args,) = parser.parse_args_into_dataclasses(words.split())
    assert (args.drt_schedule, args.drt_rank, args.packing) == ("fixed", 8, True)
    assert args.learning_rate == SFTConfig.learning_rate
    text = " ".join(parser.format_help().split())
    assert "factored@0 dense@40% adapter@80%" in text
    assert "Sequences longer than `max_length` are truncated" in text


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"packing": True, "max_length": 32, **EXACT}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bitwise_equal_from_every_phase(tmp_path, tokenizer, changes):
    kind = "text" if changes else "pairs"
    expected = sft(tmp_path, tokenizer, kind=kind, save_strategy="steps", save_steps=1, **changes)
    expected.train()
    for step in (2, 4, 5, 8):  # within each phase, and at a boundary
        trainer = sft(tmp_path / "resumed", tokenizer, kind=kind, **changes)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_equal_weights(trainer, expected)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    trainer = sft(tmp_path, tokenizer, kind=kind, **changes)
    trainer.train(resume_from_checkpoint=True)
    assert_equal_weights(trainer, expected)


# ---- refusals


def test_arguments_that_trl_would_take_apart_are_refused(tmp_path, tokenizer):
    args = arguments(tmp_path, DRTTrainingArguments, **SETTINGS)
    with pytest.raises(TypeError, match="takes its drt_\\* settings from a DRTSFTConfig, got DRTTrainingArguments"):
        DRTSFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer)


def test_a_bad_schedule_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="'papr' is neither a preset"):
        arguments(tmp_path, drt_schedule="papr")


def test_a_peft_config_is_refused(tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    args = arguments(tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="does not support a PEFT model"):
        DRTSFTTrainer(llama(), args, train_dataset=rows(), processing_class=tokenizer, peft_config=peft.LoraConfig(r=2))


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "hf_drt.trl")
    with pytest.raises(ImportError, match=r"hf_drt.trl needs TRL 1.16 or newer, .* pip install 'hf-drt\[trl\]'"):
        importlib.import_module("hf_drt.trl")


# ---- other trainers of TRL


class DRTDPOTrainer(DRTTrainerMixin, DPOTrainer):
    """As a user would write it."""


class DRTGRPOTrainer(DRTTrainerMixin, GRPOTrainer):
    """As a user would write it."""


class DRTRewardTrainer(DRTTrainerMixin, RewardTrainer):
    """As a user would write it."""


@pytest.mark.slow
def test_trls_own_script_trains_under_hf_drt_run(tmp_path, tokenizer):
    """In a process of its own: TRL takes the Trainer that it finds when it is imported."""
    path = tmp_path / "model"
    llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows()))
    expected = sft(
        tmp_path / "expected", tokenizer, T.AutoModelForCausalLM.from_pretrained(path), save_strategy="steps"
    )
    expected.train()
    expected.save_model()
    words = [
        "-m", "hf_drt.run", "-m", "trl.scripts.sft", "--drt_schedule", PHASES, "--drt_rank", "4",
        "--model_name_or_path", path, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out",
        "--max_steps", STEPS, "--per_device_train_batch_size", 4, "--logging_steps", 2, "--learning_rate", 3e-3,
        "--use_cpu", "--dataloader_pin_memory", False,
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, env=environment)
    assert done.returncode == 0, done.stderr
    assert "phase 2 (adapter)" in done.stderr
    weights, others = (load_file(tmp_path / out / "model.safetensors") for out in ("expected", "out"))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def preferences() -> Dataset:
    pairs = rows()
    return pairs.rename_column("completion", "chosen").add_column("rejected", [" pass"] * len(pairs))


def test_dpo_goes_through_the_phases_against_a_reference_that_stays(tmp_path, tokenizer):
    reference = llama()
    kept = copy.deepcopy(reference.state_dict())
    args = arguments(tmp_path, DPOConfig, **EXACT, save_strategy="steps", save_steps=1)
    parts = {"train_dataset": preferences(), "processing_class": tokenizer, "drt": PHASES}
    trainer = DRTDPOTrainer(llama(), reference, args, **parts)
    trainer.train()
    assert len(logged(trainer, "drt_switch_seconds")) == 3
    assert logged(trainer, "rewards/accuracies")[-1] > 0.5
    assert reference.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in reference.state_dict().items())
    assert_saves_dense(trainer, tmp_path / "saved")
    again = DRTDPOTrainer(llama(), llama(), arguments(tmp_path / "b", DPOConfig, **EXACT), **parts)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal_weights(again, trainer)


@pytest.mark.slow
def test_a_reward_model_goes_through_the_phases(tmp_path, tokenizer):
    config = copy.deepcopy(llama().config)
    config.num_labels = 1
    torch.manual_seed(0)
    model = T.LlamaForSequenceClassification(config)
    args = arguments(tmp_path, RewardConfig, **EXACT)
    trainer = DRTRewardTrainer(model, args, train_dataset=preferences(), processing_class=tokenizer, drt=PHASES)
    trainer.train()
    assert len(logged(trainer, "drt_switch_seconds")) == 3
    assert logged(trainer, "accuracy")[-1] > 0.5


@pytest.mark.slow
def test_grpo_generates_in_every_phase(tmp_path, tokenizer):
    def distinct(completions, **others):
        return [float(len(set(text))) for text in completions]

    args = arguments(tmp_path, GRPOConfig, **EXACT, num_generations=4, max_completion_length=8, logging_steps=1)
    prompts = rows().remove_columns("completion")
    parts = {"train_dataset": prompts, "processing_class": tokenizer, "drt": PHASES}
    trainer = DRTGRPOTrainer(llama(), reward_funcs=distinct, args=args, **parts)
    trainer.train()
    assert len(logged(trainer, "drt_switch_seconds")) == 3
    assert len(logged(trainer, "reward")) == STEPS
    assert_saves_dense(trainer, tmp_path / "saved")
