"""What the compiler keeps over a switch: of blocks compiled one by one all graphs, of a whole model none."""

import logging

import pytest
import tiny
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

TURNS = "rotate(groups=4,share=80)"
REGIONAL = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"


class Graphs(TrainerCallback):
    """How many graphs there were at the end of each update step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seen.append(counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(folder, **settings):
    """Two update steps in each of five phases; the trainer, and its graphs after each step."""
    trainer = tiny.trainer(
        folder, model=tiny.llama(num_hidden_layers=4), drt_schedule=TURNS, max_steps=10, gradient_accumulation_steps=1,
        **settings,
    )  # fmt: skip
    graphs = Graphs()
    trainer.add_callback(graphs)
    trainer.train()
    return trainer, graphs.seen


def compiled(folder, monkeypatch, regional, **settings):
    monkeypatch.setenv(REGIONAL, str(regional).lower())
    return run(folder, torch_compile=True, torch_compile_backend="eager", **settings)


def test_at_a_switch_only_blocks_in_forms_that_are_new_are_compiled(tmp_path, monkeypatch):
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    expected, _ = run(tmp_path / "eager")
    trainer, seen = compiled(tmp_path / "regional", monkeypatch, True)
    new = [after - before for before, after in zip(seen[::2], seen[2::2], strict=False)]
    assert seen[::2] == seen[1::2]  # nothing in the second step of a phase
    # First the dense block's graph; then that of a frozen block: all others are met again.
    assert new == [1, 1, 0, 0]
    assert limits == (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)
    for (name, p), q in zip(trainer.model.state_dict().items(), expected.model.state_dict().values(), strict=True):
        assert torch.allclose(p, q, atol=1e-5), name


def test_a_whole_model_is_compiled_anew_and_the_log_says_what_compiles_less(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="hf_drt"):
        _, seen = compiled(tmp_path, monkeypatch, False)
    assert seen == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    hints = [text for text in caplog.messages if "torch_compile compiles the whole model at each of 4 switches" in text]
    assert len(hints) == 1
    assert f"{REGIONAL}=true" in hints[0]


def test_no_switch_meets_the_limit_on_recompilations(tmp_path, monkeypatch):
    """A launcher that compiles counts as the training arguments do; a limit of one would be met at the first switch."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv(REGIONAL, "true")
    _, seen = run(tmp_path)
    assert seen[-1] > seen[0] > 0
    assert torch._dynamo.config.recompile_limit == 2
