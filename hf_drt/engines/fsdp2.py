"""One layer inside a model that FSDP2 (``torch.distributed.fsdp.fully_shard``) has sharded: gathered, and replaced.

FSDP2 knows the parameters that a block had when it was sharded: a plain module put in their place runs, and drifts
between processes without an error, while the old weights go on being gathered. So a new layer's parameters are sharded
as the old ones were and take their places in the block's own group, which all-gathers and reduces as before.

With ``CPUOffloadPolicy`` shards live on the CPU, and a block's weights come to its device for as long as it computes.
So does a layer that changes form, whole: there it is decomposed and merged, and there the processes talk about it.

Dense fused experts are a parameter of their experts module, and in low-rank form a layer of their own: what is looked
up is who manages the parameters of a layer, not who manages the layer.

The only file that touches FSDP2's private parts, named in :data:`SEAMS`. Every function that says *collective* has to
be called by all processes in the same order.
"""

import contextlib
import copy
from collections import defaultdict
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hf_drt.engines.decompose import raise_everywhere
from hf_drt.engines.engine import Engine
from hf_drt.engines.registry import ENGINES
from hf_drt.forms import ExpertStack, stack_count

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


class FSDP2(Engine):
    """A process holds a part of each parameter; a block gathers its own for as long as it computes."""

    help = "FSDP2, by torch.distributed.fsdp.fully_shard: a process holds a part of each parameter"
    sharded = True

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._managed: dict[int, _Managed] = {}  # by layer's id, until it is replaced
        self._stacks: dict[int, tuple[nn.Module, str]] = {}  # of fused experts among them: where they stand
        self._changed: dict[int, FSDPParamGroup] = {}
        self._place: dict[int, int] = {}  # in each group, where the last layer was found: the next one follows

    @classmethod
    def manages(cls, model: nn.Module) -> bool:
        return any(isinstance(module, FSDPModule) for module in model.modules())

    @classmethod
    def inside(cls, module: nn.Module) -> nn.Module | None:
        """None: it changes a block's class, and puts nothing around it."""
        return None

    @classmethod
    def begun(cls, model: nn.Module) -> nn.Module:
        """Sharded by blocks, the members of its lists; what is left is one more."""
        for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)][::-1]:
            for block in blocks:
                fully_shard(block)
        fully_shard(model)
        return model

    def device(self, tensor: Tensor) -> torch.device:
        """Of an offloaded shard, the device that its block computes on."""
        return _device(tensor)

    def held(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def full(self, value: Any) -> Any:
        return full(value)

    def whole(self, layer: nn.Module) -> nn.Module:
        return gathered(layer)

    def whole_on(self, layer: nn.Module, process: int) -> nn.Module | None:
        """None on all other processes, which only send their shards."""
        return collected(layer, process)

    def like(self, value: Any, weight: Tensor) -> Any:
        return sharded_like(value, weight)

    def agree(self, error: Exception | None) -> None:
        """Another process holds other values, and finds other faults."""
        raise_everywhere(error, _device(next(self.model.parameters())))

    def admit(self, layers: list[nn.Module]) -> None:
        """Let go of whole weights that groups keep after a forward pass without a backward pass, and look up who
        manages the layers.

        Raises:
            ValueError: No group, or more than one, manages a layer, or it shares a parameter with another.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        found = _managed_by_layer(self.model, layers)
        self._managed = {id(layer): _only(layer, found.get(id(layer), [])) for layer in layers}
        self._stacks = _places_of_stacks(self.model, layers)

    @torch.no_grad()
    def install(self, old: nn.Module, plain: nn.Module, new: nn.Module) -> None:
        """Shard the parameters of ``new`` and give them the places that those of ``old`` have in their group."""
        managed, stack = self._managed.pop(id(old)), self._stacks.pop(id(old), None)
        by_plain = {id(plain._parameters[name]): p for name, p in managed.params.items()}
        like, fresh = next(iter(managed.params.values())), []
        for name, value in new._parameters.items():
            if value is not None:
                # That of dense experts is not theirs: the experts module has it.
                place = stack if stack is not None and isinstance(new, ExpertStack) else (new, name)
                kept = by_plain.pop(id(value), None)
                own = _new_param(value, *place, like, managed.group) if kept is None else _moved(kept, value, *place)
                own._param_fqn = _name(like, managed.holder is old, name if place[0] is new else None)
                new._parameters[name] = own.sharded_param
                fresh.append(own)
        for dropped in by_plain.values():
            dropped._post_load_hook_handle.remove()
        for by_module in _hook_handles(managed.group):  # which would keep the old shards until all layers are in
            by_module.pop(old, None)
        self._put(managed.group, list(managed.params.values()), fresh)
        new._is_fsdp_managed_module = managed.holder._is_fsdp_managed_module
        new._fsdp_use_orig_params = managed.holder._fsdp_use_orig_params

    def _put(self, group: FSDPParamGroup, old: list[FSDPParam], new: list[FSDPParam]) -> None:
        """Exchange parameters in a group, which lists those of a module one after the other."""
        params, first = group.fsdp_params, self._place.get(id(group), 0)
        follows = first < len(params) and params[first] is old[0]
        place = first if follows else params.index(old[0])
        params[place : place + len(old)] = new
        self._place[id(group)] = place + len(new)
        self._changed[id(group)] = group

    def settle(self) -> None:
        """Tell the groups what they have."""
        for group in self._changed.values():
            _refresh(group)
        self._changed = {}

    def around_switch(self, options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


ENGINES.add("fsdp2", FSDP2)


class _Managed(NamedTuple):
    """The parameters of one layer by their names in it, the group that manages them, and the module that holds them:
    the layer itself, or of dense experts the experts module."""

    group: FSDPParamGroup
    params: dict[str, FSDPParam]
    holder: nn.Module


def _device(tensor: Tensor) -> torch.device:
    """Where the whole of a tensor is gathered."""
    if not isinstance(tensor, DTensor) or tensor.device.type == tensor.device_mesh.device_type:
        return tensor.device
    kind = tensor.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def full(value: Any) -> Any:
    """The whole of a sharded tensor, sharing no memory with its shard; anything else as it is. Collective."""
    if not isinstance(value, DTensor):
        return value
    with torch.no_grad():
        whole = value.to(_device(value)).full_tensor()
    aliases = whole.untyped_storage().data_ptr() == value.to_local().untyped_storage().data_ptr()
    return whole.clone() if aliases else whole


@torch.no_grad()
def _collected(value: Tensor | None, process: int) -> Tensor | None:
    """:func:`full` on one process, to which the others only send their rows; what they get is not used."""
    if not isinstance(value, DTensor) or value.placements[-1] != Shard(0):
        return full(value)
    group = value.device_mesh.get_group(value.device_mesh.ndim - 1)
    ranks, rows = dist.get_process_group_ranks(group), value.shape[0]
    if process not in ranks:  # it has them from its own replica
        return None
    shard = value.to_local().to(_device(value))
    part = shard.new_zeros(-(-rows // len(ranks)), *value.shape[1:])  # shared out as by torch.chunk
    part[: len(shard)] = shard
    mine = dist.get_rank() == process
    whole = shard.new_empty(len(part) * len(ranks) if mine else 0, *value.shape[1:])
    dist.gather(part, list(whole.chunk(len(ranks))) if mine else None, dst=process, group=group)
    return whole[:rows]


def sharded_like(value: Any, like: Tensor) -> Any:
    """A whole tensor, equal on all processes, sharded as a parameter is, if it is; a number or scalar as it is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def gathered(module: nn.Module) -> nn.Module:
    """A layer with whole, plain parameters: a copy of a sharded one, else the layer itself. Collective."""
    return _with_wholes(module, [full(p) for p in module._parameters.values()]) if _is_sharded(module) else module


def collected(module: nn.Module, process: int) -> nn.Module | None:
    """:func:`gathered` on one process; None on all others. Collective."""
    if not _is_sharded(module):
        return module
    wholes = [_collected(p, process) for p in module._parameters.values()]
    return _with_wholes(module, wholes) if dist.get_rank() == process else None


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) for p in module.parameters(recurse=False))


