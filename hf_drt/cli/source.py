"""What a command was given as its model: a folder, a ``config.json``, or a name on the Hub."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from hf_drt.checkpoint import STATE_NAME, CheckpointError, read_state

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_PREFIX = "AutoModelFor"
_GIVE = "Give the folder of a model, or a repository user/name."


def read_config(source: str) -> PretrainedConfig:
    """The configuration of a model.

    Args:
        source: A folder with ``config.json``, that file itself, or a repository ``user/name``.

    Raises:
        CheckpointError: There is no such path, it is no model, or it cannot be read or fetched.
    """
    path = Path(source)
    folder = path.parent if path.suffix == ".json" else path
    if not path.exists():
        _check_name(source)
    elif not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no config.json. {_GIVE}")
    try:
        return AutoConfig.from_pretrained(str(folder) if path.exists() else source)
    except Exception as error:  # OSError, ValueError, KeyError and those of the Hub's client
        problem = f"{folder / 'config.json'} cannot be read ({_first_line(error)}). {_GIVE}"
        raise CheckpointError(problem if path.exists() else _not_fetched(source, error)) from None


def local_folder(source: str) -> Path:
    """The folder or file itself; of a repository on the Hub what is, or becomes, its copy in the cache.

    Raises:
        CheckpointError: There is no such path, or it could not be fetched.
    """
    if Path(source).exists():
        return Path(source)
    _check_name(source)
    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # those of the Hub's client are of many kinds
        raise CheckpointError(_not_fetched(source, error)) from None


def _check_name(source: str) -> None:
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((".json", ".safetensors")):
        raise CheckpointError(f"there is no such path: {source}. {_GIVE}")


def _not_fetched(source: str, error: Exception) -> str:
    return f"there is no folder {source} here, and it could not be fetched from the Hub ({_first_line(error)}). {_GIVE}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def has_weights(source: str) -> bool:
    """Whether there are trained weights: a repository on the Hub has some."""
    path = Path(source)
    folder = path.parent if path.suffix == ".json" else path
    return not folder.exists() or any(next(folder.glob(pattern), None) for pattern in _WEIGHTS)


def guessed_task(config: PretrainedConfig) -> str | None:
    """'causal-lm' where a configuration names no architecture, and its kind has a causal language model; else None."""
    return None if config.architectures or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING else "causal-lm"


def model_class(config: PretrainedConfig, task: str | None) -> type:
    """The class of the model: of a task such as 'causal-lm', or the one that the configuration names.

    Raises:
        ValueError: The task is unknown, or the configuration names no class of transformers.
    """
    if task is not None:
        tasks = {name.removeprefix(_PREFIX).lower(): name for name in dir(transformers) if name.startswith(_PREFIX)}
        name = tasks.get(task.replace("-", "").lower())
        if name is None:
            raise ValueError(f"'{task}' is not a task; allowed are e.g. causal-lm, masked-lm, seq2seq-lm, "
                             "sequence-classification, token-classification, image-classification.")  # fmt: skip
        return getattr(transformers, name)
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    from hf_drt.export import RANKS, paired_base, paired_class  # here, since it imports torchao where that is installed

    if RANKS in vars(config) and (base := paired_base(config.architectures)) is not None:
        return paired_class(base)  # hf_drt's own: no code of the folder is run
    raise ValueError(
        f"the configuration names the architectures {config.architectures}, of which transformers has none. Name a "
        "task, e.g. --task causal-lm."
    )


def build(config: PretrainedConfig, task: str | None, dtype: torch.dtype, meta: bool, checkpointing: bool) -> nn.Module:
    """A model of a configuration, dense, with random weights; or on the meta device, with none.

    Raises:
        ValueError: As :func:`model_class`, or the architecture does not take the configuration.
    """
    cls, config = model_class(config, task), copy.deepcopy(config)  # which is what the next model is made of
    for own in ("quantization_config",):  # a native checkpoint's low-rank layers
        if hasattr(config, own):
            delattr(config, own)
    make: Any = cls.from_config if cls.__name__.startswith("AutoModel") else cls._from_config
    try:
        with torch.device("meta" if meta else "cpu"):
            model = make(config, dtype=dtype)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{cls.__name__} cannot be made of this configuration: {error}.") from None
    if checkpointing:
        model.config.use_cache = False
        model.activation_checkpointing_enable()
    return model


def load(folder: Path, task: str | None) -> nn.Module:
    """The model of a folder, in the forms that its layers are stored in, in evaluation mode.

    Raises:
        CheckpointError: It cannot be loaded: damaged, of a newer format, or of another task.
        ValueError: As :func:`model_class`.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file. A model is loaded from its folder, with config.json beside it.")
    cls = model_class(read_config(str(folder)), task)
    if (folder / STATE_NAME).is_file():
        read_state(folder)
    try:
        return cls.from_pretrained(folder).eval()
    except CheckpointError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as {cls.__name__}: {error}") from None
