"""The probe: every kind of output has a function error, or a reason why not; and measuring changes nothing."""

import contextlib
import dataclasses
import importlib
import logging
import random
import typing
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers as T
from torch import nn
from transformers.utils import ModelOutput

from hf_drt import DRTConfig, DRTTrainer, DRTTrainerMixin, DynamicRank
from hf_drt.trainer.meter import PhaseMeter
from hf_drt.trainer.probe import main_output
from hf_drt.transition.function_error import FunctionError, largest_difference

SHORT = {"drt_schedule": "factored@0 dense@2 adapter@4", "max_steps": 6, "gradient_accumulation_steps": 1}


def errors_of(trainer) -> list[float | None]:
    """The function error of every switch in mid-run."""
    rows = [row for row in trainer.state.log_history if "drt_switch_seconds" in row]
    return [row.get("drt_function_error") for row in rows[1:]]


# ---- every output class of transformers that has a loss


def output_classes() -> list[type]:
    root = Path(T.__file__).parent
    for path in sorted(root.rglob("modeling_*.py")):
        with contextlib.suppress(ImportError):  # a few need packages of their own
            importlib.import_module(".".join(("transformers", *path.relative_to(root).with_suffix("").parts)))
    found, todo = [], [ModelOutput]
    while todo:
        todo += (cls := todo.pop()).__subclasses__()
        if cls.__module__.startswith("transformers.") and dataclasses.is_dataclass(cls):
            found += [cls] if "loss" in {field.name for field in dataclasses.fields(cls)} else []
    return sorted(set(found), key=lambda cls: (cls.__module__, cls.__name__))


class Odd:
    """What no probe may look into."""


def plausible(name: str, kind: typing.Any, x: torch.Tensor) -> typing.Any:
    """A value of a field: floating-point tensors are ``x``, losses scalars, caches such that to compare them shows."""
    text = str(kind)
    if "loss" in name:
        return {"loss_ce": 1e3 * x.mean()} if "dict" in text else 1e3 * x.mean()
    if name in ("past_key_values", "mems") or "cache" in text.lower() or "KVSharing" in text:
        cache = T.DynamicCache()
        cache.update(1e3 * x[None], 1e3 * x[None], 0)
        return cache if "Cache" in text or "cache" in name else ((1e3 * x, 1e3 * x),)
    if "list[dict" in text:
        return [{"masks": x.argmax(-1), "scores": x}]
    if "dict" in text:
        return {"ids": x.argmax(-1), "scores": x}
    if any(word in text for word in ("LongTensor", "IntTensor", "BoolTensor")):
        return x.argmax(-1)
    if "tuple[tuple" in text or "list[tuple" in text:
        return ((x, x), (x, x))
    if "tuple" in text or "list" in text:
        return (x, x)
    if "Tensor" in text:
        return x
    if "modeling_outputs." in text or "Output" in text:
        return T.modeling_outputs.BaseModelOutput(last_hidden_state=x)
    return Odd()


class Answers(nn.Module):
    """A Llama whose answer is of another output class at every update."""

    def __init__(self, classes):
        super().__init__()
        self.llama, self.classes, self.at = tiny.llama(num_hidden_layers=1), classes, 0

    def forward(self, input_ids, labels=None):
        outputs = self.llama(input_ids=input_ids, labels=labels)
        cls = self.classes[self.at % len(self.classes)]
        if cls is None:
            return {"loss": outputs.loss, "logits": outputs.logits}
        values = {f.name: plausible(f.name, f.type, outputs.logits) for f in dataclasses.fields(cls)}
        return cls(**{**values, "loss": outputs.loss})