def _with_wholes(module: nn.Module, wholes: list[Tensor | None]) -> nn.Module:
    """A copy of a layer with these parameters, and without the hooks by which FSDP2 keeps its state dict."""
    plain = copy.copy(module)
    plain._parameters = {
        name: None if p is None else nn.Parameter(cast(Tensor, whole), requires_grad=p.requires_grad)
        for (name, p), whole in zip(module._parameters.items(), wholes, strict=True)
    }
    for name in _HOOKS:
        plain.__dict__[name] = type(plain.__dict__[name])()
    return plain


def _managed_by_layer(model: nn.Module, layers: list[nn.Module]) -> dict[int, list[_Managed]]:
    """What every group manages of each of these layers, by the layer's id, in the group's order."""
    states = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
    groups = {id(group): group for state in states for group in state._fsdp_param_groups}
    owners = {id(p): (id(layer), name) for layer in layers for name, p in layer._parameters.items() if p is not None}
    found: dict[int, dict[int, _Managed]] = defaultdict(dict)
    for group in groups.values():
        for p in group.fsdp_params:
            if (owner := owners.get(id(p.sharded_param))) is not None:
                layer, name = owner
                own = found[layer].setdefault(id(group), _Managed(group, {}, p._module_info.module))
                own.params[name] = p
    return {layer: list(by_group.values()) for layer, by_group in found.items()}


