"""drt_dense_accumulation: the gradient of a whole batch by passes of its pieces, in dense phases alone."""

import pytest
import tiny
import torch
import transformers as T
from datasets import Dataset
from transformers import TrainerCallback

from hf_drt import DRTTrainer, DRTTrainerMixin

ROTATION = "factored@0 dense[1/2]@2 dense[2/2]+frozen[1/2]@4 frozen@6"


class Gradients(TrainerCallback):
    """By update step: the gradients, and how many samples each forward pass had."""

    def __init__(self):
        self.gradients, self.rows, self._now = {}, {}, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def count(module, positional, keywords):
            if module.training:
                self._now.append(len(keywords.get("labels", keywords.get("pixel_values", keywords.get("input_ids")))))

        self._hook = model.register_forward_pre_hook(count, with_kwargs=True)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients[state.global_step], self.rows[state.global_step], self._now = found, self._now, []

    def on_train_end(self, *args, **kwargs):
        self._hook.remove()


def padded(rows=64, classes=tiny.VOCAB):
    """Sequences of which other shares are labelled, some not at all; a sample of one label beside one of seven."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, tiny.VOCAB, (rows, tiny.LENGTH), generator=generator)
    labels = ids.clone() % classes
    for row, length in enumerate(torch.randint(0, tiny.LENGTH, (rows,), generator=generator).tolist()):
        labels[row, length:] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def run(folder, pieces, model=None, data=None, cls=DRTTrainer, options=None, scaler=False, **settings):
    settings = {
        "max_steps": 3, "warmup_steps": 0, "drt_schedule": "factored@0 dense@1", "per_device_train_batch_size": 8,
        "optim": "sgd", "learning_rate": 1e-6, "max_grad_norm": 0, "drt_dense_accumulation": pieces, **settings,
    }  # fmt: skip
    model = model if model is not None else tiny.llama()
    data = data if data is not None else padded()
    args = tiny.arguments(folder, **settings)
    trainer = cls(model=model, args=args, train_dataset=data, **(options or {}))
    if scaler:  # as accelerate has it for fp16 on a GPU
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    return trainer, gradients


def assert_same_gradients(ours, theirs, atol=2e-6):
    assert ours.gradients.keys() == theirs.gradients.keys()
    for step, expected in theirs.gradients.items():
        assert ours.gradients[step].keys() == expected.keys()
        for name, gradient in expected.items():
            scale = max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(ours.gradients[step][name], gradient, rtol=1e-4, atol=atol * scale)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def plain_mean(model):
    """A model that takes no num_items_in_batch: its loss is a mean over the labels of what it is called with."""
    model.accepts_loss_kwargs = False
    return model


@pytest.mark.parametrize("pieces", [2, 3, 8])
@pytest.mark.parametrize("kind", ["a sum", "a mean"])
def test_gradients_of_padded_labels_are_those_of_the_whole_batch(tmp_path, kind, pieces):
    make = (lambda: plain_mean(tiny.llama())) if kind == "a mean" else tiny.llama
    ours, divided = run(tmp_path / "a", pieces, make(), logging_steps=1)
    theirs, whole = run(tmp_path / "b", 1, make(), logging_steps=1)
    assert_same_gradients(divided, whole)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    assert ours._drt_pieces._kind == ("sum" if kind == "a sum" else "shifted labels")


def test_gradients_are_those_of_autograd_by_hand(tmp_path):
    """The mean over the counted labels of two batches, by one backward pass of plain torch."""
    _, found = run(tmp_path, 4, drt_schedule="dense@0", max_steps=1, gradient_accumulation_steps=2,
                         data=(data := padded(16)))  # fmt: skip
    model, batch = tiny.llama(), data.with_format("torch")[:]
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.gradients[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert found.rows[0] == [2] * 8


def test_only_dense_phases_are_divided(tmp_path):
    _, found = run(tmp_path, 3, drt_schedule=ROTATION, max_steps=8, gradient_accumulation_steps=2)
    whole, pieces = [8, 8], [3, 3, 2] * 2
    assert [found.rows[step] for step in range(8)] == [whole] * 2 + [pieces] * 4 + [whole] * 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "expected"), [("bert", "labels"), ("t5", "labels"), ("vit", "labels"), ("gpt2", "shifted labels")]
)
@pytest.mark.parametrize("accepts", [True, False])
def test_other_models_have_the_gradient_of_the_whole_batch(tmp_path, kind, expected, accepts):
    def make():
        model = tiny.MODELS[kind]()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            if hasattr(part, "dropout") and isinstance(part.dropout, float):
                part.dropout = 0.0
        return model if accepts else plain_mean(model)

    data = tiny.dataset(kind) if kind == "vit" else padded()
    ours, divided = run(tmp_path / "a", 3, make(), data)
    _, whole = run(tmp_path / "b", 1, make(), data)
    assert_same_gradients(divided, whole, atol=1e-5)
    assert ours._drt_pieces._kind in ({"sum", expected} if accepts else {expected})


def test_a_regression_whose_loss_is_a_mean_whatever_it_is_passed(tmp_path):
    """BertForSequenceClassification takes num_items_in_batch, and its regression does nothing with it."""
    config = T.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = padded().to_dict()
    labels = torch.randn(64, generator=torch.Generator().manual_seed(1)).tolist()
    data = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})

    def make():
        torch.manual_seed(0)
        return T.BertForSequenceClassification(config)

    ours, divided = run(tmp_path / "a", 3, make(), data)
    _, whole = run(tmp_path / "b", 1, make(), data)
    assert ours._drt_pieces._kind == "samples"
    assert_same_gradients(divided, whole)


@pytest.mark.parametrize("kind", ["a sum", "a mean"])
def test_with_a_gradient_scaler(tmp_path, kind):
    make = (lambda: plain_mean(tiny.llama())) if kind == "a mean" else tiny.llama
    ours, divided = run(tmp_path / "a", 3, make(), scaler=True)
    _, whole = run(tmp_path / "b", 1, make(), scaler=True)
    assert max(g.abs().max() for g in divided.gradients[1].values()) > 10  # scaled, as the optimizer gets them
    assert_same_gradients(divided, whole)
    assert ours.accelerator.scaler.get_scale() == 1024


def test_label_smoothing(tmp_path):
    _, divided = run(tmp_path / "a", 3, label_smoothing_factor=0.1)
    _, whole = run(tmp_path / "b", 1, label_smoothing_factor=0.1)
    assert_same_gradients(divided, whole)


@pytest.mark.parametrize("uses", [True, False])
def test_a_loss_function_of_the_users(tmp_path, uses):
    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"].flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / (num_items_in_batch if uses else labels.ne(-100).sum())

    ours, divided = run(tmp_path / "a", 3, options={"compute_loss_func": loss})
    _, whole = run(tmp_path / "b", 1, options={"compute_loss_func": loss})
    assert ours._drt_pieces._kind == ("sum" if uses else "labels")
    assert_same_gradients(divided, whole)


@pytest.mark.parametrize("kept", [0, 1], ids=["none that is counted", "one"])
def test_first_samples_with_next_to_no_labels(tmp_path, kept):
    """Of a causal model the first label of a sequence is not counted."""
    rows = padded().to_dict()
    rows["labels"] = [
        [row[0], *[-100] * (tiny.LENGTH - 1)] if kept else [-100] * tiny.LENGTH for row in rows["labels"][:4]
    ] + rows["labels"][4:]
    data = Dataset.from_dict(rows)
    settings = {"drt_schedule": "dense@0", "train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}
    ours, divided = run(tmp_path / "a", 2, data=data, **settings)
    _, whole = run(tmp_path / "b", 1, data=data, **settings)
    assert ours._drt_pieces._kind == "sum"
    assert_same_gradients(divided, whole)


def test_a_batch_of_fewer_samples_than_pieces(tmp_path):
    """The last batch of an epoch has one sample."""
    settings = {"drt_schedule": "dense@0", "max_steps": 3, "gradient_accumulation_steps": 1}
    _, divided = run(tmp_path / "a", 4, data=padded(9), **settings)
    _, whole = run(tmp_path / "b", 1, data=padded(9), **settings)
    assert divided.rows == {0: [2, 2, 2, 2], 1: [1], 2: [2, 2, 2, 2]}
    assert_same_gradients(divided, whole)


def test_pieces_without_a_counted_label_are_passed_over(tmp_path):
    """Whose mean is not a number."""
    rows = padded(16).to_dict()
    rows["labels"][8:12] = [[-100] * tiny.LENGTH] * 4
    data = Dataset.from_dict(rows)
    settings = {
        "drt_schedule": "dense@0",
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    _, divided = run(tmp_path / "a", 2, plain_mean(tiny.llama()), data, **settings)
    _, whole = run(tmp_path / "b", 1, plain_mean(tiny.llama()), data, **settings)
    assert divided.rows[1] == [4]
    assert_same_gradients(divided, whole)


def test_phases_that_are_not_divided_have_the_bits_that_they_have_without(tmp_path):
    """With dropout: the first batch is looked at on the side, and moves no random generator."""
    runs = [run(tmp_path / str(n), n, tiny.llama(attention_dropout=0.1), drt_schedule="factored@0 dense@2")
            for n in (1, 4)]  # fmt: skip
    (_, one), (_, other) = runs
    for step in (0, 1):
        assert all(torch.equal(one.gradients[step][name], g) for name, g in other.gradients[step].items())


@pytest.mark.parametrize("extra", ["text", "number", "list", "scalar"])
def test_entries_that_are_not_by_sample_stand_in_every_piece(tmp_path, extra):
    values = {"text": "x", "number": 3, "list": list("abcdefgh"), "scalar": torch.tensor(2)}

    def collate(rows):
        batch = T.default_data_collator(rows)
        return {**batch, "extra": values[extra], "position_ids": torch.arange(tiny.LENGTH)[None]}

    class Model(T.LlamaForCausalLM):
        def forward(self, *args, extra=None, **kwargs):
            seen.append(extra)
            return super().forward(*args, **kwargs)

    seen = []
    torch.manual_seed(0)
    model = Model(tiny.llama().config)
    settings = {"drt_schedule": "dense@0", "max_steps": 1, "gradient_accumulation_steps": 1}
    _, divided = run(tmp_path, 4, model, options={"data_collator": collate}, remove_unused_columns=False, **settings)
    assert divided.rows[0] == [2] * 4
    last = seen[-4:]
    assert last == ([["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]] if extra == "list" else [values[extra]] * 4)


# ---- refused


def refused(folder, message, pieces=2, **changes):
    with pytest.raises(ValueError, match=message):
        run(folder, pieces, **changes)


def test_more_pieces_than_samples(tmp_path):
    refused(tmp_path, r"dense_accumulation=16 divides a batch into more pieces than it has samples: it has 8\.", 16)


def test_a_loss_with_negatives_from_the_whole_batch(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        pooled = outputs["logits"].mean(1)
        return torch.nn.functional.cross_entropy(20 * pooled @ pooled.T, torch.arange(len(pooled)))

    message = r"is neither the sum of their own losses nor a mean of them.*Leave dense_accumulation out, or take a smal"
    refused(tmp_path, message, options={"compute_loss_func": loss})


class Own(DRTTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


class OwnStep(
    DRTTrainerMixin, type("Base", (T.Trainer,), {"training_step": lambda self, *a: T.Trainer.training_step(self, *a)})
):
    pass


@pytest.mark.parametrize(("cls", "method"), [(Own, r"compute_loss of .*\.Own"), (OwnStep, r"training_step of .*Base")])
def test_a_trainer_with_a_step_or_loss_of_its_own(tmp_path, cls, method):
    refused(tmp_path, rf"does not go with the {method}, of which it is not known that its loss", cls=cls)


def test_batch_normalisation(tmp_path):
    refused(tmp_path, r"batch normalisation, whose statistics", model=tiny.resnet(), data=tiny.dataset("resnet"))


def test_a_loss_that_balances_experts(tmp_path):
    refused(tmp_path, r"balances experts, which is one of all", model=tiny.mixtral(output_router_logits=True))


def test_an_optimizer_that_steps_within_the_backward_pass(tmp_path):
    pytest.importorskip("lomo_optim")
    refused(tmp_path, r"LOMO, which updates weights in the backward pass", optim="lomo")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: {**batch, "extra": torch.zeros(5, 2)}, r"its 'extra' has 5 rows, and there are 8 samples by"),
        (lambda batch: {"input_ids": batch["input_ids"]}, r"divides batches that have 'labels', .* holds input_ids\."),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused_in_the_first_step(tmp_path, change, message):
    options = {"data_collator": lambda rows: change(T.default_data_collator(rows))}
    refused(tmp_path, message, options=options, remove_unused_columns=False, drt_schedule="factored@0 dense@2")
