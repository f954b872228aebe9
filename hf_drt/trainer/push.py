"""Publishing during training: what lies on the Hub always loads, and a push that fails costs nothing but itself."""

import fnmatch
import logging
import shlex
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from hf_drt.export import model_files
from hf_drt.schedule import Plan
from hf_drt.trainer.saving import CHECKPOINT_FILES
from hf_drt.trainer.write_errors import is_write_error, remedy

logger = logging.getLogger(__name__)

ATTEMPTS, PAUSE = 3, 2.0  # tries of one upload, and seconds before the second one; doubled for the third
# What lies in output_dir and is no part of the model; the last one is a checkpoint that is being replaced.
_IGNORED = ("_*", f"{PREFIX_CHECKPOINT_DIR}-*", f".{PREFIX_CHECKPOINT_DIR}-*")


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


def in_progress(upload: Future) -> PushInProgress:
    """A job in the background, as the Trainer keeps it."""
    return PushInProgress([upload])  # type: ignore[reportArgumentType]  # annotated as one job, used as their list


class Publisher:
    """Sends a trainer's checkpoints to the Hub in the background, by ``args.hub_strategy``.

    A push replaces what an earlier one has left of a model or a checkpoint, by the names of its files; any other file
    of the repository stays. What is replaced or deleted remains in the history of the repository.

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
        uploads = [Upload(Path(self._args.output_dir), None, message, tag)] if self._exported(step) else []
        if self._args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self._args.hub_strategy == HubStrategy.CHECKPOINT
            name = "last-checkpoint" if last else Path(checkpoint).name
            uploads.append(Upload(Path(checkpoint), name, f"{message}, checkpoint"))
        due = self._due(uploads)
        return self._start(repository, due) if due else None

    def _exported(self, step: int) -> bool:
        try:
            self._export(self._args.output_dir)
            return True
        except Exception as error:  # a full disk, an unreachable Hub: the checkpoint is safe, training goes on
            why = remedy(Path(self._args.output_dir, "model"), error) if is_write_error(error) else ""
            logger.error(
                "the model of step %d is not on the Hub, since it could not be exported: %s. %sPush it by hand: "
                "trainer.push_to_hub()",
                step, self._clean(error), f"{why} " if why else "",
            )  # fmt: skip
            self._failed = [old for old in self._failed if old.path is not None]  # half of it has been written over
            return False

    def finish(self, repository: str) -> None:
        """Try what has failed once more, and say what is not on the Hub then."""
        if self._failed:
            self._run(HfApi(), repository, self._due([]))
        for upload in self._failed:
            logger.error("%s is not on the Hub. Push it by hand: %s", upload.folder, self._command(repository, upload))

    def make_branch(self, repository: str) -> None:
        """Make ``hub_revision`` if it is a branch that does not exist: the Hub takes no commit on such a one.

        Raises:
            HfHubHTTPError: The Hub refuses it.
        """
        branch = self._args.hub_revision
        if branch is not None and not branch.startswith("refs/"):
            HfApi().create_branch(repository, branch=branch, token=self._token, exist_ok=True)

    def clear(self, repository: str, revision: str | None, token: str | None = None) -> None:
        """Delete model files from the root that ``output_dir`` does not have: those of a push in another form. They
        remain in the repository's history."""
        api, folder = HfApi(), Path(self._args.output_dir)
        options = {"revision": revision, "token": token or self._token}
        try:
            stored = api.list_repo_files(repository, **options)
            stale = [file for file in stored if _is_model_file(file) and not (folder / file).is_file()]
            if stale:
                api.delete_files(repository, stale, commit_message="Delete the model of an earlier form", **options)
        except Exception as error:  # the model itself is there
            logger.error("files of an earlier push may be left in %s: %s", repository, self._clean(error))

    def _due(self, uploads: list[Upload]) -> list[Upload]:
        """What has failed before goes first, unless it is gone, or a newer upload goes to the same place."""
        places = {upload.path for upload in uploads}
        again = [old for old in self._failed if old.folder.is_dir() and old.path not in places]
        for old in self._failed:
            if old.tag is not None and old not in again:
                logger.error(
                    "the revision %s is not on the Hub: its push failed, and a later one takes its place.", old.tag
                )
        self._failed = []
        return again + uploads

    def _start(self, repository: str, uploads: list[Upload]) -> PushInProgress:
        api = HfApi()
        return in_progress(api.run_as_future(self._run, api, repository, uploads))

    def _run(self, api: HfApi, repository: str, uploads: list[Upload]) -> None:
        for upload in uploads:
            if not self._sent(api, repository, upload):
                self._failed.append(upload)

    def _sent(self, api: HfApi, repository: str, upload: Upload) -> bool:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._send(api, repository, upload)
                return True
            except Exception as error:  # whatever a network or a server comes up with
                again = f"; attempt {attempt} of {ATTEMPTS}"
                logger.warning("the push of %s failed: %s%s", upload.folder, self._clean(error), again)
            if not upload.folder.is_dir():  # by save_total_limit
                logger.warning("%s was deleted before it was on the Hub.", upload.folder)
                return True
            if attempt < ATTEMPTS:
                time.sleep(PAUSE * 2 ** (attempt - 1))
        return False

    def _send(self, api: HfApi, repository: str, upload: Upload) -> None:
        token, branch = self._token, self._args.hub_revision
        root = upload.path is None
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=upload.folder,
            path_in_repo=upload.path,
            commit_message=upload.message,
            token=token,
            revision=branch,
            ignore_patterns=list(_IGNORED) if root else None,
            # What is not uploaded now is of an earlier push.
            delete_patterns=list(model_files() if root else CHECKPOINT_FILES),
        )
        if upload.tag is not None:
            self._tag(api, repository, upload.tag, commit.oid)

    def _tag(self, api: HfApi, repository: str, tag: str, commit: str) -> None:
        options = {"tag": tag, "token": self._token}
        try:
            api.create_tag(repository, revision=commit, **options)
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.CONFLICT:
                raise
            api.delete_tag(repository, **options)  # of an earlier run
            api.create_tag(repository, revision=commit, **options)

    def _command(self, repository: str, upload: Upload) -> str:
        words = ["hf", "upload", repository, str(upload.folder), upload.path or "."]
        if self._args.hub_revision is not None:
            words += ["--revision", self._args.hub_revision]
        if upload.path is None:
            words += [word for pattern in _IGNORED for word in ("--exclude", pattern)]
        return shlex.join(words)

    def _clean(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}".strip()
        token = self._token or get_token()
        return text.replace(token, "***") if token else text


def _is_model_file(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in model_files())


def phase_tag(plan: Plan, step: int) -> str | None:
    """``phase-1-dense`` if a phase ends after ``step`` update steps, else None."""
    index = plan.index_at(max(step - 1, 0))
    return f"phase-{index}-{plan.phases[index].kind}" if step == plan.end_of(index) else None
