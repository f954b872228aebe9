"""Layers whose weight the model itself changes in place stay dense."""

import torch
import transformers as T

from hf_drt import DRTConfig, DynamicRank, find_targets


def rwkv() -> T.RwkvModel:
    torch.manual_seed(0)
    return T.RwkvModel(
        T.RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, rescale_every=1)
    )


def test_rwkv_rescales_two_layers_of_each_block_which_stay_dense():
    selection = find_targets(rwkv())
    written = {name for name, reason in selection.skipped.items() if reason == "weight written by the model"}
    assert written == {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("attention.output", "feed_forward.value")}
    assert "blocks.0.attention.key" in selection.targets


def test_rwkv_computes_in_factors_what_it_computes_densely():
    model = rwkv().eval()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@1", rank_multiple=1), max_steps=2)
    drt.apply(0)
    ids = torch.arange(1, 9)[None]
    low = model(ids, use_cache=False).last_hidden_state
    drt.apply(1)
    torch.testing.assert_close(model(ids, use_cache=False).last_hidden_state, low, rtol=1e-4, atol=1e-5)


def test_initialising_a_weight_is_not_writing_it():
    model = T.GPT2Model(T.GPT2Config(n_embd=32, n_head=2, n_layer=1))
    assert "weight written by the model" not in find_targets(model).skipped.values()
