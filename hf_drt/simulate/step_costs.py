"""StepCosts: an update step in each phase of a plan, simulated when it is asked for, and once."""

from collections.abc import Callable
from typing import Any

import torch

from hf_drt.activations import Activations
from hf_drt.controller import DynamicRank
from hf_drt.forms import Dense, Form, form_of, layer_of
from hf_drt.optim import check_step, maker
from hf_drt.simulate.batch import BatchSpec
from hf_drt.simulate.step import StepCost, simulate_step
from hf_drt.transition import empty_forms


class StepCosts:
    """Inside of a ``with`` block the model changes form as it is looked at; afterwards it is dense again.

    Args:
        controller: Plan and model; the model is dense and on the meta device.
        batch, optimizer, accumulation, autocast: As in :func:`hf_drt.simulate.simulate_step`.
        tick: Called after each simulated step.

    Raises:
        SimulationError: The cost of the model does not follow from its shapes.
        ValueError: The optimizer is not one that may follow a change of form, or its package is not installed, or it
            cannot have the matrix optimizer beside it; as :func:`hf_drt.activations.checkpointing_error`.
    """

    def __init__(
        self,
        controller: DynamicRank,
        batch: BatchSpec,
        optimizer: str = "adamw_torch",
        accumulation: int = 1,
        autocast: torch.dtype | None = None,
        tick: Callable[[], None] = lambda: None,
    ):
        rule, _ = maker(optimizer)
        check_step(rule, f"optim='{optimizer}'", controller.config)
        self._controller, self._batch, self._tick = controller, batch, tick
        self._how = {"optimizer": optimizer, "accumulation": accumulation, "autocast": autocast}
        self._activations = Activations(controller.model, controller.config)
        self._costs: dict[tuple, StepCost] = {}

    def __enter__(self) -> "StepCosts":
        return self

    def __exit__(self, *args: object) -> None:
        self._activations.leave()
        self._put(self._plain())

    def dense(self) -> StepCost:
        """Of dense training, without the settings on memory of activations."""
        self._activations.leave()
        return self._cost(self._plain())

    def of(self, phase: int) -> StepCost:
        """In a phase, by its index."""
        controller = self._controller
        forms = controller.forms(phase)
        saves = controller.config.dense_checkpointing or controller.config.dense_accumulation > 1
        trains_dense = saves and controller.resolved.trains_dense(phase)
        self._put(forms)
        self._activations.enter(trains_dense)
        return self._cost(forms, trains_dense, controller.plan.phases[phase].dtype)

    def _cost(self, forms: dict[str, Form], trains_dense: bool | None = None, dtype: str | None = None) -> StepCost:
        """``dtype`` takes the place of the run's autocast."""
        how: dict[str, Any] = (
            self._how if dtype is None else self._how | {"autocast": torch.bfloat16 if dtype == "bf16" else None}
        )
        key = (trains_dense, how["autocast"], *forms.values())
        if key not in self._costs:
            self._put(forms)
            names = list(self._controller.targets)
            matrices = names if self._controller.config.uses_matrix_optimizer else ()
            pieces = self._controller.config.dense_accumulation if trains_dense else 1
            self._costs[key] = simulate_step(
                self._controller.model, self._batch, pieces=pieces, watch=names, matrices=matrices, **how
            )
            self._tick()
        return self._costs[key]

    def _plain(self) -> dict[str, Form]:
        return dict.fromkeys(self._controller.targets, Dense())

    def _put(self, forms: dict[str, Form]) -> None:
        model = self._controller.model
        empty_forms(model, {name: form for name, form in forms.items() if form_of(layer_of(model, name)) != form})
