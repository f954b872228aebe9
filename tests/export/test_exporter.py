"""A form in which models are saved is added by one file, and is known everywhere then."""

import json
import logging
from pathlib import Path

import pytest
import tiny
from torch import nn
from transformers import HfArgumentParser
from typer.testing import CliRunner

from hf_drt import DRTConfig, DRTTrainer, DRTTrainingArguments
from hf_drt.checkpoint import CheckpointError
from hf_drt.cli.app import app
from hf_drt.export import (
    Exporter,
    PhaseSummary,
    RunSummary,
    Saving,
    Written,
    check_written,
    dense_state_dict,
    presented,
    save_export,
)
from hf_drt.export.card import method_section
from hf_drt.registry import EXPORTERS


class SpectraExporter(Exporter):
    """Beside a dense model the name of every tensor, in a file of its own."""

    help = "a dense model with a list of its tensors"
    loading = "Read names.json before anything else."
    code = "import json"
    files = (*Exporter.files, "names.json")
    declared = False

    def write(self, saving: Saving) -> None:
        with presented(saving.model):
            saving.save(str(saving.folder), None)
            names = sorted(saving.model.state_dict())
        (saving.folder / "names.json").write_text(json.dumps(names))

    def converted(self, model: nn.Module, state: dict) -> dict:
        return dense_state_dict(model, state)

    def verify(self, written: Written, model: nn.Module) -> None:
        if not (written.folder / "names.json").is_file():
            raise CheckpointError("names.json is missing")


@pytest.fixture
def spectra():
    EXPORTERS.add("spectra", SpectraExporter())
    yield
    EXPORTERS.remove("spectra")


def trainer(folder: Path, **settings) -> DRTTrainer:
    return tiny.trainer(folder, max_steps=2, drt_schedule="factored@0", **settings)


@pytest.mark.usefixtures("spectra")
def test_a_run_saves_in_the_new_form_and_a_later_form_takes_its_files_away(tmp_path):
    run = trainer(tmp_path, drt_export="spectra")
    run.train()
    run.save_model()
    names = json.loads((tmp_path / "names.json").read_text())
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not any(name.endswith((".U", ".V")) for name in names)
    save_export(run.model, str(tmp_path), "dense", lambda where, state: run.model.save_pretrained(where))
    assert not (tmp_path / "names.json").exists()
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.usefixtures("spectra")
def test_what_has_landed_is_verified_by_the_new_form(tmp_path, monkeypatch):
    run = trainer(tmp_path, drt_export="spectra")
    run.train()
    monkeypatch.setattr(SpectraExporter, "write", lambda self, saving: saving.save(str(saving.folder), None))
    with pytest.raises(CheckpointError, match=r"names\.json is missing"):
        run.save_model()


@pytest.mark.usefixtures("spectra")
def test_help_errors_and_the_card_know_it():
    described = "'spectra' (a dense model with a list of its tensors)"
    assert described in " ".join(HfArgumentParser(DRTTrainingArguments).format_help().split())
    shown = CliRunner().invoke(app, ["export", "source", "target", "--format", "nothing"], env={"COLUMNS": "400"})
    assert "must be one of dense, native, linear-pairs, adapter, spectra, got 'nothing'." in shown.output
    with pytest.raises(
        ValueError, match=r"export must be one of dense, native, linear-pairs, adapter, spectra, got 'nothing'"
    ):
        DRTConfig(schedule="fixed", export="nothing")
    phase = PhaseSummary("factored", 0, 2, (8, 8), 0.5)
    section = method_section(RunSummary((phase,), 1, 0.5, 0.5, "fixed", {}, "spectra", "user/name", "LlamaForCausalLM"))
    assert "### Loading\n\nRead names.json before anything else.\n\n```python\nimport json\n```" in section


def test_a_name_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"export must be one of dense, native, linear-pairs, adapter, got 'nothing'"):
        save_export(tiny.llama(), str(tmp_path), "nothing", lambda where, state: None)
    assert not list(tmp_path.iterdir())


def test_nothing_to_verify_is_said(tmp_path, caplog):
    run = trainer(tmp_path, drt_export="native")
    with caplog.at_level(logging.WARNING):
        check_written(tmp_path, run.model, "native", 0.0)
        assert not caplog.records  # a dense model has nothing to lose
        run.train()
        check_written(tmp_path / "empty", run.model, "native", 0.0)
    assert "no weights were found there, so it was not checked whether they are native" in caplog.text