class Turn(T.TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        model.at = state.global_step


def answered(folder, classes, steps):
    kinds = [f"{kind}@{step}" for step, kind in zip(range(steps), ["factored", "dense"] * steps, strict=False)]
    data = tiny.dataset(rows=16)
    args = tiny.arguments(
        folder, max_steps=steps, gradient_accumulation_steps=1, drt_schedule=" ".join(kinds), max_grad_norm=0.1
    )
    trainer = DRTTrainer(model=Answers(classes), args=args, train_dataset=data, callbacks=[Turn()])
    trainer.train()
    assert trainer.state.global_step == steps
    return errors_of(trainer)


@pytest.mark.slow
def test_no_output_class_of_transformers_with_a_loss_stops_a_run(tmp_path):
    """Every update switches, and answers with the next class; the errors are those of the logits that all hold."""
    classes = output_classes()
    assert len(classes) > 250
    errors = answered(tmp_path / "a", classes, len(classes) + 1)
    expected = answered(tmp_path / "b", [None], len(classes) + 1)
    assert all(error > 0 for error in expected[1::2]), "a truncation moves the function"
    wrong = [
        (cls.__name__, error, usual)
        for cls, error, usual in zip(classes[1:] + classes[:1], errors, expected, strict=True)
        if error != usual
    ]
    assert wrong == []


# ---- whole cycles


class Watched(DRTTrainer):
    """Measures the largest difference of ``start_logits`` in its own way."""

    def outputs(self):
        self.model.eval()
        with torch.no_grad():
            outputs = self.model(**{key: value[:1] for key, value in self._drt_loop.probe.batch.items()})
        self.model.train()
        return outputs.start_logits

    @contextlib.contextmanager
    def _drt_around_switch(self):
        if self._drt_loop.probe.batch is None:
            with super()._drt_around_switch():
                yield
            return
        before = self.outputs()
        with super()._drt_around_switch():
            yield
        self.own = [*getattr(self, "own", []), (self.outputs() - before).abs().max().item()]


def test_a_question_answering_model(tmp_path):
    config = T.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    torch.manual_seed(0)
    model = T.BertForQuestionAnswering(config)
    rows = tiny.dataset().remove_columns("labels")
    data = rows.add_column("start_positions", [1] * len(rows)).add_column("end_positions", [5] * len(rows))
    schedule = {**SHORT, "drt_schedule": "factored@0 dense@2 adapter@4 factored@5", "drt_export": "native"}
    trainer = Watched(model=model, args=tiny.arguments(tmp_path, **schedule), train_dataset=data)
    trainer.train()
    assert errors_of(trainer) == pytest.approx(trainer.own, rel=1e-4, abs=1e-6)
    assert trainer.own[-1] > 1e-4, "otherwise this test could not fail"


class Own(nn.Module):
    """Answers in its own way."""

    def __init__(self, answer):
        super().__init__()
        self.llama, self.answer = tiny.llama(), answer

    def forward(self, input_ids, labels=None):
        outputs = self.llama(input_ids=input_ids, labels=labels)
        return self.answer(outputs.loss, outputs.logits)


ANSWERS = {
    "a loss alone": (lambda loss, x: {"loss": loss}, "a dict holds no floating-point tensor of one dimension or more"),
    "losses of every sample": (lambda loss, x: {"loss": loss, "sample_loss": x[:, 0, 0]}, "a dict holds no floating"),
    "a tuple": (lambda loss, x: (loss, x), None),
    "nested": (lambda loss, x: {"loss": loss, "parts": [{"ids": x.argmax(-1)}, (x.argmax(-1), x)]}, None),
    "complex": (lambda loss, x: {"loss": loss, "spectrum": torch.fft.rfft(x)}, None),
    "half": (lambda loss, x: {"loss": loss, "x": x.bfloat16()}, None),
    "an empty batch": (lambda loss, x: {"loss": loss, "x": x[:0]}, "a dict holds no floating-point tensor"),
    "sparse": (lambda loss, x: {"loss": loss, "x": x.to_sparse()}, None),
    "infinite": (lambda loss, x: {"loss": loss, "x": x.masked_fill(x.new_ones(x.shape).tril() == 0, -torch.inf)}, None),
    "not a number": (lambda loss, x: {"loss": loss, "x": x * torch.nan}, "the output has no finite number"),
    "on no device": (lambda loss, x: {"loss": loss, "x": x.to("meta")}, "with Meta tensors"),
}  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("answer", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_an_own_module(answer, reason, tmp_path, caplog):
    args = tiny.arguments(tmp_path, **SHORT)
    trainer = DRTTrainer(model=Own(answer), args=args, train_dataset=tiny.dataset())
    trainer.train()
    assert trainer.state.global_step == 6
    if reason is None:
        assert all(0 <= error < 1e-2 for error in errors_of(trainer))
        assert "function-preservation" not in caplog.text
    else:
        assert errors_of(trainer) == [None, None]
        assert "no function-preservation error: " in caplog.text
        assert reason in caplog.text


class Unnamed(T.Trainer):
    """Batches without names. The base counts the labels in each, but no tensor can say whether it has any."""

    def floating_point_ops(self, inputs):
        return 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x, y = (inputs, inputs) if torch.is_tensor(inputs) else inputs
        return nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y.flatten())


class Pairs(DRTTrainerMixin, Unnamed):
    pass


class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.llama = tiny.llama()

    def forward(self, ids):
        return self.llama(input_ids=ids)


COLLATORS = {
    "tuples": lambda rows: (torch.tensor([r["input_ids"] for r in rows]), torch.tensor([r["labels"] for r in rows])),
    "lists": lambda rows: [torch.tensor([r["input_ids"] for r in rows]), torch.tensor([r["labels"] for r in rows])],
    "tensors": lambda rows: torch.tensor([r["input_ids"] for r in rows]),
}


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS)
def test_batches_without_names(collate, tmp_path):
    args = tiny.arguments(tmp_path, remove_unused_columns=False, **SHORT)
    trainer = Pairs(model=Ids(), args=args, train_dataset=tiny.dataset(), data_collator=collate)
    trainer.train()
    assert all(0 <= error < 1e-2 for error in errors_of(trainer))
    assert trainer._drt_driver.meter.samples == 2 * 4  # of the last phase


