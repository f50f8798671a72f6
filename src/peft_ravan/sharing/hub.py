"""Sharing an adapter on the Hub, with its model card, its federation record and its LoRA twin."""

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


# the files of a folder that are shared: never checkpoints, optimizers, client states or pickled arguments, and of the
# history only the public part
_SHARED_FILES = (*ADAPTER_FILES, FACTS_FILE, HISTORY_FILE, PLOT_FILE, CARD_FILE, *PROCESSING_FILES)
# files of an earlier upload that would belong to another adapter if this one does not have them
_REPLACED_FILES = (*RECORD_FILES, *TWIN_FILES)

_background = ThreadPoolExecutor(max_workers=1)  # one worker, so that commits keep their order


class UploadError(RuntimeError):
    """An upload was interrupted. The repository is unchanged."""


@dataclass(frozen=True)
class Destination:
    """
    Where an adapter is uploaded to, and how.

    Args:
        repo_id (`str`):
            The repository. It is created if it does not exist.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`):
            The message of the commit.
        private (`bool`, *optional*):
            Whether to make the repository private if it is created.
        token (`str` or `bool`, *optional*):
            The token, by default the one from the login.
        revision (`str`, *optional*):
            The branch, by default `main`. It is created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait until the upload is finished.
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
    Upload an adapter to the Hub: its files, its model card, the record of the federation that trained it, if there is
    one, and its LoRA twin in the folder `lora`, which loads without peft-ravan. All files go into one commit, so an
    interrupted upload leaves the repository unchanged and can be repeated.

    From a folder, only the files of the adapter, the record, and the files of a tokenizer or a processor are uploaded.
    In the record, client names are replaced by numbers, see [`~peft_ravan.sharing.federation_record.public_history`].
    In the configuration, the path of a base model in a local folder is left out.

    Args:
        model_or_folder (`torch.nn.Module`, `str` or `os.PathLike`):
            The model with the adapter, or the folder of a saved adapter.
        repo_id (`str`):
            The repository, such as `"user/adapter"`. It is created if it does not exist.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter in the model, or in the folder. PEFT saves adapters other than `"default"` in a
            subfolder of their name.
        lora_twin (`bool`, *optional*, defaults to `True`):
            Whether to upload the LoRA twin of a Ravan adapter. If LoRA cannot express the adapter, there is a warning and
            no twin.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`):
            The message of the commit.
        private (`bool`, *optional*):
            Whether to make the repository private if it is created. By default the setting of the account or the
            organization is used.
        token (`str` or `bool`, *optional*):
            The token, by default the one from the login.
        revision (`str`, *optional*):
            The branch, by default `main`. It is created if it does not exist.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request.
        blocking (`bool`, *optional*, defaults to `True`):
            Whether to wait until the upload is finished.
        **card_data:
            Metadata for the card, as for [`~peft_ravan.sharing.model_card.make_model_card`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: The commit, or with `blocking=False` a future of it.

    Raises:
        FileNotFoundError: if a file of the adapter is missing from the folder.
        ValueError: if the model has no such adapter, if a file of the folder is damaged or is a link to a place
            outside of it, or if `repo_id` or `card_data` are not valid on the Hub.
        UploadError: if the upload was interrupted.
        HfHubHTTPError: if the Hub refuses the upload.

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
    Upload the folder of an adapter, as [`push_to_hub`] does. It raises the same errors.

    Args:
        folder (`str` or `os.PathLike`): The folder that the model was saved to, with its tokenizer or processor. The
            files to upload are copied before this function returns.
        destination ([`Destination`]): Where to upload it.
        twin_of (`torch.nn.Module`, `str` or `os.PathLike`, *optional*):
            What to make the LoRA twin from: the folder, or the model, which is needed if the folder does not contain
            the bases.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter in that folder and model.
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
    """The files of a folder that are shared: their destination paths and their current paths."""
    files = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    for path in files:
        _check_is_inside(path, folder)
    return {path.relative_to(folder): path for path in files}


def stage_files(folder: str | os.PathLike, stage: str | os.PathLike, adapter_name: str = "default") -> None:
    """
    Copy the files that are shared from the folder of an adapter.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        stage (`str` or `os.PathLike`): The folder to copy into.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter in the folder.

    Raises:
        FileNotFoundError: if a file of the adapter is missing from the folder.
        ValueError: if a file is damaged, or is a link to a place outside of the folder. Nothing is copied in that
            case.
    """
    own_folder = checked_folder(adapter_folder(folder, adapter_name))
    files = {**_shared_files(Path(folder), PROCESSING_FILES), **_shared_files(own_folder, _SHARED_FILES)}
    # check before copying, so that errors name the files of the folder and not their copies
    read_config(own_folder), FederationRecord.from_folder(own_folder), kept_metadata(own_folder / CARD_FILE)
    for name, path in files.items():
        copy = Path(stage, name)
        copy.parent.mkdir(exist_ok=True)
        if path.name == HISTORY_FILE:
            write_history(copy, public_history(read_history(path)))
        else:
            shutil.copyfile(path, copy)


def _check_is_inside(path: Path, folder: Path) -> None:
    """A folder may come from somebody else, and a link in it may lead to a private file."""
    target, folder = path.resolve(), folder.resolve()
    # the Hub's cache stores the contents of all snapshots of a repository in a folder next to them, and links there
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
    """Set the base model of a configuration to its name on the Hub, or remove it, so that no local path is shared."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model or name_on_hub(config.get("base_model_name_or_path"))
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _upload(stage: tempfile.TemporaryDirectory, destination: Destination) -> CommitInfo:
    try:
        with stage:
            return _commit(Path(stage.name), destination)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise  # the Hub refused it and says why
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
    # includes the owner, even if only the name was given
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
        # not `upload_folder`, which may split the files over several commits
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in staged.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=destination.commit_message,
        revision=revision,
        create_pr=destination.create_pr,
    )
