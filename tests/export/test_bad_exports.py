"""A form that nothing could load is refused before the run."""

import pytest
import tiny
from torch import nn

from hf_drt import DRTTrainer


class Tower(nn.Module):
    """A module of one's own, with transformer blocks and a loss, but without a configuration."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(tiny.VOCAB, 32)
        layer = nn.ModuleDict
        self.layers = nn.ModuleList(layer({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)}) for _ in range(2))

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.layers:
            x = x + block["down"](block["up"](x).relu())
        logits = x @ self.embed.weight.T
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class Container(nn.Module):
    """A module around a model of transformers."""

    def __init__(self):
        super().__init__()
        self.inner = tiny.llama()

    def forward(self, input_ids, labels=None):
        return self.inner(input_ids, labels=labels)


def trainer(folder, model, **changes):
    arguments = tiny.arguments(folder, drt_schedule="factored@0 adapter@50%", drt_rank=4, max_steps=2, **changes)
    return DRTTrainer(model, arguments, train_dataset=tiny.dataset())


@pytest.mark.parametrize("export", ["native", "adapter"])
def test_a_module_without_a_configuration_has_dense_exports_alone(tmp_path, export):
    model = Tower()
    message = rf"export={export} is declared in the configuration of .* none in this Tower: nothing .*Use export=dense"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, drt_export=export)
    trainer(tmp_path, model)


def test_a_container_of_a_model_with_a_configuration_is_not_refused(tmp_path):
    trainer(tmp_path, Container(), drt_export="native")