# ---- measuring changes nothing


class Touchy(nn.Module):
    """Every forward leaves something behind, in whatever mode; eval() and train() do too."""

    def __init__(self):
        super().__init__()
        self.llama = tiny.llama()
        self.register_buffer("mean", torch.zeros(tiny.VOCAB))
        self.calls, self.history, self.cache, self.seen = 0, [], {}, set()
        self.plain = torch.zeros(())
        self.torch, self.numpy = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.legacy, self.python = np.random.RandomState(0), random.Random(0)

    def train(self, mode=True):
        if not mode:
            self.llama.lm_head.weight.data.mul_(1.01)
        return super().train(mode)

    def forward(self, input_ids, labels=None):
        input_ids[:, 0] = (input_ids[:, 0] + 1) % tiny.VOCAB  # the batch's own tensor
        self.calls += 1
        self.plain += 1
        self.history.append(self.calls)
        self.cache[self.calls], self.lazy = self.calls, self.calls
        self.seen.add(self.calls)
        noise = [random.random(), np.random.rand(), torch.rand(()).item(), torch.rand((), generator=self.torch).item()]
        noise += [self.numpy.random(), self.legacy.rand(), self.python.random(), self.calls / 100]
        outputs = self.llama(input_ids=input_ids, labels=labels)
        logits = outputs.logits + outputs.logits.mean(dim=(0, 1)) * sum(noise)
        self.mean.lerp_(logits.detach().mean(dim=(0, 1)), 0.1)
        loss = nn.functional.cross_entropy((logits + self.mean).flatten(0, 1), input_ids.flatten())
        return {"loss": loss, "logits": logits}


def touched(folder, probe):
    random.seed(0)
    np.random.seed(0)
    trainer = tiny.trainer(folder, Touchy(), **SHORT)
    if not probe:
        trainer._drt_loop.probe = lambda: None
    trainer.train()
    return trainer


def test_the_run_is_bitwise_the_same_with_the_probe_and_without_whatever_a_forward_leaves_behind(tmp_path):
    measured, plain = touched(tmp_path / "a", True), touched(tmp_path / "b", False)
    assert all(error is not None for error in errors_of(measured))
    a, b = measured.model, plain.model
    assert all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())
    assert (a.calls, a.history, a.cache, a.seen, a.lazy, a.plain) == (
        b.calls,
        b.history,
        b.cache,
        b.seen,
        b.lazy,
        b.plain,
    )
    assert a.torch.get_state().equal(b.torch.get_state())
    assert (a.numpy.random(), a.legacy.rand(), a.python.random()) == (
        b.numpy.random(),
        b.legacy.rand(),
        b.python.random(),
    )


class Preparing(DRTTrainer):
    """Makes its inputs anew at every call, as trainers that generate do."""

    prepared = 0

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        return super()._prepare_inputs(inputs)


def test_the_probe_does_not_prepare_inputs_in_the_trainers_own_way(tmp_path):
    trainer = tiny.trainer(tmp_path, cls=Preparing, **SHORT)
    trainer.train()
    assert len(errors_of(trainer)) == 2
    assert trainer.prepared == 6


# ---- the number, and why there is none


