"""What the source code of a module's class does with the weights of its layers."""

import ast
import inspect
import textwrap
from functools import cache

# What may be read of `self.<leaf>.weight` without the layer being used as anything else than a linear map.
_HARMLESS_READS = {"dtype", "device", "shape", "size", "ndim"}


@cache
def weight_readers(owner: type) -> frozenset[str]:
    """Leaves whose ``self.<leaf>.weight`` or ``.bias`` the class uses as a tensor, as fused kernels do."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    outer = {id(node.value): node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    isinstance_arguments = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance"
        for argument in node.args
    }
    leaves = set()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr in ("weight", "bias")):
            continue
        layer = node.value
        if not (isinstance(layer, ast.Attribute) and getattr(layer.value, "id", None) == "self"):
            continue
        harmless = id(node) in outer and outer[id(node)].attr in _HARMLESS_READS
        if not harmless and id(node) not in isinstance_arguments:
            leaves.add(layer.attr)
    return frozenset(leaves)


@cache
def weight_writes(cls: type) -> frozenset[str]:
    """Paths such as ``attention.output`` of layers of whose blocks the class changes the weight in place, as in
    ``block.attention.output.weight.div_(2)``, beside initialising them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    initial = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "_init_weights", "reset_parameters")
        for inner in ast.walk(node)
    }
    calls = (n.func for n in ast.walk(tree) if isinstance(n, ast.Call) and id(n) not in initial)
    functions = (f for f in calls if isinstance(f, ast.Attribute) and f.attr.endswith("_") and f.attr[0] != "_")
    paths = (ast.unparse(f.value).split(".") for f in functions if isinstance(f.value, ast.Attribute))
    return frozenset(".".join(p[1:-1]) for p in paths if p[-1] == "weight" and p[0] != "self" and len(p) > 2)
