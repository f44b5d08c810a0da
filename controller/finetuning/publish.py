"""`--push-to-hub`: a finished variant on the Hugging Face Hub, as the Trainer's users know it.

What fails there costs nothing here: the variant is in the run folder, and the same command pushes again.
"""

from __future__ import annotations

import re
import sys
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
from huggingface_hub.errors import HTTPError as NetworkError  # of the HTTP library in use, which changed

from deepinsert.controller.options import FinetuneOptions
from deepinsert.controller.runs.manifest import CARD, check_complete

from .model_card import published_as

FOLDERS = {"checkpoint": "", "adapter": "adapter"}
"""Folders of a run that are published, and where they go in the repository."""


class PublishError(OSError):
    """The variant could not be pushed; it is whole in the run folder."""


def publish(options: FinetuneOptions) -> str:
    """Push the checkpoint, and an adapter of a published backbone, to `--hub-model-id`; returns its address.

    The repository is made where there is none, private with `--hub-private-repo`. Raises `PublishError` with
    what to do where the Hub cannot be reached or refuses.
    """
    out = Path(options.out)
    wanted = options.hub_model_id or repository_name(out)
    folders = {out / name: place for name, place in FOLDERS.items() if (out / name).is_dir()}
    if Path(options.backbone).is_dir() and folders.pop(out / "adapter", None) is not None:
        print(
            f"{out / 'adapter'} is not pushed: it fits the model in {options.backbone}, which others do not "
            "have. The checkpoint holds both",
            file=sys.stderr,
        )
    for folder in folders:
        check_complete(folder)
    try:
        if constants.HF_HUB_OFFLINE:  # `create_repo` would try the network
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set: unset it to push")
        api = HfApi()
        # None leaves it to the organisation's own default, as in the Trainer.
        private = True if options.hub_private_repo else None
        repository = api.create_repo(wanted, private=private, exist_ok=True).repo_id
        for folder, place in folders.items():
            push_folder(api, repository, folder, place)
    except (NetworkError, HFValidationError, OSError) as error:
        raise PublishError(
            f"--push-to-hub: {wanted} could not be pushed: {reason(error)}. The variant is safe in "
            f"{out / 'checkpoint'}; the same command pushes it again, without training"
        ) from error
    return f"{api.endpoint}/{repository}"


def push_folder(api: HfApi, repository: str, folder: Path, place: str) -> None:
    """One commit with a folder's files, its card naming the repository to load from."""
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        path_in_repo=place or None,
        ignore_patterns=[CARD, ".*"],
        commit_message=f"Upload {folder.name}",
    )
    card = folder / CARD
    if card.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            told = Path(temporary) / CARD
            told.write_text(published_as(card.read_text("utf-8"), repository, place), "utf-8")
            api.upload_file(
                repo_id=repository,
                path_or_fileobj=told,
                path_in_repo=f"{place}/{CARD}".lstrip("/"),
                commit_message=f"Upload the model card of {folder.name}",
            )


def repository_name(out: Path) -> str:
    """A repository's name from the run folder's, as the Trainer takes it; the user's namespace is added."""
    return re.sub(r"[^\w.-]+", "-", out.resolve().name).strip("-.") or "deepinsert"


def reason(error: Exception) -> str:
    """What went wrong and what to do about it, in a line."""
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