def test_the_output_is_the_logits_else_the_first_that_counts():
    x = torch.arange(6.0).view(2, 3)
    assert main_output({"loss": x.sum(), "hidden": x + 1, "logits": x}).equal(x[:1])
    assert main_output((x.sum(), x.long(), (x + 1, x))).equal(x[:1] + 1)
    assert main_output({"past_key_values": (x,), "mems": [x], "kv_states": x, "out": x.double()}).dtype == torch.float64
    assert main_output(x.bfloat16()).dtype == torch.float32

    @dataclasses.dataclass
    class Plain:
        aux_loss: torch.Tensor
        out: torch.Tensor

    assert main_output(Plain(x, x + 2)).equal(x[:1] + 2)
    assert main_output(x[:1]).data_ptr() != x.data_ptr(), "the other rows can be freed"


DIFFERENCES = {
    "shapes": (torch.ones(2), torch.ones(3), r"shape \(3,\) after the switch, and \(2,\) before"),
    "nan": (torch.ones(2), torch.tensor([1.0, torch.nan]), "inf or nan stands at other places"),
    "no number": (torch.full((2,), torch.inf), torch.full((2,), torch.inf), "the output has no finite number"),
    "empty": (torch.ones(0), torch.ones(0), "the output has no finite number"),
}


@pytest.mark.parametrize(("before", "after", "message"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_outputs_that_cannot_be_compared_have_no_error_but_a_reason(before, after, message, caplog):
    with pytest.raises(ValueError, match=message):
        largest_difference(before, after)
    answers = iter([before, after])
    function = FunctionError(lambda: next(answers))
    function.look()
    assert function.measure() is None
    assert "no function-preservation error: ValueError: " in caplog.text


def test_the_difference_is_of_the_finite_entries_in_full_precision():
    inf = torch.inf
    assert largest_difference(torch.tensor([1.0, -inf]), torch.tensor([1.5, -inf])) == 0.5
    assert largest_difference(torch.tensor([3 + 4j]), torch.zeros(1, dtype=torch.cfloat)) == 5
    assert largest_difference(torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1 + 2**-20)) == 2**-20


@pytest.mark.parametrize("fails_at", [0, 1])
def test_a_users_own_probe_that_fails_stops_no_switch(fails_at, caplog):
    caplog.set_level(logging.WARNING)
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0 dense@1", rank=4), max_steps=2)
    drt.apply(0)
    calls = []

    def probe():
        calls.append(len(calls))
        if calls[-1] == fails_at:
            raise KeyError("no such batch")
        return torch.ones(2)

    transition = drt.apply(1, probe=probe)
    assert (transition.kind, transition.function_error, len(calls)) == ("dense", None, fails_at + 1)
    assert "no function-preservation error: KeyError: 'no such batch'" in caplog.text


# ---- what a batch holds


X = torch.ones(4, 3)
BATCHES = {
    "a dict": ({"input_ids": X, "labels": X}, 4, 12),
    "scalars first": ({"step": torch.tensor(3), "scale": 2.0, "input_ids": X}, 4, 12),
    "an encoding": (T.BatchEncoding({"input_ids": X}), 4, 12),
    "lists": ({"input_ids": [[1, 2, 3], [4]], "text": ["a", "b"]}, 2, 4),
    "arrays": ({"input_ids": X.numpy()}, 4, 12),
    "nested": ({"query": {"input_ids": X}, "document": {"input_ids": torch.ones(8, 5)}}, 4, 12),
    "ids of another kind": ({"input_ids": None, "x": X}, 4, 0),
    "a tuple": ((X, torch.ones(4)), 4, 0),
    "a list of columns": ([X, torch.ones(4)], 4, 0),
    "a list of samples": ([{"prompt": "a"}, {"prompt": "b"}], 2, 0),
    "a tensor": (X, 4, 0),
    "a scalar": (torch.tensor(1.0), 0, 0),
    "nothing": ({}, 0, 0),
    "something else": (Odd(), 0, 0),
    "texts": ({"name": "train", "x": X}, 4, 0),
}


@pytest.mark.parametrize(("batch", "samples", "tokens"), BATCHES.values(), ids=BATCHES)
def test_samples_and_tokens(batch, samples, tokens):
    meter = PhaseMeter()
    meter.count([batch, batch], processes=2)
    assert (meter.samples, meter.tokens) == (4 * samples, 4 * tokens)
