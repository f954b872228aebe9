"""One layer inside a model that FSDP2 (``torch.distributed.fsdp.fully_shard``) has sharded: gathered, and replaced.

FSDP2 knows the parameters that a block had when it was sharded: a plain module put in their place runs, and drifts
between processes without an error, while the old weights go on being gathered. So a new layer's parameters are sharded
as the old ones were and take their places in the block's own group, which all-gathers and reduces as before.

The only file that touches FSDP2's private parts, named in :data:`SEAMS`. Every function that says *collective* has to
be called by all processes in the same order.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, distribute_tensor

# Private attributes and parameters that the code below relies on; tests/distributed/test_fsdp.py fails first if torch
# moves one.
SEAMS: dict[Any, tuple[str, ...]] = {
    FSDPParam.__init__: (
        "param", "module_info", "mesh_info", "post_forward_mesh_info", "device", "shard_placement_fn", "mp_policy",
        "offload_policy",
    ),
    ParamModuleInfo: ("module", "param_name", "shared_modules"),
    FSDPParamGroup: ("_init_mp_dtypes", "_register_state_dict_hooks"),
}  # fmt: skip
_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 manages the model, or parts of it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def full(value: Any) -> Any:
    """The whole of a sharded tensor, sharing no memory with its shard; anything else as it is. Collective."""
    if not isinstance(value, DTensor):
        return value
    whole = value.detach().full_tensor()
    aliases = whole.untyped_storage().data_ptr() == value.to_local().untyped_storage().data_ptr()
    return whole.clone() if aliases else whole


def sharded_like(value: Any, like: Tensor) -> Any:
    """A whole tensor, equal on all processes, sharded as a parameter is, if it is; a number or scalar as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gathered(module: nn.Module) -> nn.Module:
    """A layer with whole, plain parameters: a copy of a sharded one, else the layer itself. Collective."""
    if not any(isinstance(p, DTensor) for p in module.parameters(recurse=False)):
        return module
    plain = copy.copy(module)
    plain._parameters = {
        name: None if p is None else nn.Parameter(full(p), requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    for name in _HOOKS:
        plain.__dict__[name] = type(plain.__dict__[name])()
    return plain


def reshard(model: nn.Module) -> None:
    """Let go of whole weights that groups keep after a forward pass without a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def splice(model: nn.Module, old: nn.Module, plain: nn.Module, new: nn.Module) -> None:
    """Shard the parameters of ``new`` and give them the places that those of ``old`` have in their group.

    Args:
        model: The sharded model, which holds ``old``.
        old: The sharded layer.
        plain: ``gathered(old)``, from which ``new`` was made.
        new: The new layer, with whole parameters. Those it has taken over from ``plain`` (bias; W as an adapter's base)
            become the old layer's own Parameter objects, so that their optimizer state needs no code.

    Raises:
        ValueError: No group, or more than one, manages the old layer, or it shares a parameter with another.
    """
    group = group_of(model, old)
    mine = [p for p in group.fsdp_params if p._module_info.module is old]
    by_plain = {id(plain._parameters[p._module_info.param_name]): p for p in mine}
    place = group.fsdp_params.index(mine[0])
    fresh = []
    for name, value in new._parameters.items():
        if value is not None:
            kept = by_plain.pop(id(value), None)
            managed = _new_param(value, new, name, mine[0], group) if kept is None else _moved(kept, value, new, name)
            new._parameters[name] = managed.sharded_param
            fresh.append(managed)
    for dropped in by_plain.values():
        dropped._post_load_hook_handle.remove()
    rest = [p for p in group.fsdp_params if p not in mine]
    group.fsdp_params = rest[:place] + fresh + rest[place:]
    _refresh(group)
    new._is_fsdp_managed_module = old._is_fsdp_managed_module
    new._fsdp_use_orig_params = old._fsdp_use_orig_params


def group_of(model: nn.Module, layer: nn.Module) -> FSDPParamGroup:
    """The one group that manages a layer's parameters.

    Raises:
        ValueError: None or several do, or the layer shares a parameter with another.
    """
    states = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    groups = {id(group): group for state in states for group in state._fsdp_param_groups}
    found = [g for g in groups.values() if any(p._module_info.module is layer for p in g.fsdp_params)]
    shared = any(p._module_info.shared_modules for g in found for p in g.fsdp_params if p._module_info.module is layer)
    if len(found) != 1 or shared:
        raise ValueError(
            f"a {type(layer).__name__} of a model under FSDP2 is managed by {len(found)} of its groups"
            f"{', and shares a parameter with another layer' if shared else ''}; it must be by one. Shard whole blocks "
            "(fsdp_config: auto_wrap_policy TRANSFORMER_BASED_WRAP), or exclude the layer."
        )
    return found[0]


def _new_param(value: nn.Parameter, layer: nn.Module, name: str, like: FSDPParam, group: FSDPParamGroup) -> FSDPParam:
    """A managed parameter made from a whole one, in the way of a neighbour."""
    managed = FSDPParam(
        value,
        ParamModuleInfo(layer, name),
        like.mesh_info,
        like.post_forward_mesh_info,
        like.device,
        None,
        like.mp_policy,
        group.offload_policy,
    )
    prefix = (like._param_fqn or "").rpartition(".")[0]
    managed._param_fqn = f"{prefix}.{name}" if prefix else None
    return managed


def _moved(managed: FSDPParam, value: nn.Parameter, layer: nn.Module, name: str) -> FSDPParam:
    """An old managed parameter with the value it has in the new layer."""
    parameter = managed.sharded_param
    parameter.copy_(sharded_like(value.detach(), parameter))
    parameter.requires_grad_(value.requires_grad)
    parameter.grad = None
    managed._post_load_hook_handle.remove()
    managed._module_info = ParamModuleInfo(layer, name)
    managed._post_load_hook_handle = layer.register_load_state_dict_post_hook(
        lambda *args, **kwargs: managed.reset_sharded_param()
    )
    return managed


def _refresh(group: FSDPParamGroup) -> None:
    """Mixed-precision attributes and state-dict hooks, made for the old parameters, made anew."""
    handles = (group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle)
    for by_module in handles:
        for handle in by_module.values():
            handle.remove()
        by_module.clear()
    group._init_mp_dtypes()
    group._register_state_dict_hooks()
