"""Exponential moving averages of effective weights, through changes of form."""

from hf_drt.ema.average import EMA
from hf_drt.ema.decay import EMADecay
from hf_drt.ema.file import AVERAGE_NAME, read_average, write_average

__all__ = ["AVERAGE_NAME", "EMA", "EMADecay", "read_average", "write_average"]
