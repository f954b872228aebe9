"""Averages of the weights in a trainer: what :class:`hf_drt.EMACallback` cannot do by itself.

- ``evaluation_loop``: evaluations with the averaged weights, if asked.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from hf_drt.registry import EXPORTERS
from hf_drt.trainer.callback import DRTCallback
from hf_drt.trainer.ema import EMACallback, ema_callback, warn_of_lost_average
from hf_drt.trainer.publishing import PublishingMixin


class AveragingMixin(PublishingMixin):
    """The part of :class:`hf_drt.DRTTrainerMixin` that serves callbacks of hf_drt; it works without DRT too."""

    def _drt_refuse_callbacks(self) -> None:
        """
        Raises:
            ValueError: A callback that has no place here, or that cannot do what it was asked for.
        """
        callbacks = self.callback_handler.callbacks
        if any(isinstance(callback, DRTCallback) for callback in callbacks):
            raise ValueError("DRTCallback is part of this trainer. Pass its settings as drt=, or as drt_* arguments.")
        averages = [callback for callback in callbacks if isinstance(callback, EMACallback)]
        if len(averages) > 1:
            raise ValueError(
                f"a trainer has one EMACallback, got {len(averages)}. For a second average make a hf_drt.EMA in a "
                "callback of your own."
            )
        for callback in averages:
            self._drt_check_average(callback)
            callback.served = True

    def _drt_check_average(self, callback: EMACallback) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            engine = "FSDP" if self.is_fsdp_enabled else "DeepSpeed"
            raise ValueError(
                f"EMACallback averages whole weights, and under {engine} a process holds a part of them, or of their "
                "full precision. Train with DDP or in one process, or leave the average out."
            )
        config = self._drt_config()
        if callback.export and config.schedule is not None and not EXPORTERS[config.export].in_place:
            raise ValueError(
                "EMACallback(export=True) makes the model the averaged one, which is dense, and "
                f"drt_export={config.export} asks for another form. Use drt_export=dense; or leave export out, and cut "
                "the average to the layers' ranks after training: callback.ema.copy_to(truncate=True)."
            )

    def _drt_average_from(self, folder: str | None) -> None:
        """The checkpoint that a run goes on from."""
        if (callback := ema_callback(self)) is not None:
            callback.resume_from(folder)
        elif folder is not None:
            warn_of_lost_average(folder)

    def _drt_best_average(self, folder: str | None) -> None:
        if folder is not None and (callback := ema_callback(self)) is not None:
            callback.load(folder)

    def _drt_around_evaluation(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``evaluation_loop``, whoever overrides it."""
        callback = ema_callback(self)
        with contextlib.nullcontext() if callback is None else callback.evaluated(self.model):
            return evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, with the averaged weights where a callback asks for them."""
        return self._drt_around_evaluation(super().evaluation_loop, *args, **kwargs)
