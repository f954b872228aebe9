"""Full-rank windows that begin while the run goes on, within a budget; what was seen is kept as a trace."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from hf_drt.schedule.plan import Phase, Plan
from hf_drt.schedule.trigger import Check, Trigger


class Windows:
    """Extends a plan of one low-rank phase by full-rank windows, each followed by a phase like the first.

    Decisions follow from the trace alone, so a resumed run makes them again.

    Args:
        trigger: When a window is due.
        plan: The plan to begin with.
        limit: Share of dense training FLOPs that the plan may reach, in (0, 1].
        cost: Gives the average FLOPs of a plan relative to dense.

    Attributes:
        trace: One row per check: ``step``, ``effective_rank``, ``loss``, ``phase``, and ``decision``: None, 'rank' or
            'loss' (a window begins, and why), or 'budget' (one was due, and would exceed the limit).
    """

    def __init__(self, trigger: Trigger, plan: Plan, limit: float, cost: Callable[[Plan], float]):
        self.trigger, self.limit = trigger, limit
        self._low_rank = plan.phases[0]
        self._cost = cost
        self._every = max(1, round(trigger.every / 100 * plan.max_steps))
        self._length = max(1, round(trigger.window / 100 * plan.max_steps))
        self.trace: list[dict[str, Any]] = []
        self.loss_sum = 0.0
        self.loss_steps = 0

    def add_loss(self, loss: Any) -> None:
        """Count the loss of one update step in; a tensor is not waited for."""
        self.loss_sum = self.loss_sum + loss
        self.loss_steps += 1

    def is_due(self, plan: Plan, step: int) -> bool:
        """Whether to look after ``step`` updates: at equal distances, in low-rank phases, while there is time left."""
        regular = 0 < step < plan.max_steps and step % self._every == 0
        return regular and plan.phases[plan.index_at(step - 1)].kind != "dense"

    def check(self, plan: Plan, step: int, effective_rank: float) -> Plan:
        """The plan, with a window that begins at ``step`` if one is due and the limit allows it."""
        phase = plan.index_at(step - 1)
        loss = float(self.loss_sum) / self.loss_steps if self.loss_steps else None
        self.loss_sum, self.loss_steps = 0.0, 0
        row = asdict(Check(step, effective_rank, loss)) | {"phase": phase, "decision": None}
        self.trace.append(row)
        checks = [Check(r["step"], r["effective_rank"], r["loss"]) for r in self.trace if r["phase"] == phase]
        row["decision"] = self.trigger.reason(checks)
        if row["decision"] is None:
            return plan
        extended = self._extended(plan, step)
        if self._cost(extended) > self.limit:
            row["decision"] = "budget"
            return plan
        return extended

    def _extended(self, plan: Plan, step: int) -> Plan:
        phases = [*plan.phases, Phase(step, "dense", dtype=self._low_rank.dtype)]
        if step + self._length < plan.max_steps:
            phases.append(replace(self._low_rank, start=step + self._length))
        return Plan(tuple(phases), plan.max_steps)

    def state_dict(self) -> dict[str, Any]:
        """Trace and loss since the last check; JSON-serialisable."""
        return {"trace": self.trace, "loss_sum": float(self.loss_sum), "loss_steps": self.loss_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: It is damaged.
        """
        try:
            trace = [{**asdict(Check(r["step"], r["effective_rank"], r["loss"])), "phase": r["phase"],
                      "decision": r["decision"]} for r in state["trace"]]  # fmt: skip
            self.trace, self.loss_sum, self.loss_steps = trace, float(state["loss_sum"]), int(state["loss_steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the state's trace of checks is damaged ({type(error).__name__}: {error}).") from None
