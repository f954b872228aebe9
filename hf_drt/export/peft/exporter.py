"""AdapterExporter: a LoRA checkpoint of PEFT, beside the base that it adds to."""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hf_drt.checkpoint import undeclared
from hf_drt.export.dense import check_no_factors
from hf_drt.export.exporter import Exporter, Saving, State
from hf_drt.export.leftovers import BASE_FOLDER
from hf_drt.export.merge import dense_state_dict, presented
from hf_drt.export.peft.files import CONFIG_NAME, WEIGHTS_NAME
from hf_drt.export.peft.save import base_state_dict, check_adapters, write_adapter
from hf_drt.export.written import Written
from hf_drt.forms import AdapterLinear, LowRankLinear, is_projection, stack_count
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Phase

logger = logging.getLogger(__name__)


class AdapterExporter(Exporter):
    """lora_A and lora_B of every layer in adapter form, and a dense model of all the rest in :data:`BASE_FOLDER`."""

    help = "a PEFT adapter, beside its base model"
    loading = "The weights are a PEFT adapter. It belongs to the base in the folder `base`, and to no other."
    code = """\
from peft import PeftModel
from transformers import {name}

base = {name}.from_pretrained("{repository}", subfolder="base")
model = PeftModel.from_pretrained(base, "{repository}")"""
    library = "peft"
    files = (CONFIG_NAME, WEIGHTS_NAME)
    has_base = True
    by_plain_trainer = False

    def check_phases(self, saved: Sequence[Phase], grows: bool) -> None:
        if grows:
            raise ValueError(
                "export=adapter saves layers in adapter form, but a full-rank window of the preset adaptive may last "
                "to the end of the run. Use export=dense or native, or a schedule that ends in an adapter phase."
            )
        if other := next((phase for phase in saved if phase.kind != "adapter"), None):
            raise ValueError(
                f"export=adapter saves layers in adapter form, but in phase '{other}' they are {other.kind}. End the "
                "schedule with an adapter phase, and push with hub_strategy=end; or use export=dense or native."
            )

    def check_targets(self, targets: Mapping[str, nn.Module]) -> None:
        if name := next((name for name, layer in targets.items() if stack_count(layer) is not None), None):
            raise ValueError(
                "export=adapter saves a LoRA of PEFT, which lays out adapters of fused experts in another way, and "
                f"{name} is selected. Keep the experts dense: drt_exclude=['experts']; or use export=dense or native."
            )

        if name := next((name for name, layer in targets.items() if is_projection(layer)), None):
            raise ValueError(
                "export=adapter saves a LoRA of PEFT, for which nn.MultiheadAttention has no such layer as "
                f"{name}. Leave attention out: drt_exclude=['attn']; or use export=dense or native."
            )

    def instead(self, model: nn.Module) -> str | None:
        if any(isinstance(module, AdapterLinear) for module in model.modules()):
            return None
        logger.warning(
            "export=adapter, but no layer is in adapter form: training has stopped before its last phase, or the best "
            "model is of another one. The model is saved in dense form."
        )
        return "dense"

    def write(self, saving: Saving) -> None:
        model, base = saving.model, saving.folder / BASE_FOLDER
        check_adapters(model)
        if saving.writes:
            saving.files.make_room(self.files)
        if saving.state is None:
            with presented(model, _base):
                saving.save(str(base), None)
        else:
            with undeclared(model):
                saving.save(str(base), self.converted(model, base_state_dict(model, saving.state)))
        if saving.writes:
            write_adapter(model, saving.folder, saving.repository or str(base), saving.state)

    def converted(self, model: nn.Module, state: State) -> State:
        """As that of the dense model, for whoever writes a state dict of his own while the base is being saved."""
        return dense_state_dict(model, state)

    def verify(self, written: Written, model: nn.Module) -> None:
        """The base is dense."""
        check_no_factors(written, model)


def _base(layer: LowRankLinear) -> Tensor:
    """That of an adapter, as others have been refused."""
    assert isinstance(layer, AdapterLinear)
    return layer.whole_base()


EXPORTERS.add("adapter", AdapterExporter())
