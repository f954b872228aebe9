"""On two processes the scheduler is stepped once an update too: a phase begins where a plain Trainer's log says."""

import tiny
from processes import launch_all
from transformers import Trainer

RUN = {"max_steps": 12, "logging_steps": 1, "warmup_steps": 2, "lr_scheduler_type": "linear"}


def test_an_anchor_is_reached_in_the_same_update(tmp_path):
    args = tiny.arguments(tmp_path / "plain", drt_schedule=None, **RUN)
    plain = Trainer(tiny.llama(), args, train_dataset=tiny.dataset())
    plain.train()
    curve = [row["learning_rate"] for row in plain.state.log_history if "learning_rate" in row]
    below = next(k for k in range(curve.index(max(curve)), len(curve)) if curve[k] < 0.5 * max(curve))

    anchored = RUN | {"drt_schedule": "factored@0 dense@lr<0.5", "watch": ("Bits",)}
    cells = {f"accumulation {n}": anchored | {"gradient_accumulation_steps": n} for n in (1, 2)}
    for cell in launch_all(tmp_path, 2, cells).values():
        assert [row["learning_rate"] for row in cell["history"] if "learning_rate" in row] == curve
        assert [row["step"] for row in cell["history"] if "drt_switch_seconds" in row] == [0, below]
