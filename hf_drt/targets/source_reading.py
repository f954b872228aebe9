"""What the source code of a module's class does with the weights of its layers, besides calling the layers.

Counted is what a forward pass can reach: ``forward`` and ``__call__``, the methods that these name, of their own object
or of another module of the model, and functions and callable attributes that they hand the object to. A method is
looked up as Python does it, in the order of the class's bases. Where a name is only known at run time
(``getattr(self, name)``), and in classes without a forward of their own, all methods count.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import FunctionType
from typing import Any, TypeGuard

from torch import nn

from hf_drt.forms import SplitAttention

# What may be read of `self.<leaf>.weight` without the layer being used as anything else than a linear map.
_HARMLESS_READS = {"dtype", "device", "shape", "size", "ndim"}
_ENTRIES = ("forward", "__call__")
_INITIAL = {"__init__", "_init_weights", "reset_parameters"}
_FRAMEWORK = (nn.Module, object)
# Its forward pass hands the weights to a kernel only if none of them has a __torch_function__, as low-rank ones do.
_ASKS_FIRST = nn.TransformerEncoderLayer

_Code = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass
class Reading:
    """What was found in the source code of one class.

    ``readers``: for each leaf whose ``self.<leaf>.weight`` or ``.bias`` is used as a tensor, as fused kernels do, the
    function that does so. ``written``: paths such as ``attention.output`` of layers of whose blocks the weight is
    changed in place, as in ``block.attention.output.weight.div_(2)``. ``unread``: functions without source code.
    ``named``: attributes that are named of other objects.
    """

    readers: dict[str, str] = field(default_factory=dict)
    written: set[str] = field(default_factory=set)
    unread: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)


def readings(model: nn.Module) -> dict[int, Reading]:
    """What the class of each module does with weights, by the module's id."""
    kinds = {id(module): (type(module), _helpers(module)) for module in model.modules()}
    named: frozenset[str] = frozenset()
    while True:
        found = {kind: _of_class(*kind, named & _Methods.of(kind[0]).names) for kind in set(kinds.values())}
        more = named.union(*(reading.named for reading in found.values()))
        if more == named:
            return {key: found[kind] for key, kind in kinds.items()}
        named = more


def _helpers(module: nn.Module) -> tuple[tuple[str, type], ...]:
    """Attributes of a module, by name and class, that it may hand itself to."""
    values = vars(module).items()
    return tuple((name, type(v)) for name, v in values if callable(v) and not isinstance(v, (type, FunctionType)))


@dataclass(frozen=True)
class _Piece:
    """A function, the name that it has for the object, and at which of the class's bases it was found."""

    function: Callable
    alias: str | None
    depth: int | None = None


@cache
def _of_class(cls: type, helpers: tuple[tuple[str, type], ...], called: frozenset[str]) -> Reading:
    if cls is SplitAttention:  # reads weights for others alone, as the packed parameters that they ask for
        return Reading()
    found, seen, own = Reading(), set(), _Methods.of(cls)
    waiting = own.entries(called)
    while waiting:
        piece = waiting.pop()
        if piece in seen:
            continue
        seen.add(piece)
        name = getattr(piece.function, "__qualname__", repr(piece.function))
        try:
            tree = _tree(inspect.unwrap(piece.function))
        except (OSError, TypeError, SyntaxError):
            found.unread.append(name)
            continue
        alias = piece.alias or _first_parameter(tree)
        found.written |= set(_written(tree))
        found.named |= set(_named_of_others(tree, alias))
        if not own.asks_first(piece):
            found.readers |= dict.fromkeys(_read(tree, alias), name) | found.readers
        waiting += own.named_in(tree, alias, piece.depth)
        waiting += _enclosed(piece)
        waiting += _receivers(tree, alias, piece.function, dict(helpers))
    return found


