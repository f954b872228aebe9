"""What an older hf_drt has written loads and goes on to the same bits.

The older version is taken from the history of this repository and runs in a process of its own; nothing of what it
writes is kept here.
"""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import older_runs
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from hf_drt import DRTTrainingArguments
from hf_drt.checkpoint import CheckpointError
from hf_drt.export import load_peft_adapter

ROOT = Path(__file__).parents[2]
OLDER = "db563d5d8613179e325e539dd771fac38a3f0c8c"
"""The last commit before the modules moved into packages."""
RENAMED = {"auto": {"drt_schedule": "auto_late"}}
"""What has another name today, by run."""


def extracted(commit: str, folder: Path, repository: Path = ROOT) -> Path:
    """``folder`` with the package as it was at ``commit``; without that part of the history the test is skipped."""
    if not (repository / ".git").exists():
        pytest.skip("needs the history of hf_drt, which a source distribution does not have: run it in a clone.")
    git = {"cwd": repository, "capture_output": True, "text": True}
    known = subprocess.run(["git", "cat-file", "-e", f"{commit}^{{commit}}"], **git)
    if known.returncode:
        reason = known.stderr.strip()
        pytest.skip(f"needs commit {commit[:7]}, which this clone lacks ({reason}): git fetch --unshallow brings it.")
    archive = folder / "older.tar"
    subprocess.run(["git", "archive", "--output", archive, commit, "hf_drt"], **git, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory) -> Path:
    """The folder in which the older version has made all of :mod:`older_runs`."""
    package = extracted(OLDER, tmp_path_factory.mktemp("package"))
    written = tmp_path_factory.mktemp("written")
    paths = os.pathsep.join(map(str, (package, Path(tiny.__file__).parent)))
    done = subprocess.run(
        [sys.executable, older_runs.__file__, str(written)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert Path(done.stdout.splitlines()[0]).is_relative_to(package), "not the older version"
    return written


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the bit, in whatever nesting of dicts and lists."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}/{index}")
    else:
        assert found == expected, where


@pytest.mark.sampled(6)
@pytest.mark.parametrize("step", older_runs.CHECKPOINTS)
@pytest.mark.parametrize("name", older_runs.RUNS)
def test_a_checkpoint_goes_on_to_the_same_bits(older, tmp_path, name, step):
    run = older_runs.trainer(name, tmp_path, **RENAMED.get(name, {}))
    run.train(resume_from_checkpoint=str(older / name / f"checkpoint-{step}"))
    assert_same(older_runs.outcome(run, older_runs.RUNS[name][0]), load(older / name / "outcome.pt"))


@pytest.mark.parametrize("step", older_runs.CHECKPOINTS)
def test_a_checkpoint_of_auto_does_not_go_on_as_what_auto_is_today(older, tmp_path, step):
    run = older_runs.trainer("auto", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"If an earlier version wrote it by the name of auto, resume with schedule='auto_late'"
    ):
        run.train(resume_from_checkpoint=str(older / "auto" / f"checkpoint-{step}"))


@pytest.mark.parametrize("name", older_runs.RUNS)
def test_a_native_model_computes_the_same(older, name):
    kind = older_runs.RUNS[name][0]
    expected = load(older / name / "outcome.pt")
    model = type(older_runs.MODELS[kind]()).from_pretrained(older / name / "native")
    assert_same(model.state_dict(), expected["weights"])
    assert_same(tiny.logits(model, tiny.batch(kind)), expected["logits"])


def test_a_native_model_trains_on_to_the_same_bits(older, tmp_path):
    model = LlamaForCausalLM.from_pretrained(older / "linear" / "native")
    assert_same(older_runs.outcome(older_runs.trained_on(model, tmp_path)), load(older / "native_on.pt"))


def base(older: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(older / "peft" / "export" / "base")


def test_a_peft_export_computes_the_same(older):
    model = PeftModel.from_pretrained(base(older), older / "peft" / "export")
    assert_same(tiny.logits(model, tiny.batch()), load(older / "peft" / "outcome.pt")["logits"])


def test_a_peft_export_trains_on_to_the_same_bits(older, tmp_path):
    model = base(older)
    load_peft_adapter(model, older / "peft" / "export")
    assert_same(tiny.logits(model, tiny.batch()), load(older / "peft" / "outcome.pt")["logits"])
    assert_same(older_runs.outcome(older_runs.trained_on(model, tmp_path)), load(older / "peft_on.pt"))


@pytest.mark.parametrize("name", older_runs.RUNS)
def test_pickled_training_arguments_are_todays(older, name):
    args = torch.load(older / name / "checkpoint-5" / "training_args.bin", weights_only=False)
    assert isinstance(args, DRTTrainingArguments)
    ours = older_runs.trainer(name, Path(args.output_dir)).args
    expected = {k: v for k, v in vars(ours).items() if k.startswith("drt_")}
    # Settings that are newer have their defaults; two have become unset by default since, with the same meaning.
    meant = {"drt_adapter_init": "zero", "drt_moments": "reset"}
    assert {k: getattr(args, k) or meant.get(k) for k in expected} == {
        k: v or meant.get(k) for k, v in expected.items()
    }
    assert {k for k in vars(args) if k.startswith("drt_")} <= expected.keys()


def test_without_the_history_it_is_said_what_is_missing(tmp_path):
    with pytest.raises(pytest.skip.Exception, match="which a source distribution does not have: run it in a clone"):
        extracted(OLDER, tmp_path, repository=tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    with pytest.raises(pytest.skip.Exception, match=f"needs commit {OLDER[:7]}, .* git fetch --unshallow brings it"):
        extracted(OLDER, tmp_path, repository=tmp_path)
