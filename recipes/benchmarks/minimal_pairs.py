"""Pairs of sentences that differ in one word, of which one is right: a test of grammar for language models.

The rule is one of number: ``was`` is exchanged for ``were``, ``is`` for ``are``, ``has`` for ``have``, and the other
way round, in sentences of held-out text that hold one of these words, once. Both directions are equally frequent, so
that a model which knows no more than how frequent a word is has half of them right.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

NUMBER = {"was": "were", "is": "are", "has": "have"}
SHORTEST, LONGEST = 5, 25  # words of a sentence

Pair = tuple[str, str]


def minimal_pairs(texts: Iterable[str], limit: int) -> list[Pair]:
    """(right sentence, wrong sentence) of texts whose words and full stops stand apart, at most ``limit`` in each
    direction of each exchange, and equally many in both."""
    partner = NUMBER | {plural: singular for singular, plural in NUMBER.items()}
    found: dict[str, list[Pair]] = {word: [] for word in partner}
    for text in texts:
        for words in _sentences(text):
            present = [i for i, word in enumerate(words) if word in partner]
            if len(present) == 1:
                wrong = list(words)
                wrong[present[0]] = partner[words[present[0]]]
                found[words[present[0]]].append((" ".join(words), " ".join(wrong)))
    pairs = []
    for singular, plural in NUMBER.items():
        count = min(limit, len(found[singular]), len(found[plural]))
        pairs += found[singular][:count] + found[plural][:count]
    return pairs


def _sentences(text: str) -> Iterator[list[str]]:
    for sentence in text.split(" . "):
        words = sentence.split()
        if SHORTEST <= len(words) <= LONGEST:
            yield words


@torch.no_grad()
def share_right(model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: list[Pair], batch: int = 64) -> float:
    """Share of the pairs of whose sentences the model gives the right one the higher probability."""
    training = model.training
    model.eval()
    texts = [f"{tokenizer.eos_token}{sentence} ." for pair in pairs for sentence in pair]
    scores = torch.cat([_log_likelihood(model, tokenizer, texts[i : i + batch]) for i in range(0, len(texts), batch)])
    model.train(training)
    return float((scores[0::2] > scores[1::2]).float().mean())


def _log_likelihood(model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """Of each text but its first token; padding stands at the end, where a causal model does not see it."""
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    known = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(input_ids=ids).logits[:, :-1].float()
    each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (each * known[:, 1:]).sum(-1)
