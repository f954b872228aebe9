"""The command line in the test's own process."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from typer.testing import CliRunner

from hf_drt.cli.app import app


@pytest.fixture
def hf_drt() -> Callable[..., SimpleNamespace]:
    """``hf_drt("plan", folder, "--json")``: exit code, standard output and error of a command."""

    def run(*arguments: object) -> SimpleNamespace:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)

    return run


@pytest.fixture
def configured(tmp_path) -> Callable[[str], Path]:
    """A folder with the configuration of a tiny model, and no weights."""

    def save(kind: str = "llama") -> Path:
        model = tiny.MODELS[kind]()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / f"{kind}-config")
        return tmp_path / f"{kind}-config"

    return save


@pytest.fixture
def checkpoint(tmp_path) -> Callable[..., Path]:
    """The folder of a run of four steps that has saved after each phase: checkpoint-2 and checkpoint-4."""

    def train(kind: str = "llama", schedule: str = "factored@0 adapter@2") -> Path:
        trainer = tiny.trainer(
            tmp_path / "run", tiny.MODELS[kind](), kind, max_steps=4, save_strategy="steps", save_steps=2,
            gradient_accumulation_steps=1, learning_rate=1e-2, drt_schedule=schedule,
        )  # fmt: skip
        trainer.train()
        return tmp_path / "run"

    return train
