"""The folder that a command writes a model to, and what goes along with the model."""

import shutil
from pathlib import Path

# What lies beside the weights of a model and belongs to it; a checkpoint's optimizer, states and card do not.
_BESIDE = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "preprocessor_config.json", "processor_config.json", "feature_extractor*",
)  # fmt: skip


def refuse_full(target: Path) -> None:
    """Raise where there is something that would be written over.

    Raises:
        ValueError: The target is a file, or a folder with files.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder. Give another target, or remove it.")


def copy_beside(folder: Path, target: Path) -> None:
    """Copy the files of tokenizer and processor."""
    for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern) if path.is_file()}):
        shutil.copy(path, target / path.name)
