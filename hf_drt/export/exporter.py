"""Exporter: one form in which a user gets a model, and all that is particular to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_drt.export.leftovers import WHOLE_MODEL_FILES, ModelFiles
from hf_drt.export.written import Written
from hf_drt.schedule import Phase

State = dict[str, Tensor]


@dataclass(frozen=True)
class Saving:
    """One save of a model.

    Attributes:
        model: Unwrapped, in any mix of forms.
        folder: Where to.
        save: Takes a folder, and the state dict that is to be written there or None. Without one it writes the model
            as it finds it.
        state: The model's state dict where it has been gathered already.
        repository: ``user/name`` on the Hub, if it goes there.
        files: What lies in the folder.
        writes: Whether this process writes files; of several that save together one does.
    """

    model: nn.Module
    folder: Path
    save: Callable[[str, State | None], Any]
    state: State | None
    repository: str | None
    files: ModelFiles
    writes: bool = True


class Exporter(ABC):
    """How a model is checked, written, verified and loaded again in one form.

    A new one is a subclass and ``EXPORTERS.add(name, Subclass())``: ``drt_export``, ``hf-drt export``, their help and
    their errors, the model card and the clean-up of folders know it then.

    Attributes:
        help: What is written, in half a sentence, for help texts and tables.
        loading: Sentences of the model card on how to load it.
        code: Python of the model card that loads it, with ``{name}`` for the model's class and ``{repository}``.
        library: ``library_name`` of the model card.
        files: Patterns of the files that hold the model, in its folder.
        has_base: Whether the dense model that it adds to is written too, into the folder's ``base``.
        in_place: Whether the model itself takes this form once training is over.
        declared: Whether ``config.json`` has to say how to load it, which only models of transformers have.
        by_plain_trainer: Whether it is what a plain ``Trainer`` saves, once the model is in place.
        sharded: Whether it can be written of a model that FSDP2 has sharded.
    """

    help: ClassVar[str]
    loading: ClassVar[str]
    code: ClassVar[str] = 'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repository}")'
    library: ClassVar[str] = "transformers"
    files: ClassVar[Sequence[str]] = WHOLE_MODEL_FILES
    has_base: ClassVar[bool] = False
    in_place: ClassVar[bool] = False
    declared: ClassVar[bool] = True
    by_plain_trainer: ClassVar[bool] = True
    sharded: ClassVar[bool] = True

    def code_for(self, name: str, repository: str) -> str:
        """Python of the model card: that loads a model of the class ``name`` from ``repository``."""
        return self.code.format(name=name, repository=repository)

    # The checks are empty, and not abstract: most forms fit all models, phases and layers.

    def check_model(self, model: nn.Module) -> None:  # noqa: B027
        """Before the run, and before it is written: whether a model of this class can be.

        Raises:
            ValueError: It cannot.
        """

    def check_phases(self, saved: Sequence[Phase], grows: bool) -> None:  # noqa: B027
        """Before the run: whether the model can be written at the end of phases.

        Args:
            saved: Those at whose end, or in which, it is saved or published.
            grows: Whether full-rank windows are added to the plan during the run.

        Raises:
            ValueError: It cannot.
        """

    def check_targets(self, targets: Mapping[str, nn.Module]) -> None:  # noqa: B027
        """Before the run: whether all layers that change form can be written, by name.

        Raises:
            ValueError: One cannot.
        """

    def instead(self, model: nn.Module) -> str | None:
        """Name of the exporter that takes this one's place for a model that has nothing of the form, or None. It says
        so in the log."""
        return None

    @abstractmethod
    def write(self, saving: Saving) -> None:
        """Write the model.

        Raises:
            ValueError: The form has no way to express it. Nothing is written then.
        """

    @abstractmethod
    def converted(self, model: nn.Module, state: State) -> State:
        """A gathered state dict of the model, in any mix of forms, as that of this form."""

    @abstractmethod
    def verify(self, written: Written, model: nn.Module) -> None:
        """Compare the weights that have landed with the model.

        Raises:
            CheckpointError: They are of another form, or of other values.
        """
