"""The trainers of sentence-transformers and GLiNER, which save and load in ways of their own: by mixin, and unchanged
under ``python -m hf_drt.run``. The results load in a process that knows nothing of hf_drt.

Run with ``pip install -e ".[libraries,test]" && pip install --no-deps gliner==0.2.29 sentencepiece`` (GLiNER asks
for an older transformers than hf_drt does, and works with the newer one).
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from datasets import Dataset
from tokenizers import BertWordPieceTokenizer

from hf_drt import DRTConfig, DRTTrainerMixin

pytestmark = pytest.mark.slow
sentence_transformers = pytest.importorskip("sentence_transformers")
gliner = pytest.importorskip("gliner")

SCRIPTS = Path(__file__).parents[1] / "scripts"
PLAN = "factored@0 dense@4 adapter@8"
DRT = ("--drt_schedule", PLAN, "--drt_rank", "4")
STEPS = (3, 6, 9)
LOADERS = {
    "train_sentences": "from sentence_transformers import SentenceTransformer as Model; model = Model(folder)",
    "train_entities": "from gliner import GLiNER as Model; model = Model.from_pretrained(folder)",
}
every_library = pytest.mark.parametrize("name", LOADERS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An encoder with dropout, its tokenizer, and sentences."""
    folder = tmp_path_factory.mktemp("world")
    rng = random.Random(0)
    words = ["good", "bad", "film", "plot", "a", "the", "was", "is", "very", "not"]
    sentences = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(80)]
    (folder / "sentences.json").write_text(json.dumps(sentences))
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(sentences, vocab_size=200, show_progress=False)
    pieces.save_model(str(folder))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    T.BertModel(T.BertConfig(vocab_size=300, **sizes)).save_pretrained(folder / "encoder")
    T.BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "encoder")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def flags(world: Path, name: str, out: Path, resume: Path | None = None) -> list[str]:
    words = ["--encoder", str(world / "encoder"), "--output_dir", str(out)]
    words += ["--sentences", str(world / "sentences.json")] if name == "train_sentences" else []
    return words + (["--resume", str(resume)] if resume is not None else [])


def train(name: str, *words: str, drt: tuple[str, ...] = DRT) -> None:
    """The script in a process of its own: under hf_drt.run, or plainly without ``drt``."""
    module = ["-m", "hf_drt.run"] if drt else []
    subprocess.run([sys.executable, *module, str(SCRIPTS / f"{name}.py"), *drt, *words], check=True)


def loaded(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that the library's own loading gives, in a process without hf_drt."""
    code = (
        f"import sys, torch; folder, out = sys.argv[1:]; {LOADERS[name]}; torch.save(model.state_dict(), out); "
        "assert not [m for m in sys.modules if m.startswith('hf_drt')]"
    )
    out = folder.with_suffix(".pt")
    subprocess.run([sys.executable, "-c", code, str(folder), str(out)], check=True, env=dict(os.environ))
    return torch.load(out)


def assert_equal(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


@every_library
def test_an_unchanged_script_ends_dense_and_resumes_bitwise(world, tmp_path, name):
    train(name, *flags(world, name, tmp_path / "a"))
    whole = loaded(name, tmp_path / "a" / "final")
    assert_equal(loaded(name, tmp_path / "a" / "bare"), whole)
    assert not any(key.endswith((".U", ".V", ".lora_A")) for key in whole)
    for step in STEPS:
        checkpoint = tmp_path / "a" / f"checkpoint-{step}"
        assert (checkpoint / "drt_state.json").is_file()
        train(name, *flags(world, name, tmp_path / f"b{step}", checkpoint))
        assert_equal(loaded(name, tmp_path / f"b{step}" / "final"), whole)


@every_library
def test_a_dense_phase_alone_gives_the_librarys_own_bits(world, tmp_path, name):
    train(name, *flags(world, name, tmp_path / "plain"), drt=())
    train(name, *flags(world, name, tmp_path / "ours"), drt=("--drt_schedule", "dense@0"))
    assert_equal(loaded(name, tmp_path / "ours" / "final"), loaded(name, tmp_path / "plain" / "final"))


def sentence_trainer(world: Path, folder: Path, cls: type, **options):
    sentences = json.loads((world / "sentences.json").read_text())
    torch.manual_seed(0)
    modules = sentence_transformers.sentence_transformer.modules
    model = sentence_transformers.SentenceTransformer(
        modules=[modules.Transformer(str(world / "encoder")), modules.Pooling(32)]
    )
    data = Dataset.from_dict({"anchor": sentences[:40], "positive": sentences[40:]})
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "greater_is_better": True}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=12, save_steps=3, per_device_train_batch_size=8, learning_rate=1e-3,
        report_to=[], disable_tqdm=True, use_cpu=True, metric_for_best_model="loss", **best,
    )  # fmt: skip
    loss = sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    return cls(model=model, args=arguments, train_dataset=data, eval_dataset=data, loss=loss, **options)


def mixed() -> type:
    return type("Mixed", (DRTTrainerMixin, sentence_transformers.SentenceTransformerTrainer), {})


def test_by_mixin_the_best_model_is_that_of_its_checkpoint(world, tmp_path):
    settings = DRTConfig(schedule=PLAN, rank=4, export="native")
    trainer = sentence_trainer(world, tmp_path, mixed(), drt=settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert_equal(sentence_transformers.SentenceTransformer(str(best)).state_dict(), trainer.model.state_dict())


def test_a_native_model_is_declared_at_the_encoder(world, tmp_path):
    settings = DRTConfig(schedule="factored@0", rank=4, export="native")
    trainer = sentence_trainer(world, tmp_path, mixed(), drt=settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "native"))
    declared = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]["layers"]
    assert set(declared) <= {name for name, _ in trainer.model[0].model.named_modules()}
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "native"))
    assert_equal(again.state_dict(), trainer.model.state_dict())


def test_with_drt_off_the_mixin_changes_nothing_and_resumes(world, tmp_path):
    plain = sentence_trainer(world, tmp_path / "a", sentence_transformers.SentenceTransformerTrainer)
    plain.train()
    ours = sentence_trainer(world, tmp_path / "b", mixed())
    ours.train()
    assert_equal(ours.model.state_dict(), plain.model.state_dict())
    again = sentence_trainer(world, tmp_path / "c", mixed())
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-6"))
    assert_equal(again.model.state_dict(), plain.model.state_dict())
