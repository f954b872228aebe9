"""NativeExporter: the model in the form of its phase."""

import json
from pathlib import Path

from torch import nn
from transformers.utils import CONFIG_NAME

from hf_drt.checkpoint import METHOD, CheckpointError
from hf_drt.export.exporter import Exporter, Saving, State
from hf_drt.export.merge import low_rank_layers, marked_state_dict
from hf_drt.export.written import Written
from hf_drt.registry import EXPORTERS


class NativeExporter(Exporter):
    """The tensors of every form as they are; ``config.json`` declares the low-rank layers."""

    help = "in the form of its phase, loads after 'import hf_drt'"
    loading = (
        "The weights are in low-rank form. `pip install hf_drt`, and `import hf_drt` before `from_pretrained`; "
        "everything else is as usual. Without it transformers says 'Unknown quantization type, got hf_drt' and stops "
        "at a size mismatch."
    )
    code = "import hf_drt\n" + Exporter.code

    def write(self, saving: Saving) -> None:
        state = saving.state
        saving.save(str(saving.folder), self.converted(saving.model, state) if state else state)

    def converted(self, model: nn.Module, state: State) -> State:
        return marked_state_dict(model, state)

    def verify(self, written: Written, model: nn.Module) -> None:
        """The low-rank tensors of all layers are there, and a ``config.json`` that declares them."""
        names = [f"{name}.{tensor}" for name, layer in low_rank_layers(model) for tensor in layer.tensors]
        lost = [name for name in names if not written.find(name)]
        if not lost and any(_declares(folder / CONFIG_NAME) for folder in written.folders):
            return
        what = f"lacks {lost[0]}" if lost else f"has no {CONFIG_NAME} that declares the low-rank layers"
        raise CheckpointError(
            f"{written.folder} should hold a native model, but {what}: nothing could load it. The trainer writes its "
            "models in a way of its own; use export=dense."
        )


def _declares(path: Path) -> bool:
    try:
        return json.loads(path.read_text())["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError):
        return False


EXPORTERS.add("native", NativeExporter())