def _places_of_stacks(model: nn.Module, layers: list[nn.Module]) -> dict[int, tuple[nn.Module, str]]:
    """The experts module of each layer of fused experts, and the layer's name in it, by the layer's id."""
    stacks = {id(layer): layer for layer in layers if stack_count(layer) is not None}
    held = {id(layer.weight) if isinstance(layer, ExpertStack) else key: key for key, layer in stacks.items()}
    found = {}
    for owner in model.modules() if stacks else ():
        for name, value in (*owner._modules.items(), *owner._parameters.items()):
            if id(value) in held:
                found[held[id(value)]] = (owner, name)
    return found


def _only(layer: nn.Module, found: list[_Managed]) -> _Managed:
    """The one group that manages a layer's parameters."""
    shared = any(p._module_info.shared_modules for managed in found for p in managed.params.values())
    if len(found) != 1 or shared:
        raise ValueError(
            f"a {type(layer).__name__} of a model under FSDP2 is managed by {len(found)} of its groups"
            f"{', and shares a parameter with another layer' if shared else ''}; it must be by one. Shard whole blocks "
            "(fsdp_config: auto_wrap_policy TRANSFORMER_BASED_WRAP), or exclude the layer."
        )
    return found[0]


def _new_param(value: nn.Parameter, layer: nn.Module, name: str, like: FSDPParam, group: FSDPParamGroup) -> FSDPParam:
    """A managed parameter made from a whole one, in the way of a neighbour."""
    return FSDPParam(
        value,
        ParamModuleInfo(layer, name),
        like.mesh_info,
        like.post_forward_mesh_info,
        like.device,
        None,
        like.mp_policy,
        group.offload_policy,
    )


def _name(like: FSDPParam, is_of_layer: bool, name: str | None) -> str | None:
    """A parameter's name in the model by that of an old one of its layer, be that the layer itself; without a ``name``
    it is the layer itself that the new one is called by."""
    if like._param_fqn is None:
        return None
    layer = like._param_fqn.rpartition(".")[0] if is_of_layer else like._param_fqn
    return layer if name is None else f"{layer}.{name}"


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


def _hook_handles(group: FSDPParamGroup) -> tuple[dict[nn.Module, Any], ...]:
    """Those of the state-dict hooks on each module that holds parameters of the group."""
    return group._module_to_pre_save_state_dict_hook_handle, group._module_to_pre_load_state_dict_hook_handle


def _refresh(group: FSDPParamGroup) -> None:
    """Mixed-precision attributes and state-dict hooks, made for the old parameters, made anew."""
    for by_module in _hook_handles(group):
        for handle in by_module.values():
            handle.remove()
        by_module.clear()
    group._init_mp_dtypes()
    group._register_state_dict_hooks()
