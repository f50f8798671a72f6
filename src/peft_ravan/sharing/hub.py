"""Sharing an adapter on the Hub, with its card, its record and its LoRA twin."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn

from ..tuner.config import RavanConfig
from .adapter_files import ADAPTER_FILES, CARD_FILE, PROCESSING_FILES, RECORD_FILES, TWIN_FILES, TWIN_FOLDER
from .conversion import to_lora
from .federation_record import (
    FACTS_FILE,
    HISTORY_FILE,
    PLOT_FILE,
    FederationRecord,
    public_history,
    read_history,
    write_history,
)
from .model_card import card_of_folder, kept_metadata, name_on_hub
from .reading import adapter_folder, checked_folder, read_config


# what is shared of a folder: never checkpoints, optimizers, states of clients, pickled arguments; of the history, less
_SHARED_FILES = (*ADAPTER_FILES, FACTS_FILE, HISTORY_FILE, PLOT_FILE, CARD_FILE, *PROCESSING_FILES)
# of an earlier upload, what would belong to another adapter if this one does not have it
_REPLACED_FILES = (*RECORD_FILES, *TWIN_FILES)

_background = ThreadPoolExecutor(max_workers=1)  # one, so that commits come in the order in which they were asked for


class UploadError(RuntimeError):
    """An upload that was interrupted. The repository is as it was before."""


@dataclass(frozen=True)
class Destination:
    """
    Where an adapter is uploaded to, and how.

    Args:
        repo_id (`str`):
            The repository. It is made if there is none.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`):
            The message of the commit.
        private (`bool`, *optional*):
            Whether the repository is private, if it is made.
        token (`str` or `bool`, *optional*):
            The token, by default that of the login.
        revision (`str`, *optional*):
            The branch, by default `main`. It is made if there is none.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to make a pull request.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the end of the upload.
    """

    repo_id: str
    commit_message: str = "Upload adapter"
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    create_pr: bool = False
    blocking: bool = True


def push_to_hub(
    model_or_folder: nn.Module | str | os.PathLike,
    repo_id: str,
    *,
    adapter_name: str = "default",
    lora_twin: bool = True,
    commit_message: str = "Upload adapter",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    blocking: bool = True,
    **card_data,
) -> CommitInfo | Future[CommitInfo]:
    """
    Upload an adapter to the Hub: its files, its card, the record of the federation that trained it, if there is one, and
    its LoRA twin in the folder `lora`, which loads without peft-ravan. All files go into one commit, so an interrupted
    upload leaves the repository as it was, and can be run again.

    Of a folder, only the files of the adapter, the record, and those of a tokenizer or a processor are uploaded. In the
    record, clients are numbered, see [`~peft_ravan.sharing.federation_record.public_history`]; in the configuration, the path of a
    base model in a local folder is left out.

    Args:
        model_or_folder (`torch.nn.Module`, `str` or `os.PathLike`):
            The model with the adapter, or the folder of a saved one.
        repo_id (`str`):
            The repository, such as `"user/adapter"`. It is made if there is none.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Which adapter of the model, or of the folder, in which PEFT has given others than `"default"` one of their name.
        lora_twin (`bool`, *optional*, defaults to `True`):
            Whether to upload the LoRA twin of a Ravan adapter. If LoRA cannot express the adapter, there is a warning and
            no twin.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`):
            The message of the commit.
        private (`bool`, *optional*):
            Whether the repository is private, if it is made. By default as the account or the organization has it.
        token (`str` or `bool`, *optional*):
            The token, by default that of the login.
        revision (`str`, *optional*):
            The branch, by default `main`. It is made if there is none.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to make a pull request.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait for the end of the upload.
        **card_data:
            Metadata for the card, as [`~peft_ravan.sharing.model_card.make_model_card`] takes them.

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit, or a future of it with `blocking=False`.

    Raises:
        FileNotFoundError: if the folder lacks a file of an adapter.
        ValueError: if the model has no such adapter, if a file of the folder is damaged or a link that leads outside of it,
            or if `repo_id` or `card_data` do not suit the Hub.
        UploadError: if the upload was interrupted.
        HfHubHTTPError: if the Hub refuses it.

    Example:

        ```py
        >>> from peft_ravan import push_to_hub

        >>> push_to_hub("ravan-adapter", "user/ravan-adapter", license="apache-2.0", datasets="clinc/clinc_oos")
        ```
    """
    destination = Destination(repo_id, commit_message, private, token, revision, create_pr, blocking)
    twin_of = model_or_folder if lora_twin else None
    if not isinstance(model_or_folder, nn.Module):
        return push_folder(model_or_folder, destination, twin_of, adapter_name, **card_data)
    adapters = getattr(model_or_folder, "peft_config", {})
    if adapter_name not in adapters:
        raise ValueError(f"The model has no adapter {adapter_name!r}. Its adapters are {sorted(adapters)}.")
    with tempfile.TemporaryDirectory(prefix="peft-ravan-") as saved:
        model_or_folder.save_pretrained(saved, selected_adapters=[adapter_name])
        return push_folder(saved, destination, twin_of, adapter_name, **card_data)


def push_folder(
    folder: str | os.PathLike,
    destination: Destination,
    twin_of: nn.Module | str | os.PathLike | None,
    adapter_name: str = "default",
    **card_data,
) -> CommitInfo | Future[CommitInfo]:
    """
    Upload the folder of an adapter, as [`push_to_hub`] does, which has the errors, too.

    Args:
        folder (`str` or `os.PathLike`): The folder that the model was saved into, with its tokenizer or processor. What is
            uploaded is copied before this returns.
        destination ([`Destination`]): Where to.
        twin_of (`torch.nn.Module`, `str` or `os.PathLike`, *optional*):
            What the LoRA twin is made of: the folder, or the model, which it needs where the folder lacks the bases.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of that folder, and of that model.
        **card_data: As for [`push_to_hub`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit, or a future of it.
    """
    validate_repo_id(destination.repo_id)
    stage = tempfile.TemporaryDirectory(prefix="peft-ravan-")
    try:
        stage_files(folder, stage.name, adapter_name)
        if twin_of is not None:
            source = twin_of if isinstance(twin_of, nn.Module) else adapter_folder(folder, adapter_name)
            _stage_twin(source, adapter_name, Path(stage.name))
        card_of_folder(stage.name, repo_id=destination.repo_id, **card_data).save(Path(stage.name, CARD_FILE))
        for path in Path(stage.name).rglob(CONFIG_NAME):
            _set_base_model(path, card_data.get("base_model"))
    except BaseException:
        stage.cleanup()
        raise
    if destination.blocking:
        return _upload(stage, destination)
    return _background.submit(_upload, stage, destination)


def _shared_files(folder: Path, patterns: tuple[str, ...]) -> dict[Path, Path]:
    """What of a folder is shared: where it goes to, and where it is."""
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    for path in files:
        _check_is_inside(path, folder)
    return {path.relative_to(folder): path for path in files}


def stage_files(folder: str | os.PathLike, stage: str | os.PathLike, adapter_name: str = "default") -> None:
    """
    Copy what of the folder of an adapter is shared.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        stage (`str` or `os.PathLike`): The folder to copy into.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of the folder.

    Raises:
        FileNotFoundError: if the folder lacks a file of an adapter.
        ValueError: if a file is damaged, or is a link that leads outside of the folder. Nothing has been copied then.
    """
    own_folder = checked_folder(adapter_folder(folder, adapter_name))
    files = {**_shared_files(Path(folder), PROCESSING_FILES), **_shared_files(own_folder, _SHARED_FILES)}
    # all is checked where it is, so that errors name the files of the folder and not copies of them
    read_config(own_folder), FederationRecord.from_folder(own_folder), kept_metadata(own_folder / CARD_FILE)
    for name, path in files.items():
        copy = Path(stage, name)
        copy.parent.mkdir(exist_ok=True)
        if path.name == HISTORY_FILE:
            write_history(copy, public_history(read_history(path)))
        else:
            shutil.copyfile(path, copy)


def _check_is_inside(path: Path, folder: Path) -> None:
    """A folder may come from somebody else, and a link in it lead to a file that is nobody's business."""
    target, folder = path.resolve(), folder.resolve()
    # the cache of the Hub keeps the contents of all snapshots of a repository beside them, and links to them
    blobs = [root.parent / "blobs" for root in (folder, *folder.parents) if root.name == "snapshots"]
    blobs = [place for place in blobs if place.parent.name.startswith("models--") and place.resolve() == place]
    if not any(target.is_relative_to(place) for place in (folder, *blobs)):
        raise ValueError(
            f"{str(path)!r} is a link to {str(target)!r}, outside of the folder, and is not uploaded. Put a copy in the place "
            "of the link, or remove it."
        )


def _stage_twin(twin_of: nn.Module | str | os.PathLike, adapter_name: str, stage: Path) -> None:
    if not isinstance(PeftConfig.from_pretrained(str(stage)), RavanConfig):
        return
    try:
        to_lora(twin_of, stage / TWIN_FOLDER, adapter_name=adapter_name)
    except ValueError as error:
        warnings.warn(f"The adapter is uploaded without its LoRA twin. {error}")


def _set_base_model(path: Path, base_model: str | None) -> None:
    """Let a configuration name the base model, if it is on the Hub, and no path."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model or name_on_hub(config.get("base_model_name_or_path"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _upload(stage: tempfile.TemporaryDirectory, destination: Destination) -> CommitInfo:
    try:
        with stage:
            return _commit(Path(stage.name), destination)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise  # the Hub refuses it, and says why
        raise _interrupted(destination, error) from error
    except Exception as error:
        raise _interrupted(destination, error) from error


def _interrupted(destination: Destination, error: Exception) -> UploadError:
    return UploadError(
        f"The upload to {destination.repo_id!r} was interrupted ({type(error).__name__}: {error}). All files go into one "
        "commit, so none of them is there without the others. Push again; what has arrived is not sent twice."
    )


def _commit(stage: Path, destination: Destination) -> CommitInfo:
    api = HfApi(token=destination.token, library_name="peft-ravan")
    # with the owner, also where only the name was given
    repo_id = api.create_repo(destination.repo_id, private=destination.private, exist_ok=True).repo_id
    revision = destination.revision
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    staged = {path.relative_to(stage).as_posix(): path for path in files}
    stale = [
        name
        for name in api.list_repo_files(repo_id, revision=revision)
        if name in _REPLACED_FILES and name not in staged
    ]
    return api.create_commit(
        repo_id,
        # not `upload_folder`, which may spread the files over several commits
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in staged.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=destination.commit_message,
        revision=revision,
        create_pr=destination.create_pr,
    )
