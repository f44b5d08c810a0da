"""`--push-to-hub`: pushes a finished variant to the Hugging Face Hub, with the options of the Trainer.

After a failed push the variant is still complete in the run folder, and the same command pushes it again.
"""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

# The base class of errors of the HTTP library in use (httpx, later httpx2), imported there without `__all__`.
from huggingface_hub.errors import HTTPError as NetworkError  # type: ignore[attr-defined]

from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.manifest import CARD, check_complete

from .model_card import published_as

FOLDERS = {"checkpoint": "", "adapter": "adapter"}
"""Folders of a run that are published, with their paths in the repository."""

logger = logging.getLogger("deepinsert")


class PublishError(OSError):
    """The variant could not be pushed; it is complete in the run folder."""


def publish(options: FinetuneOptions) -> str:
    """Push the checkpoint, and an adapter of a published backbone, to `--hub-model-id`.

    A missing repository is created; `--hub-private-repo` makes it private.

    Returns:
        The address of the repository.

    Raises:
        PublishError: the Hub cannot be reached or refuses; the message says what to do.
        CheckpointError: a folder is damaged.
    """
    out = Path(options.out)
    repository = options.hub_model_id or repository_name(out)
    folders = {out / name: path for name, path in FOLDERS.items() if (out / name).is_dir()}
    if Path(options.backbone).is_dir() and folders.pop(out / "adapter", None) is not None:
        logger.warning(
            "%s is not pushed: it fits the model in %s, which other users do not have; the checkpoint "
            "contains both",
            out / "adapter",
            options.backbone,
        )
    for folder in folders:
        check_complete(folder)
    try:
        if constants.HF_HUB_OFFLINE:  # otherwise `create_repo` would try the network
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set: unset it to push")
        api = HfApi()
        # None means the default of the organisation, as in the Trainer.
        private = True if options.hub_private_repo else None
        repository_id = api.create_repo(repository, private=private, exist_ok=True).repo_id
        for folder, path in folders.items():
            push_folder(api, repository_id, folder, path)
    except (NetworkError, HFValidationError, OSError) as error:
        raise PublishError(
            f"--push-to-hub: {repository} could not be pushed: {failure_reason(error)}. The variant is safe "
            f"in {out / 'checkpoint'}; the same command pushes it again, without training"
        ) from error
    return f"{api.endpoint}/{repository_id}"


def push_folder(api: HfApi, repository_id: str, folder: Path, path_in_repo: str) -> None:
    """Push a folder's files in one commit, then its card, whose snippets load from the repository.

    Args:
        api: the client of the Hub.
        repository_id: the repository, as user/name.
        folder: the folder to push.
        path_in_repo: the folder in the repository; empty for its root.
    """
    api.upload_folder(
        repo_id=repository_id,
        folder_path=folder,
        path_in_repo=path_in_repo or None,
        ignore_patterns=[CARD, ".*"],
        commit_message=f"Upload {folder.name}",
    )
    card = folder / CARD
    if card.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            published_card = Path(temporary) / CARD
            text = published_as(card.read_text("utf-8"), repository_id, path_in_repo)
            published_card.write_text(text, "utf-8")
            api.upload_file(
                repo_id=repository_id,
                path_or_fileobj=published_card,
                path_in_repo=f"{path_in_repo}/{CARD}".lstrip("/"),
                commit_message=f"Upload the model card of {folder.name}",
            )


def repository_name(out: Path) -> str:
    """Return a repository name made from the run folder's name; the Hub adds the user's namespace."""
    return re.sub(r"[^\w.-]+", "-", out.resolve().name).strip("-.") or "deepinsert"


def failure_reason(error: Exception) -> str:
    """Return what went wrong and what to do about it, in one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "no valid token: log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == 403 or isinstance(error, (GatedRepoError, RepositoryNotFoundError)):
        return "the token has no right to write there: use one that has, or another --hub-model-id"
    if isinstance(error, OfflineModeIsEnabled):
        return str(error).splitlines()[0].rstrip(".")
    if isinstance(error, HFValidationError):
        return f"--hub-model-id: {' '.join(str(error).split()).rstrip('.')}"
    if isinstance(error, NetworkError) and status is None:
        return f"{constants.ENDPOINT} cannot be reached ({' '.join(str(error).split())})"
    return " ".join(str(error).split()).rstrip(".")
