"""SplitAttention: ``nn.MultiheadAttention`` with a linear layer for each projection, which may change form.

torch keeps the projections of queries, keys and values in one parameter ``in_proj_weight (3 E, E)``, and hands it and
the output projection's weight to a function: neither is called, so that neither can be replaced by factors. Here all
four are layers that are called. The state dict is that of the packed module as long as all four are dense.
"""

import copy
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms.lazy import EffectiveWeight
from hf_drt.forms.modules import FormedLinear
from hf_drt.forms.plain import strip

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_MARK = "_is_hf_initialized"  # transformers' of weights that have been loaded


class Projection(nn.Linear):
    """The projection of queries, keys or values of an ``nn.MultiheadAttention``, as a layer."""


class SplitAttention(nn.MultiheadAttention):
    """Attention with the interface and the function of the ``nn.MultiheadAttention`` that it is made of.

    ``y = out_proj(softmax(q k^T / sqrt(d) + mask) v)`` per head, with ``q = q_proj(query)`` and so on (Vaswani et al.
    2017, Eq. 1), by ``F.scaled_dot_product_attention`` where no attention weights are asked for.

    Args:
        packed: Gives its settings, ``out_proj``, ``bias_k`` and ``bias_v``, the very objects.
        copied: Whether the projections get memory of their own; else they are views of the packed parameters.
    """

    q_proj: Any  # nn.Linear, or a low-rank layer in its place
    k_proj: Any
    v_proj: Any

    def __init__(self, packed: nn.MultiheadAttention, copied: bool = True):
        nn.Module.__init__(self)
        fresh = vars(nn.Module()).keys()
        self.__dict__.update({name: value for name, value in vars(packed).items() if name not in fresh})
        self.training = packed.training
        self._shell = [_shell(packed)]  # in a list, so that nn.Module does not register it as a child
        self._packed = {leaf: weakref.ref(p) for leaf, p in packed_parameters(packed).items()}
        for leaf in ("bias_k", "bias_v"):
            if leaf in packed._parameters:
                self.register_parameter(leaf, packed._parameters[leaf])
        for name in PROJECTIONS:
            setattr(self, name, projection(packed, name, copied))
        self.out_proj = packed.out_proj

    # ---- the packed parameters, for whoever reads them

    @property
    def in_proj_weight(self) -> Tensor | None:
        """``(3 E, E)``: W of queries, keys and values, formed when it is computed with, as that of a low-rank layer; a
        tensor of that kind keeps torch's fused kernels away. None where keys or values have a width of their own."""
        if not self._qkv_same_embed_dim:
            return None
        weights = [layer.weight for layer in self.projections()]
        return _joined(self.projections(), weights, (3 * self.embed_dim, self.embed_dim))

    @property
    def in_proj_bias(self) -> Tensor | None:
        """``(3 E)``, likewise."""
        biases = [layer.bias for layer in self.projections() if layer.bias is not None]
        return _joined(self.projections(), biases, (3 * self.embed_dim,)) if biases else None

    @property
    def q_proj_weight(self) -> Tensor | None:
        """W of queries where keys or values have a width of their own, else None; likewise the two below."""
        return None if self._qkv_same_embed_dim else self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor | None:
        """W of keys."""
        return None if self._qkv_same_embed_dim else self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor | None:
        """W of values."""
        return None if self._qkv_same_embed_dim else self.v_proj.weight

    def projections(self) -> list[Any]:
        """Those of queries, keys and values."""
        return [getattr(self, name) for name in PROJECTIONS]

    @property
    def all_dense(self) -> bool:
        """Whether each of the four is an ordinary dense layer."""
        return not any(isinstance(layer, FormedLinear) for layer in (*self.projections(), self.out_proj))

    def _reset_parameters(self) -> None:
        """New random weights, as those of the packed module. Weights that transformers has loaded stay."""
        if all(map(_is_loaded, self.projections())):
            return
        packed = self.joined()
        packed._reset_parameters()
        self.load_state_dict(packed.state_dict())

    # ---- forward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of ``nn.MultiheadAttention``, whose fused kernels for inference it does not use.

        Raises:
            ValueError: Shapes do not fit each other, or a mask is neither boolean nor floating-point.
        """
        if query.is_nested:
            return self._nested(query, key, value, key_padding_mask, need_weights, attn_mask), None
        whole = query.dim() == 3
        if not whole:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        _check_inputs(self, query, key, value)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        if is_causal and attn_mask is None:
            raise ValueError(
                "is_causal=True says that attn_mask is causal, but attn_mask is None. Pass the mask too: "
                "nn.Transformer.generate_square_subsequent_mask(length)."
            )
        is_causal = is_causal and key_padding_mask is None and not need_weights
        sizes = (query.shape[0], self.num_heads, query.shape[1], key.shape[1])
        mask = None if is_causal else _merged_mask(attn_mask, key_padding_mask, sizes, k.shape[1], query.dtype)
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            y, weights = _weighted(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y, weights = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal), None
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not whole:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values ``(N, S, E)`` with the bias at the end, and with zeros after that."""
        if bias is not None:
            x = torch.cat([x, bias.expand(x.shape[0], 1, -1)], 1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _nested(self, query: Tensor, *rest: Tensor | bool | None) -> Tensor:
        """Of the sequences of different lengths that ``nn.TransformerEncoder`` makes of a padded batch."""
        key, value, key_padding_mask, need_weights, attn_mask = rest
        if not (query is key is value) or need_weights or not (key_padding_mask is attn_mask is None):
            raise ValueError(
                "nested tensors are attended to by themselves alone, without masks and with need_weights=False. Pass "
                "padded tensors, with key_padding_mask."
            )
        lengths = torch.tensor([len(row) for row in query.unbind()], device=query.device)
        padded = query.to_padded_tensor(0.0)
        mask = torch.arange(padded.shape[1], device=query.device) >= lengths[:, None]
        x = padded if self.batch_first else padded.transpose(0, 1)
        y, _ = self(x, x, x, key_padding_mask=mask, need_weights=False)
        y = y if self.batch_first else y.transpose(0, 1)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(y, lengths.tolist(), strict=True)])

    # ---- the state dict of the packed module

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.all_dense and all(type(layer.weight) is nn.Parameter for layer in self.projections()):
            self.pack(state, prefix)
        elif type(like := next(self.q_proj.parameters())) is nn.Parameter:
            # As a low-rank layer does: a size mismatch, where a packed module would keep random weights in silence.
            state[self.mark(prefix)] = like.detach().new_empty(0, self.embed_dim)
        return state

    def mark(self, prefix: str) -> str:
        """Name of the entry of no elements in a state dict that has the layers' names."""
        return prefix + _sources(self._qkv_same_embed_dim)[0][0]

    def pack(self, state: dict[str, Tensor], prefix: str) -> None:
        """Put the packed module's names in the place of the three layers', in a state dict that has their dense
        weights; one that lacks some stays as it is."""
        for leaf, sources in _sources(self._qkv_same_embed_dim):
            keys = [prefix + source for source in sources]
            if all(key in state and state[key].numel() for key in keys):
                parts = [state.pop(key) for key in keys]
                state[prefix + leaf] = parts[0] if len(parts) == 1 else torch.cat(parts)

    def packed_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what :meth:`pack` makes, by name."""
        return {f"{prefix}{leaf}": shape for leaf, shape in self._shapes().items()}

    def split_shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes of what :meth:`pack` takes, by name."""
        found = {}
        for leaf, sources in _sources(self._qkv_same_embed_dim):
            if shape := self._shapes().get(leaf):
                found |= {prefix + source: (shape[0] // len(sources), *shape[1:]) for source in sources}
        return found

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        E = self.embed_dim
        widths = {"in_proj_weight": (3 * E, E)}
        if not self._qkv_same_embed_dim:
            widths = {"q_proj_weight": (E, E), "k_proj_weight": (E, self.kdim), "v_proj_weight": (E, self.vdim)}
        return widths if self.q_proj.bias is None else widths | {"in_proj_bias": (3 * E,)}

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for leaf, sources in _sources(self._qkv_same_embed_dim):
            packed = state_dict.pop(prefix + leaf, None)
            if packed is not None and packed.numel():
                parts = packed.chunk(len(sources))
                state_dict.update({prefix + s: part.clone() for s, part in zip(sources, parts, strict=True)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- back

    def joined(self) -> nn.MultiheadAttention:
        """The packed module again, with the weights of now; ``out_proj``, ``bias_k`` and ``bias_v`` are the very
        objects.

        Raises:
            ValueError: A layer is not dense.
        """
        if not self.all_dense:
            raise ValueError("a projection is in low-rank form. Convert it to Dense() first: drt.to_dense().")
        packed = copy.copy(self._shell[0])
        packed._parameters, packed._modules = dict(packed._parameters), {"out_proj": self.out_proj}
        packed.training = self.training
        for leaf, sources in _sources(self._qkv_same_embed_dim):
            parts = [self.get_submodule(s.partition(".")[0])._parameters[s.partition(".")[2]] for s in sources]
            if parts[0] is not None:
                whole = torch.cat([p.detach() for p in parts if p is not None])
                packed._parameters[leaf] = _parameter(whole, parts[0])
        for leaf in ("bias_k", "bias_v"):
            if leaf in self._parameters:
                packed._parameters[leaf] = self._parameters[leaf]
        return packed

    def parts_of(self, parameter: Tensor) -> list[nn.Parameter]:
        """What a parameter of the packed module has become; none where it is no such one."""
        for leaf, sources in _sources(self._qkv_same_embed_dim):
            if (held := self._packed.get(leaf)) is not None and held() is parameter:
                return [self.get_parameter(source) for source in sources]
        return []

    def __getstate__(self):
        return vars(self) | {"_packed": {}}


def packed_parameters(attention: nn.MultiheadAttention) -> dict[str, nn.Parameter]:
    """The parameters of an ``nn.MultiheadAttention`` that a split takes apart, by name."""
    names = [leaf for leaf, _ in _sources(attention._qkv_same_embed_dim)]
    return {name: p for name in names if (p := attention._parameters.get(name)) is not None}


def projection(packed: nn.MultiheadAttention, name: str, copied: bool = False) -> nn.Linear:
    """One projection of an ``nn.MultiheadAttention`` as a layer, a view of the packed parameters unless ``copied``."""
    index = PROJECTIONS.index(name)
    weight, bias = getattr(packed, f"{name}_weight"), packed.in_proj_bias
    source = packed.in_proj_weight if packed._qkv_same_embed_dim else weight
    W = source.detach().chunk(3)[index] if packed._qkv_same_embed_dim else source.detach()
    layer = Projection(W.shape[1], W.shape[0], bias=bias is not None, device="meta")
    layer.weight = _parameter(W.clone() if copied else W, source)
    if bias is not None:
        b = bias.detach().chunk(3)[index]
        layer.bias = _parameter(b.clone() if copied else b, bias)
    return layer.train(packed.training)


def is_projection(layer: nn.Module) -> bool:
    """Whether a layer, in any form, is a projection of what was an ``nn.MultiheadAttention``."""
    dense = layer.shell if isinstance(layer, FormedLinear) else layer
    return isinstance(dense, (Projection, nn.modules.linear.NonDynamicallyQuantizableLinear))


def split_attentions(model: nn.Module) -> Iterator[tuple[str, SplitAttention]]:
    """Every split attention under every name that its tensors have in the state dict."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SplitAttention):
            yield name.replace("_checkpoint_wrapped_module.", ""), module


def _sources(same_width: bool) -> list[tuple[str, Sequence[str]]]:
    """Name of each packed parameter, and of the layers' parameters that it consists of."""
    weights = [f"{name}.weight" for name in PROJECTIONS]
    packed = [("in_proj_weight", weights)] if same_width else [(w.replace(".", "_"), [w]) for w in weights]
    return [*packed, ("in_proj_bias", [f"{name}.bias" for name in PROJECTIONS])]


def _parameter(tensor: Tensor, like: nn.Parameter) -> nn.Parameter:
    new = nn.Parameter(tensor, requires_grad=like.requires_grad)
    if _MARK in vars(like):
        vars(new)[_MARK] = vars(like)[_MARK]
    return new


def _shell(packed: nn.MultiheadAttention) -> nn.MultiheadAttention:
    shell = copy.copy(packed)
    strip(shell, packed)
    shell._parameters, shell._modules = dict.fromkeys(packed._parameters), {}
    return shell


def _joined(layers: list[nn.Module], parts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.cat(parts)
    trainable = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    weight = EffectiveWeight(lambda: torch.cat(parts), shape, parts[0], trainable)
    weight._is_hf_initialized = all(map(_is_loaded, layers))
    return weight


def _is_loaded(layer: nn.Module) -> bool:
    return hasattr(layer, _MARK) or all(hasattr(p, _MARK) for p in layer.parameters())


# ---- inputs


def _check_inputs(attention: SplitAttention, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Of shape ``(N, length, width)``."""
    widths = (attention.embed_dim, attention.kdim, attention.vdim)
    given = tuple(x.shape[-1] for x in (query, key, value))
    if given != widths:
        raise ValueError(f"query, key and value must have {widths} features, got {given}.")
    if key.shape[:2] != value.shape[:2] or query.shape[0] != key.shape[0]:
        shapes = [tuple(x.shape[:2]) for x in (query, key, value)]
        raise ValueError(
            f"query, key and value must be of one batch size, and key and value of one length; (batch, length) are "
            f"{shapes}. batch_first is {attention.batch_first}."
        )


def _merged_mask(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    sizes: tuple[int, int, int, int],
    keys: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one that is added, of a shape that broadcasts to ``(N, heads, L, keys)``; ``sizes`` are N, heads, L
    and S, before what is added to the keys."""
    N, H, L, S = sizes
    masks = []
    if attn_mask is not None:
        if attn_mask.shape not in ((L, S), (N * H, L, S)):
            raise ValueError(
                f"attn_mask must be of shape (L, S) = {(L, S)} or (N heads, L, S) = {(N * H, L, S)}, got "
                f"{tuple(attn_mask.shape)}."
            )
        masks.append(_additive(attn_mask, "attn_mask", dtype).view(-1, H if attn_mask.dim() == 3 else 1, L, S))
    if key_padding_mask is not None:
        if key_padding_mask.shape != (N, S):
            raise ValueError(f"key_padding_mask must be of shape (N, S) = {(N, S)}, got {(*key_padding_mask.shape,)}.")
        masks.append(_additive(key_padding_mask, "key_padding_mask", dtype).view(N, 1, 1, S))
    return F.pad(sum(masks[1:], masks[0]), (0, keys - S)) if masks else None


def _additive(mask: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"{name} must be boolean (True is left out) or floating-point (added), got {mask.dtype}.")
    return mask


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """Attended values ``(N, heads, L, d)``, and the weights ``(N, heads, L, S)``."""
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights
