"""What the benchmarks' text tasks are judged by beside the loss: pairs of sentences, parts of speech, next tokens."""

import math
from types import SimpleNamespace

import corpora
import minimal_pairs
import numpy as np
import pytest
import tagging_task
import text_tasks
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "The dog was in the house . The dogs were in the house . It is a fine day and it is warm . Yes it is",
    "They are here in the evening . He has seen all of the houses . They have been there for years",
]


@pytest.fixture(scope="module")
def tokenizer():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS * 4, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")


def test_pairs_differ_in_the_number_of_one_verb_as_often_each_way():
    found = minimal_pairs.minimal_pairs(TEXTS, limit=10)
    assert ("The dog was in the house", "The dog were in the house") in found
    assert ("The dogs were in the house", "The dogs was in the house") in found
    assert ("They have been there for years", "They has been there for years") in found
    # "it is ... it is" holds the word twice, "Yes it is" is too short, and "They are here" has nothing the other way.
    assert len(found) == 4
    assert minimal_pairs.minimal_pairs(TEXTS, limit=0) == []


class Counted(nn.Module):
    """A model whose tokens have fixed probabilities, whatever stands before them."""

    def __init__(self, scores: torch.Tensor):
        super().__init__()
        self.scores = scores

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scores.expand(*input_ids.shape, -1))


def test_knowing_how_frequent_a_word_is_gives_half_of_the_pairs(tokenizer):
    pairs = [pair for pair in minimal_pairs.minimal_pairs(TEXTS, 10) if "dog" in pair[0]]
    scores = torch.zeros(len(tokenizer))
    scores[tokenizer(" was")["input_ids"]] = 3.0
    assert minimal_pairs.share_right(Counted(scores), tokenizer, pairs) == 0.5


def test_likelihoods_are_those_of_single_sentences(tokenizer):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                    num_attention_heads=2)
    ).eval()  # fmt: skip
    texts = [f"<|end|>{sentence} ." for sentence in ("The dog was in the house", "They are")]
    together = minimal_pairs._log_likelihood(model, tokenizer, texts)
    for text, found in zip(texts, together.tolist(), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        loss = model(input_ids=ids, labels=ids).loss.item()
        assert found == pytest.approx(-loss * (ids.shape[1] - 1), rel=1e-4)


def test_the_mode_of_the_model_stays(tokenizer):
    model = Counted(torch.zeros(len(tokenizer)))
    minimal_pairs.share_right(model.train(), tokenizer, [("a b", "a c")])
    assert model.training


def test_the_next_token_is_compared_with_what_was_predicted_before_it():
    prediction = SimpleNamespace(predictions=np.array([[5, 6, 7, 9]]), label_ids=np.array([[4, 5, 6, 8]]))
    assert text_tasks.next_token_accuracy(prediction) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("tag", "plain"),
    [("at", "at"), ("np-tl", "np"), ("nn-tl-hl", "nn"), ("fw-in", "in"), ("ppss+bem", "ppss"), ("bez*", "bez"),
     ("*", "*"), (".", "."), ("--", "--")],
)  # fmt: skip
def test_tags_are_parts_of_speech(tag, plain):
    assert tagging_task.plain_tag(tag) == plain


def test_a_word_is_labelled_at_its_first_token(tokenizer):
    document = [("The", "at"), ("houses", "nns"), ("glorbled", "vbd"), ("dog", "nn")]
    tokens = tagging_task.labelled([document], tokenizer, {"at": 0, "nn": 1, "nns": 2})
    samples = tagging_task.samples_of(tokens, size=4)
    ids, labels = (torch.cat([sample[key] for sample in samples]).tolist() for key in ("input_ids", "labels"))
    pieces = [tokenizer(f" {word}")["input_ids"] for word, _ in document]
    whole = [token for piece in pieces for token in piece]
    assert ids == whole[: len(ids)]
    expected = [label for piece, label in zip(pieces, (0, 2, 3, 1), strict=True)
                for label in [label, *[-100] * (len(piece) - 1)]]  # fmt: skip
    assert labels == expected[: len(labels)]
    assert len(ids) == len(whole) // 4 * 4


def test_an_unknown_family_is_named(tmp_path):
    with pytest.raises(ValueError, match="the family of a tagger must be one of bert, modernbert, got 'gpt2'"):
        tagging_task.tagger({"family": "gpt2"}, {}, tmp_path)


def test_words_without_a_label_do_not_count():
    prediction = SimpleNamespace(predictions=np.array([[1, 2, 3]]), label_ids=np.array([[1, -100, 4]]))
    assert tagging_task.word_accuracy(prediction) == {"accuracy": 0.5}


def test_words_and_tags_are_read_from_one_file(tmp_path, monkeypatch):
    texts = ["The/at either/or/cc house/nn ./."] * 500
    monkeypatch.setattr(corpora, "_brown_files", lambda: texts)
    assert corpora.brown_tagged(tmp_path)[0] == [("The", "at"), ("either/or", "cc"), ("house", "nn"), (".", ".")]
    assert corpora.brown_documents(tmp_path)[0] == "The either/or house ."
    monkeypatch.setattr(corpora, "_brown_files", lambda: math.nan)  # kept
    assert len(corpora.brown_tagged(tmp_path)) == 500
