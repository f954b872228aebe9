"""One of several processes that train under FSDP2 and publish: pushing_shards.py FOLDER JSON, the Hub in HF_ENDPOINT.

Every phase's revision is the model of its last step, which process 0 has kept.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import conftest  # noqa: F401
import cpu_fsdp
import peft
import tiny
import torch
import transformers as T
from accelerate import PartialState

import hf_drt.trainer.push
from hf_drt import dense_state_dict

hf_drt.trainer.push.PAUSE = 0.01
UNITS = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}
load = T.AutoModelForCausalLM.from_pretrained


class Keep(T.TrainerCallback):
    """The dense model after every update, on process 0."""

    def __init__(self, trainer):
        self.trainer, self.kept = trainer, {}

    def on_step_end(self, args, state, control, **kwargs):
        gathered = self.trainer.accelerator.get_state_dict(self.trainer.model)
        if state.is_world_process_zero:
            self.kept[state.global_step] = dense_state_dict(self.trainer.model, gathered)


def published(export: str, revision: str) -> dict[str, torch.Tensor]:
    if export == "adapter":
        # Without the last argument the Auto classes of transformers look for the root's adapter in the subfolder.
        base = load("user/shards", revision=revision, subfolder="base", adapter_kwargs={"subfolder": "base"})
        return peft.PeftModel.from_pretrained(base, "user/shards", revision=revision).merge_and_unload().state_dict()
    model = load("user/shards", revision=revision)
    return dense_state_dict(model)


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    cpu_fsdp.allow()
    units = UNITS | {"state_dict_type": settings.pop("kind")} | settings.pop("fsdp_config", {})
    trainer = tiny.trainer(
        folder, use_cpu=True, fsdp=True, fsdp_config=units, max_steps=4, save_strategy="steps", save_steps=2,
        push_to_hub=True, hub_model_id="user/shards", hub_strategy="checkpoint", hub_always_push=True,
        drt_tag_phases=True, **settings,
    )  # fmt: skip
    trainer.add_callback(keep := Keep(trainer))
    trainer.train()
    trainer.push_to_hub()
    if PartialState().is_main_process:
        export = settings.get("drt_export", "dense")
        tags = {phase: f"phase-{i}-{phase.kind}" for i, phase in enumerate(trainer.drt.plan.phases)}
        revisions = {tag: trainer.drt.plan.end_of(i) for i, tag in enumerate(tags.values())} | {"main": 4}
        for revision, step in revisions.items():
            found, expected = published(export, revision), keep.kept[step]
            assert expected.keys() <= found.keys()
            assert all(torch.allclose(found[key], W, atol=1e-6, rtol=0) for key, W in expected.items()), revision
        print(f"{', '.join(revisions)} are as they were", flush=True)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
