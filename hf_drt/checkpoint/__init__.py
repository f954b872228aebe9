"""What a checkpoint says of the forms of its layers: state file, run state, the block of config.json."""

from hf_drt.checkpoint.block import AGAIN, DeclaredLayer, read_block
from hf_drt.checkpoint.declaration import METHOD, declare, runtime_names, transformers_models, undeclared
from hf_drt.checkpoint.inputs_file import INPUTS_NAME, read_inputs, write_inputs
from hf_drt.checkpoint.run_state import (
    MADE_IN,
    check_plan,
    check_preset,
    check_structure,
    continued_plan,
    lasting,
    structure,
)
from hf_drt.checkpoint.safetensors_files import Shapes, shapes_by_file, stored_shapes, weight_files
from hf_drt.checkpoint.state_file import STATE_NAME, CheckpointError, read_state, write_state

__all__ = [
    "AGAIN",
    "INPUTS_NAME",
    "MADE_IN",
    "METHOD",
    "STATE_NAME",
    "CheckpointError",
    "DeclaredLayer",
    "Shapes",
    "check_plan",
    "check_preset",
    "check_structure",
    "continued_plan",
    "declare",
    "lasting",
    "read_block",
    "read_inputs",
    "read_state",
    "runtime_names",
    "shapes_by_file",
    "stored_shapes",
    "structure",
    "transformers_models",
    "undeclared",
    "weight_files",
    "write_inputs",
    "write_state",
]
