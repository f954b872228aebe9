"""Publishing during training: what lies on the Hub always loads, and a push that fails costs nothing but itself."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from hf_drt.schedule import Plan

logger = logging.getLogger(__name__)

ATTEMPTS, PAUSE = 3, 2.0  # tries of one upload, and seconds before the second one; doubled for the third


@dataclass(frozen=True)
class Upload:
    """A folder on its way to the repository.

    Attributes:
        folder: What is uploaded.
        path: Where it goes; None is the root.
        message: Of the commit.
        tag: Name that the commit gets as a revision, if any.
    """

    folder: Path
    path: str | None
    message: str
    tag: str | None = None


class Publisher:
    """Sends a trainer's checkpoints to the Hub in the background, by ``args.hub_strategy``.

    The root of the repository holds the model as ``drt_export`` says; ``checkpoint`` and ``all_checkpoints`` add the
    checkpoint itself, from which training goes on. Nothing here raises: what fails is tried again, then logged, and
    sent once more with the next push and at the end of training.

    Args:
        args: The trainer's arguments; their ``hub_token`` appears in no message.
        export: Writes the model, as it is published, and its card into a folder.
    """

    def __init__(self, args: Any, export: Callable[[str], None]):
        self._args = args
        self._token = args.hub_token  # the arguments lose theirs while they are being saved
        self._export = export
        self._failed: list[Upload] = []

    def push(self, repository: str, checkpoint: str, step: int, tag: str | None) -> PushInProgress | None:
        """Publish the state of a checkpoint; returns at once.

        Args:
            repository: ``user/name``.
            checkpoint: The ``checkpoint-N`` folder.
            step: Update steps made.
            tag: Name of the phase that has just ended, if it shall be a revision.
        """
        message = f"Training in progress, step {step}"
        try:
            self._export(self._args.output_dir)
        except Exception as error:  # a full disk, an unreachable Hub: the checkpoint is safe, training goes on
            logger.warning("nothing is pushed at step %d: %s", step, self._clean(error))
            return None
        uploads = [Upload(Path(self._args.output_dir), None, message, tag)]
        if self._args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self._args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else Path(checkpoint).name
            uploads.append(Upload(Path(checkpoint), name, f"{message}, checkpoint"))
        return self._start(repository, self._due(uploads))

    def finish(self, repository: str) -> None:
        """Try what has failed once more, and say what is not on the Hub then."""
        if self._failed:
            self._run(HfApi(), repository, self._due([]))
        for upload in self._failed:
            logger.error(
                "%s is not on the Hub. Push it by hand: hf upload %s %s %s",
                upload.folder, repository, upload.folder, upload.path or ".",
            )  # fmt: skip

    def _due(self, uploads: list[Upload]) -> list[Upload]:
        """What has failed before goes first, unless it is gone, or a newer upload goes to the same place."""
        places = {upload.path for upload in uploads}
        again = [old for old in self._failed if old.folder.is_dir() and old.path not in places]
        self._failed = []
        return again + uploads

    def _start(self, repository: str, uploads: list[Upload]) -> PushInProgress:
        api = HfApi()
        return PushInProgress([api.run_as_future(self._run, api, repository, uploads)])

    def _run(self, api: HfApi, repository: str, uploads: list[Upload]) -> None:
        for upload in uploads:
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._send(api, repository, upload)
                    break
                except Exception as error:  # whatever a network or a server comes up with
                    again = f"; attempt {attempt} of {ATTEMPTS}"
                    logger.warning("the push of %s failed: %s%s", upload.folder, self._clean(error), again)
                    if attempt == ATTEMPTS:
                        self._failed.append(upload)
                    else:
                        time.sleep(PAUSE * 2 ** (attempt - 1))

    def _send(self, api: HfApi, repository: str, upload: Upload) -> None:
        token, branch = self._token, self._args.hub_revision
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=upload.folder,
            path_in_repo=upload.path,
            commit_message=upload.message,
            token=token,
            revision=branch,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"] if upload.path is None else None,
        )
        if upload.tag is not None:
            api.create_tag(repository, tag=upload.tag, revision=commit.oid, token=token, exist_ok=True)

    def _clean(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}".strip()
        return text.replace(self._token, "***") if self._token else text


def phase_tag(plan: Plan, step: int) -> str | None:
    """``phase-1-dense`` if a phase ends after ``step`` update steps, else None."""
    index = plan.index_at(max(step - 1, 0))
    return f"phase-{index}-{plan.phases[index].kind}" if step == plan.end_of(index) else None
