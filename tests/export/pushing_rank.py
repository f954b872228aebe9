"""One of several processes that train and publish, under torchrun: pushing_rank.py FOLDER, the Hub in HF_ENDPOINT."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import transformers as T
from accelerate import PartialState

import hf_drt.trainer.push
from hf_drt import dense_state_dict

hf_drt.trainer.push.PAUSE = 0.01


def main(folder: Path) -> None:
    trainer = tiny.trainer(
        folder, use_cpu=True, ddp_backend="gloo", max_steps=4, save_strategy="steps", save_steps=2, push_to_hub=True,
        hub_model_id="user/ranks", hub_strategy="checkpoint", hub_always_push=True, drt_tag_phases=True,
        hub_revision="trial", drt_schedule="factored:4@0 dense@2",
    )  # fmt: skip
    trainer.train()
    trainer.push_to_hub()
    expected = dense_state_dict(trainer.model)
    for rank in range(2):
        PartialState().wait_for_everyone()
        if PartialState().process_index == rank:
            loaded = T.AutoModelForCausalLM.from_pretrained("user/ranks", revision="trial").state_dict()
            assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
            print(f"process {rank} of {PartialState().num_processes} after step {trainer.state.global_step}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
