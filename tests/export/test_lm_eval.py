"""lm-eval on native checkpoints, by ``python -m hf_drt.run -m lm_eval``, and on linear pairs without hf_drt.

Slow, and of a package that is installed beside those of the tests: ``pip install lm_eval==0.4.13``.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import mixed
import pytest
import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_drt import save_linear_pairs
from hf_drt.export import save_export

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="pip install lm_eval==0.4.13"),
]
ROOT = Path(__file__).parents[2]
CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One model as a native checkpoint, in linear pairs and dense, with a tokenizer; tasks and their data."""
    root = tmp_path_factory.mktemp("models")
    model = mixed.mixed()
    save_export(model, str(root / "native"), "native", lambda where, state: model.save_pretrained(where))
    save_export(model, str(root / "dense"), "dense", lambda where, state: model.save_pretrained(where))
    save_linear_pairs(model, root / "pairs")
    vocabulary = {f"w{i}": i for i in range(tiny.VOCAB)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for form in ("native", "dense", "pairs"):
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w0").save_pretrained(root / form)
    draw = random.Random(0)
    rows = [
        {
            "question": " ".join(draw.choices(list(vocabulary), k=12)),
            "choices": [" ".join(draw.choices(list(vocabulary), k=3)) for _ in range(4)],
            "label": draw.randrange(4),
        }
        for _ in range(40)
    ]
    (root / "tasks").mkdir()
    data = root / "data.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (root / "tasks" / f"{name}.yaml").write_text(text.format(data=data))
    return {"root": root, **{form: root / form for form in ("native", "dense", "pairs")}}


def evaluate(program: list[str], folders: dict[str, Path], form: str, options: str = "") -> tuple[dict, str]:
    """Metrics by task, and what was said."""
    root = folders["root"]
    words = [*program, "--model", "hf", "--model_args", f"pretrained={folders[form]}{options}",
             "--tasks", "local_choice,local_text", "--include_path", str(root / "tasks"), "--device", "cpu",
             "--batch_size", "4", "--output_path", str(root / f"out-{form}")]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = (root / f"out-{form}").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    numbers = {task: {k: v for k, v in row.items() if isinstance(v, float)} for task, row in results.items()}
    return numbers, done.stderr


def test_a_native_checkpoint_and_pairs_score_as_the_dense_export_does(folders):
    ours = ["-m", "hf_drt.run", "-m", "lm_eval"]
    dense, said = evaluate(["-m", "lm_eval"], folders, "dense")
    assert set(dense) == {"local_choice", "local_text"}
    assert dense["local_text"]["word_perplexity,none"] > 1
    native, said = evaluate(ours, folders, "native")
    assert "lm_eval loaded native checkpoints, 1 in number, as LlamaForCausalLM." in said
    pairs, _ = evaluate(["-m", "lm_eval"], folders, "pairs", ",trust_remote_code=True")
    for task, numbers in dense.items():
        assert native[task] == pytest.approx(numbers, rel=1e-6, abs=1e-6)
        assert pairs[task] == pytest.approx(numbers, rel=1e-6, abs=1e-6)


def test_without_hf_drt_run_a_native_checkpoint_is_no_model_to_lm_eval(folders):
    with pytest.raises(AssertionError, match="hf_drt"):
        evaluate(["-m", "lm_eval"], folders, "native")
