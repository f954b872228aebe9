"""Matrices only: the SVD and its cheap ways, weighed by inputs too, spectra and ranks, polar factors, Tucker and CP."""

from hf_drt.linalg.cp import cp, cp_limit, equal_norms, khatri_rao
from hf_drt.linalg.fisher import fisher_truncation, fisher_values
from hf_drt.linalg.polar import STEPS as POLAR_STEPS
from hf_drt.linalg.polar import polar, polar_map
from hf_drt.linalg.refit import refitted
from hf_drt.linalg.spectral import (
    LinAlgError,
    effective_rank,
    factored_singular_values,
    full_precision,
    gram_singular_values,
    retained_energy,
    singular_values,
    stable_rank,
    truncation_error,
    working_dtype,
)
from hf_drt.linalg.truncation import (
    GRAM_UP_TO,
    RANDOMIZED_UP_TO,
    Truncation,
    balanced,
    truncated_product,
    truncated_svd,
)
from hf_drt.linalg.tucker import tucker2
from hf_drt.linalg.weighted import (
    SHRINKAGE,
    input_root,
    shrunk,
    weighted_product,
    weighted_truncation,
    weighted_values,
)

__all__ = [
    "GRAM_UP_TO",
    "POLAR_STEPS",
    "RANDOMIZED_UP_TO",
    "SHRINKAGE",
    "LinAlgError",
    "Truncation",
    "balanced",
    "cp",
    "cp_limit",
    "effective_rank",
    "equal_norms",
    "factored_singular_values",
    "fisher_truncation",
    "fisher_values",
    "full_precision",
    "gram_singular_values",
    "input_root",
    "khatri_rao",
    "polar",
    "polar_map",
    "refitted",
    "retained_energy",
    "shrunk",
    "singular_values",
    "stable_rank",
    "truncated_product",
    "truncated_svd",
    "truncation_error",
    "tucker2",
    "weighted_product",
    "weighted_truncation",
    "weighted_values",
    "working_dtype",
]
