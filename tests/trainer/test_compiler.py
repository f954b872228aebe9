"""What the compiler keeps over a switch: of blocks compiled one by one all graphs, of a whole model none."""

import contextlib
import logging

import pytest
import tiny
import torch
from accelerate.utils import TorchDynamoPlugin
from accelerate.utils.other import compile_regions
from torch import nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_drt import DRTCallback, DRTConfig
from hf_drt.trainer import compiler

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


@pytest.fixture
def _strict():
    # Not by monkeypatch, after which torch says that there is no such setting.
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield


@pytest.mark.usefixtures("_strict")
def test_no_switch_meets_the_limit_on_recompilations(tmp_path, monkeypatch):
    """A launcher that compiles counts as the training arguments do; a limit of one would be met at the first switch."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv(REGIONAL, "true")
    trainer, seen = run(tmp_path)
    assert seen[-1] > seen[0] > 0
    assert torch._dynamo.config.recompile_limit == 2
    trainer.evaluate()


def plain(folder, monkeypatch, regional, **settings):
    """A plain Trainer that a callback drives."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    monkeypatch.setenv(REGIONAL, str(regional).lower())
    args = TrainingArguments(str(folder), max_steps=10, use_cpu=True, report_to=[], save_strategy="no")
    config = DRTConfig(**{"schedule": TURNS, "rank_multiple": 4} | settings)
    graphs, model = Graphs(), tiny.llama(num_hidden_layers=4)
    callbacks = [DRTCallback(config), graphs]
    return Trainer(model, args, train_dataset=tiny.dataset(), callbacks=callbacks), graphs.seen


@pytest.mark.usefixtures("_strict")
@pytest.mark.parametrize("regional", [False, True])
def test_under_a_callback_no_switch_meets_the_limit_either(tmp_path, monkeypatch, regional):
    trainer, seen = plain(tmp_path, monkeypatch, regional)
    trainer.train()
    assert len(set(seen)) > 2
    assert torch._dynamo.config.recompile_limit == 2


OUTSIDE = rf"up_proj is in none of the blocks that .* \(drt_exclude\), or .* whole: unset {REGIONAL}\."


def test_a_layer_outside_of_the_blocks_is_refused_where_they_are_compiled_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "_is_region", lambda model, name: name.endswith("up_proj"))
    with pytest.raises(ValueError, match=OUTSIDE):
        compiled(tmp_path, monkeypatch, True)
    with pytest.raises(ValueError, match=OUTSIDE):
        plain(tmp_path, monkeypatch, True)
    plain(tmp_path, monkeypatch, True, include=["down_proj"])
    plain(tmp_path, monkeypatch, False)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))])
        self.head = nn.Sequential(nn.Linear(8, 8))
        self.last = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("name", "refused"),
    [("layers.1", True), ("blocks.1.0", False), ("head.0", False), ("last", True)],
)
def test_what_accelerate_compiles_by_itself_is_what_is_refused(monkeypatch, name, refused):
    model = Bare()
    found = compile_regions(model, backend="eager").get_submodule(name.partition(".")[0])
    wrapped = [m for m in found.modules() if isinstance(m, torch._dynamo.eval_frame.OptimizedModule)]
    assert (model.get_submodule(name) in [m._orig_mod for m in wrapped]) is refused
    monkeypatch.setattr(compiler, "compiler", lambda: TorchDynamoPlugin("eager", use_regional_compilation=True))
    with pytest.raises(ValueError, match="is in none of the blocks") if refused else contextlib.nullcontext():
        compiler.refuse_regions(model, [name])
