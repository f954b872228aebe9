"""Ideas that the benchmarks try beside the package."""

from itertools import pairwise

import experiment
import extras
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback

from hf_drt import find_targets


def settings(**training: object) -> dict:
    pair = {"drt_schedule": "factored@0", "drt_matrix_optimizer": "muon", "drt_matrix_lr": 0.02, "drt_rank": 8}
    return {"max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 0, **pair, **training}


def test_a_guide_fades_from_the_dense_layer_to_the_factors(tmp_path):
    model = tiny.llama()
    names = list(find_targets(model).targets)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    guide = extras.Guide(model, names, share=0.5, rate=0.02)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            layer = model.get_submodule(names[0])
            x = torch.randn(3, layer.V.shape[1])
            low = F.linear(F.linear(x, layer.V), layer.U)
            full = F.linear(x, guide.weights[names[0]])
            alpha = (1.0, 0.5, 0.0, 0.0)[state.global_step]
            torch.testing.assert_close(layer(x), low + alpha * (full - low))
            seen.append({name: weight.detach().clone() for name, weight in guide.weights.items()})

    trainer = tiny.trainer(tmp_path, model, **settings())
    trainer.add_callback(guide)
    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 4
    assert all(torch.equal(seen[0][name], dense[name]) for name in names)
    moved = [not torch.equal(before[names[0]], after[names[0]]) for before, after in pairwise(seen)]
    assert moved == [True, True, False]  # for as long as they guide


def test_ranks_follow_the_spectrum_and_keep_the_cost():
    torch.manual_seed(0)
    flat, steep = torch.randn(64, 64), torch.randn(64, 2) @ torch.randn(2, 64)
    ranks = extras.ranks_under_budget({"a.flat": flat, "a.steep": steep}, ratio=0.25)
    assert ranks == {r"^a[.]flat$": 24, r"^a[.]steep$": 8}
    assert sum(ranks.values()) == 2 * 16


@pytest.mark.parametrize("of", ["change", "gradient"])
def test_a_profile_gives_every_layer_a_rank(tmp_path, of):
    model = tiny.llama()
    names = list(find_targets(model).targets)
    data = {"train_dataset": tiny.dataset()}
    own = settings(drt_rank_ratio=0.5, drt_rank_multiple=4, output_dir=str(tmp_path), report_to="none", use_cpu=True)
    del own["drt_rank"]
    ranks = extras.profiled_ranks(model, names, data, own, 0.02, {"steps": 2, "of": of})
    shapes = {name: tiny.llama().get_submodule(name).weight.shape for name in names}
    assert len(ranks) == len(names)
    cost = sum(rank * sum(shape) for rank, shape in zip(ranks.values(), shapes.values(), strict=True))
    assert cost <= sum(round(0.5 * min(shape)) * sum(shape) for shape in shapes.values())
    assert all(isinstance(module, nn.Linear) for module in map(model.get_submodule, names))


def test_settings_without_extras_are_as_before():
    made = experiment.Settings("t", "k", {}, {}, {}, None, 1, {})
    assert made.extras == {}