class _Methods:
    """The methods of a class, by name and by the place of their definition among its bases."""

    def __init__(self, cls: type):
        self.bases = [base for base in cls.__mro__ if base not in _FRAMEWORK]
        self.names = {name for base in self.bases for name in vars(base)} - _INITIAL

    @staticmethod
    @cache
    def of(cls: type) -> "_Methods":
        return _Methods(cls)

    def entries(self, called: frozenset[str]) -> list[_Piece]:
        """``forward``, ``__call__`` and what others call, or all methods where the class has no forward of its own."""
        pieces = [piece for name in {*_ENTRIES, *called} for piece in self.find(name)]
        return pieces if any(self.find("forward")) else self.all()

    def all(self) -> list[_Piece]:
        return [piece for name in self.names for piece in self.find(name)]

    def find(self, name: str, start: int = 0) -> Iterator[_Piece]:
        """The functions behind a name at the first base, from ``start`` on, that has it."""
        for depth, base in enumerate(self.bases[start:], start):
            if name in vars(base):
                yield from (_Piece(function, None, depth) for function in _functions(vars(base)[name]))
                return

    def named_in(self, tree: ast.AST, alias: str, depth: int | None) -> Iterator[_Piece]:
        """The methods that code names: in quotes, as attributes of super() or of a base, or of anything with a name,
        since the object may have several."""
        bases = {base.__name__: index for index, base in enumerate(self.bases)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self.find(node.value)
            elif _is_open_lookup(node, alias):
                yield from self.all()
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                yield from self.find(node.attr, bases.get(node.value.id, 0))
            elif isinstance(node, ast.Attribute) and _calls(node.value, "super") and depth is not None:
                yield from self.find(node.attr, depth + 1)

    def asks_first(self, piece: _Piece) -> bool:
        return piece.depth is not None and self.bases[piece.depth] is _ASKS_FIRST


def _functions(value: Any) -> Iterator[Callable]:
    """The functions behind what stands in a class under a method's name; what is no method has none."""
    match value:
        case property():
            yield from filter(None, (value.fget, value.fset))
        case staticmethod() | classmethod():
            yield value.__func__
        case functools.partial() | functools.partialmethod() | functools.cached_property():
            yield value.func
        case _ if callable(value) and not isinstance(value, (type, nn.Module)):
            yield value if inspect.isroutine(value) else type(value).__call__


@cache
def _tree(function: Callable) -> _Code:
    """The function's code; in front of it a line that gives its indentation a reason.

    Raises:
        OSError, TypeError, SyntaxError: It has no source code, or none that is a function's.
    """
    source = inspect.getsource(function)
    tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    code = next((node for node in ast.walk(tree) if isinstance(node, _Code)), None)
    if code is None:
        raise TypeError(f"the source code of {function!r} holds no function")
    return code


def _first_parameter(tree: _Code) -> str:
    parameters = [*tree.args.posonlyargs, *tree.args.args]
    return parameters[0].arg if parameters else ""


def _enclosed(piece: _Piece) -> Iterator[_Piece]:
    """Functions inside another, as of a decorator that does not tell what it wraps."""
    for cell in getattr(inspect.unwrap(piece.function), "__closure__", None) or ():
        try:
            value = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if isinstance(value, FunctionType):
            yield _Piece(value, None, piece.depth)


def _receivers(tree: ast.AST, alias: str, function: Callable, helpers: dict[str, type]) -> Iterator[_Piece]:
    """What code hands the object to: functions of its module, and callable attributes of the object."""
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        target = call.func
        if isinstance(target, ast.Name) and isinstance(scope.get(target.id), FunctionType):
            receiver, first = scope[target.id], 0
        elif isinstance(target, ast.Attribute) and _is_name(target.value, alias) and target.attr in helpers:
            receiver, first = helpers[target.attr].__call__, 1
        else:
            continue
        parameters = list(inspect.signature(receiver).parameters)[first:]
        given = [*zip(parameters, call.args, strict=False), *((word.arg, word.value) for word in call.keywords)]
        yield from (_Piece(receiver, name) for name, value in given if name and _is_name(value, alias))


def _named_of_others(tree: ast.AST, alias: str) -> Iterator[str]:
    """Names of the methods that code calls, or takes to hand them on, of what stands in the object's attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_name(node.value, alias):
            yield node.attr


def _read(tree: ast.AST, alias: str) -> Iterator[str]:
    """Leaves whose weight or bias is used as a tensor."""
    outer = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    asked = {id(argument) for node in ast.walk(tree) if _calls(node, "isinstance") for argument in node.args}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")):
            continue
        layer = node.value
        if not (isinstance(layer, ast.Attribute) and _is_name(layer.value, alias)):
            continue
        harmless = id(node) in outer and outer[id(node)].attr in _HARMLESS_READS
        if not harmless and id(node) not in asked:
            yield layer.attr


def _written(tree: ast.AST) -> Iterator[str]:
    """Paths of layers below another object whose weight is changed in place."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    functions = (f for f in calls if isinstance(f, ast.Attribute) and f.attr.endswith("_") and f.attr[0] != "_")
    paths = (ast.unparse(f.value).split(".") for f in functions if isinstance(f.value, ast.Attribute))
    return (".".join(p[1:-1]) for p in paths if p[-1] == "weight" and p[0] != "self" and len(p) > 2)


def _is_open_lookup(node: ast.AST, alias: str) -> bool:
    """Whether code looks up a name of the object that is only known at run time."""
    if not (_calls(node, "getattr") and len(node.args) > 1 and _is_name(node.args[0], alias)):
        return False
    return not isinstance(node.args[1], ast.Constant)


def _calls(node: ast.AST, name: str) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and _is_name(node.func, name)


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
