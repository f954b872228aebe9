"""What is swept: every model type of which the installed transformers has a model class."""

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

# Types for which AutoModel names the class of a part, which does not take the configuration of the whole.
WHOLE = {
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}


def model_types() -> dict[str, str]:
    """Model types of all Auto mappings, in alphabetical order, with the name of the class that stands for each.

    The class is that of ``AutoModel``; where a type has none, that of the first other mapping that knows the type. A
    part with a configuration of its own (``clip_vision_model``) is a type of its own, as in transformers.
    """
    found: dict[str, str] = {}
    for name in _mappings():
        for model_type, classes in getattr(modeling_auto, name).items():
            found.setdefault(model_type, classes if isinstance(classes, str) else classes[0])
    return dict(sorted((found | WHOLE).items()))


def _mappings() -> list[str]:
    """Names of the mappings from model type to class, AutoModel's first, then those of whole models before heads."""
    first = ("MODEL_MAPPING_NAMES", "MODEL_FOR_PRETRAINING_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    others = (n for n in dir(modeling_auto) if n.startswith("MODEL_FOR_") and n.endswith("_MAPPING_NAMES"))
    return list(dict.fromkeys([*first, *others]))


def model_class(name: str) -> type:
    """The class; transformers exports nearly all of them, the others are found in their modules.

    Raises:
        ImportError: It needs a package that is not installed.
        AttributeError: transformers has no such class.
    """
    return getattr(transformers, name)


def module_of(model_type: str) -> str:
    """The module of ``transformers.models`` that a type is part of: 'clip' for ``clip_vision_model``."""
    return model_type_to_module_name(model_type)
