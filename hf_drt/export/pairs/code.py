"""What lies beside the weights of a model in linear pairs: a file of code, and its entries in ``config.json``."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import CONFIG_NAME

from hf_drt.export.pairs import modeling
from hf_drt.export.pairs.modeling import LinearPairs

FILE_NAME = "modeling_linear_pairs.py"
RANKS = "linear_pairs"
"""Entry of ``config.json``: the rank of each pair, by the name of its layer."""

_IMPORTS = "import torch\nfrom torch import nn\n"
_CODE = '''\
"""{base} with some linear layers as two of low rank.

Written by hf_drt, which it does not need: from_pretrained(folder, trust_remote_code=True) reads the names of the layers
and their ranks from "{ranks}" in config.json.
"""

{imports}from transformers import {base}
{classes}

class {name}(LinearPairs, {base}):
    """{base}, its layers in config.{ranks} as pairs."""
'''


def paired_name(cls: type) -> str:
    """Name of the class with pairs."""
    return f"{LinearPairs.__name__}{cls.__name__}"


def paired_base(architectures: Sequence[str] | None) -> type | None:
    """The class of transformers behind the name of a class with pairs; None where there is none."""
    names = (name.removeprefix(LinearPairs.__name__) for name in architectures or ())
    return next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)


def paired_class(cls: type) -> type:
    """The class with pairs of a class of transformers, as :func:`write_code` writes it."""
    return type(paired_name(cls), (LinearPairs, cls), {"__module__": __name__})


@cache
def auto_classes(name: str) -> tuple[str, ...]:
    """Those of transformers' ``AutoModel...`` that load a model class of this name."""
    from transformers.models.auto import modeling_auto  # not on import: it takes a second
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    autos = {
        key: value
        for key, value in vars(modeling_auto).items()
        if isinstance(value, type) and issubclass(value, _BaseAutoModelClass) and key.startswith("AutoModel")
    }
    return tuple(sorted(key for key, auto in autos.items() if name in _names(auto)))


def _names(auto: Any) -> set[str]:
    """Of the model classes that an Auto class loads."""
    mapping = getattr(auto._model_mapping, "_model_mapping", {})  # model type -> one name, or several
    return {name for names in mapping.values() for name in ([names] if isinstance(names, str) else names)}


def write_code(folder: Path, cls: type, ranks: dict[str, int]) -> None:
    """Write the file of code, and enter it into the ``config.json`` that lies in the folder."""
    _, classes = Path(modeling.__file__).read_text().split(_IMPORTS)
    code = _CODE.format(base=cls.__name__, ranks=RANKS, imports=_IMPORTS, classes=classes, name=paired_name(cls))
    (folder / FILE_NAME).write_text(code)
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    reference = f"{Path(FILE_NAME).stem}.{paired_name(cls)}"
    config["architectures"] = [paired_name(cls)]
    config["auto_map"] = config.get("auto_map", {}) | dict.fromkeys(auto_classes(cls.__name__), reference)
    config[RANKS] = ranks
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
