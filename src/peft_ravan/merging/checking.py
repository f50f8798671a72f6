"""The checks that stand between what clients upload and the merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft import LoraConfig, PeftConfig

from ..state import is_basis, is_core, is_scaling
from .lora import A_PARTS, is_lora_matrix, lora_scaling, lora_targets
from .method import MergeMethod
from .updates import ClientUpdate, UpdateError


class UpdateChecker:
    """
    Lets those updates pass that fit the global state.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        method ([`MergeMethod`]): The merge method, which says what may differ from client to client.
        on_bad_update (`str`, *optional*, defaults to `"raise"`): `"raise"`, or `"drop"` to go on without the client.
        config ([`~peft.PeftConfig`], *optional*): The configuration of the global adapter.
        check_entries (`bool`, *optional*, defaults to `True`): Whether to look for NaN and infinite entries.
        may_be_empty (`bool`, *optional*, defaults to `False`): Whether there may be no update, or none that fits.

    **Attributes**:
        - **dropped** (`list[dict[str, str]]`) -- `client` and `reason` of the updates that were dropped.
        - **num_clients**, **num_examples** (`int`) -- What has passed.

    Raises:
        ValueError: if `on_bad_update` is neither.
    """

    def __init__(
        self,
        global_state: Mapping[str, torch.Tensor],
        method: MergeMethod,
        on_bad_update: str = "raise",
        config: PeftConfig | None = None,
        check_entries: bool = True,
        may_be_empty: bool = False,
    ):
        if on_bad_update not in ("raise", "drop"):
            raise ValueError(f"`on_bad_update` must be 'raise' or 'drop', got {on_bad_update!r}.")
        self.global_state = global_state
        self.method = method
        self.on_bad_update = on_bad_update
        self.config = config
        self._lora_targets = lora_targets(global_state)
        self.check_entries = check_entries
        self.may_be_empty = may_be_empty
        self.dropped: list[dict[str, str]] = []
        self.num_clients = self.num_examples = 0
        self._seen: set[str] = set()
        self._form = _form(global_state)

    def passing(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """
        Args:
            updates (`Iterable[ClientUpdate]`): What the clients uploaded.

        Yields:
            [`ClientUpdate`]: The updates that fit.

        Raises:
            UpdateError: at an update that does not fit, or if none is left at the end.
        """
        for index, update in enumerate(updates):
            client = f"client {update.client_id!r}" if update.client_id else f"client number {index} (without a name)"
            try:
                self._check(update, client)
            except UpdateError as error:
                if self.on_bad_update == "raise":
                    raise
                self.dropped.append({"client": update.client_id or str(index), "reason": str(error)})
                continue
            self.num_clients += 1
            self.num_examples += update.num_examples
            self._seen.add(update.client_id)
            yield update
        if not (self.num_clients or self.may_be_empty):
            reasons = "".join(f" {entry['reason']}" for entry in self.dropped)
            raise UpdateError(f"A merge needs at least one client update, got none.{reasons}")

    def _check(self, update: ClientUpdate, client: str) -> None:
        if update.client_id and update.client_id in self._seen:
            raise UpdateError(f"{client}: there are two updates of this client, which would count twice. Keep one.")
        num_examples = update.num_examples
        if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
            raise UpdateError(
                f"{client}: num_examples must be an integer of 1 or more, since it weighs the mean, got {num_examples!r}. "
                "Leave out clients that did not train."
            )
        # most updates have the form of the global state, which is seen at a glance
        special = update.trained_heads or update.config or self.method.frozen_parts or self.method.personal_parts
        if special or _form(update.state) != self._form:
            self._check_names(update, client)
            for name in update.state:
                self._check_tensor(name, update, client)
            self._check_ranks(update, client)
            self._check_scalings(update, client)
        if self.check_entries:
            for name, tensor in update.state.items():
                _check_entries(name, tensor, client)

    def _check_names(self, update: ClientUpdate, client: str) -> None:
        method = self.method
        for name in self.global_state:
            may_lack = _has_part(name, method.frozen_parts + method.personal_parts)
            if name not in update.state and not may_lack:
                raise UpdateError(
                    f"{client}, tensor {name!r}: missing from the update. An update holds every tensor of the global "
                    "state; was it made by another adapter configuration?"
                )
        for name in update.state:
            if _has_part(name, method.personal_parts):
                raise UpdateError(
                    f"{client}, tensor {name!r}: not expected in the update: with {method.pretty_name} it stays with its "
                    "client. Leave it out of the upload."
                )
            if name not in self.global_state:
                reason = (
                    "scalings and bases are never uploaded, only the products s*H"
                    if is_scaling(name) or is_basis(name)
                    else "the global state has no such tensor; was the update made by another adapter configuration?"
                )
                raise UpdateError(f"{client}, tensor {name!r}: not expected in the update: {reason}")
        for name in update.trained_heads or ():
            if name not in self.global_state or not is_core(name):
                raise UpdateError(
                    f"{client}, tensor {name!r}: trained_heads names it, but it is not a core (`ravan_H`)."
                )

    def _check_tensor(self, name: str, update: ClientUpdate, client: str) -> None:
        tensor, global_tensor = update.state[name], self.global_state[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UpdateError(f"{client}, tensor {name!r}: must be a floating point tensor, got {found}.")
        if tensor.dtype != global_tensor.dtype:
            raise UpdateError(
                f"{client}, tensor {name!r}: must be {global_tensor.dtype} as in the global state, got {tensor.dtype}. "
                f"Convert it before the upload, if this was meant: `tensor.to({global_tensor.dtype})`."
            )
        expected = self._expected_shape(name, update, client)
        if self.method.different_ranks and is_lora_matrix(name):
            axis = 0 if _has_part(name, A_PARTS) else 1
            if tensor.dim() == len(expected) and tensor.shape[axis] > 0:
                expected = torch.Size([*expected[:axis], tensor.shape[axis], *expected[axis + 1 :]])
        if tensor.shape != expected:
            raise UpdateError(
                f"{client}, tensor {name!r}: must have shape {tuple(expected)}, got {tuple(tensor.shape)}. With "
                f"{self.method.pretty_name} every client needs the adapter configuration of the global adapter"
                + (", except for the rank." if self.method.different_ranks else ".")
            )
        if _has_part(name, self.method.frozen_parts) and not torch.equal(tensor, global_tensor.to(tensor.device)):
            raise UpdateError(
                f"{client}, tensor {name!r}: differs from the global one, but {self.method.pretty_name} keeps it frozen. "
                "Freeze it on the clients (`requires_grad_(False)`), and leave it out of the upload."
            )

    def _expected_shape(self, name: str, update: ClientUpdate, client: str) -> torch.Size:
        shape = self.global_state[name].shape
        mask = (update.trained_heads or {}).get(name)
        if mask is None:
            return shape
        is_tensor = isinstance(mask, torch.Tensor)
        if not is_tensor or mask.dtype != torch.bool or mask.shape != (shape[0],):
            found = f"{mask.dtype} of shape {tuple(mask.shape)}" if is_tensor else type(mask).__name__
            raise UpdateError(
                f"{client}, tensor {name!r}: trained_heads must be a bool tensor of shape ({shape[0]},), one entry a head, "
                f"got {found}."
            )
        if not self.method.different_heads and not mask.all():
            raise UpdateError(
                f"{client}, tensor {name!r}: only some heads were trained, but {self.method.pretty_name} needs all heads of "
                "every client. Use method='ravan', which averages each head over the clients that trained it."
            )
        return torch.Size([int(mask.sum()), *shape[1:]])

    def _check_ranks(self, update: ClientUpdate, client: str) -> None:
        if not self.method.different_ranks:
            return
        for target in self._lora_targets:
            global_rank = target.rank(self.global_state)
            if self.global_state[target.B_name].shape[1] != global_rank:
                continue  # a grouped convolution, which no such method merges
            rank_A, rank_B = update.state[target.A_name].shape[0], update.state[target.B_name].shape[1]
            if rank_A != rank_B:
                raise UpdateError(
                    f"{client}, tensor {target.A_name!r}: its rank is {rank_A}, but that of the matching B is {rank_B}."
                )
            if self.method.ranks_up_to_global and rank_A > global_rank:
                raise UpdateError(
                    f"{client}, tensor {target.A_name!r}: its rank {rank_A} is above the rank {global_rank} of the global "
                    f"adapter, to which {self.method.pretty_name} pads. Give the global adapter the largest rank of all "
                    "clients."
                )

    def _check_scalings(self, update: ClientUpdate, client: str) -> None:
        own_config = self.config if update.config is None else update.config
        if own_config is None or not self._lora_targets:
            return
        if update.config is not None and not isinstance(update.config, LoraConfig):
            raise UpdateError(
                f"{client}: its config must be a LoraConfig, since the adapter is LoRA, got {type(update.config).__name__}."
            )
        if not isinstance(self.config, LoraConfig):
            if update.config is not None and not self.method.different_ranks:
                raise UpdateError(
                    f"{client}: has a config of its own, whose alpha / r cannot be compared. Give `config`, the LoraConfig of "
                    "the global adapter, too."
                )
            return
        for target in self._lora_targets:
            if target.B_name not in update.state or (
                self.method.different_ranks and target.bias_name not in self.global_state
            ):
                continue
            rank, global_rank = (state[target.B_name].shape[1] for state in (update.state, self.global_state))
            scaling = lora_scaling(own_config, target.module, rank)
            expected = lora_scaling(self.config, target.module, global_rank)
            if not math.isclose(scaling, expected):
                need = "a bias of B" if self.method.different_ranks else self.method.pretty_name
                raise UpdateError(
                    f"{client}, tensor {target.B_name!r}: its scaling alpha / r is {scaling:g}, that of the global adapter "
                    f"{expected:g}, but {need} needs the same scaling on all clients. Choose lora_alpha so that they agree."
                )


def _form(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Size | None, torch.dtype | None]]:
    return {name: (getattr(tensor, "shape", None), getattr(tensor, "dtype", None)) for name, tensor in state.items()}


def _check_entries(name: str, tensor: torch.Tensor, client: str) -> None:
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise UpdateError(
            f"{client}, tensor {name!r}: {bad} of {tensor.numel()} entries are NaN or infinite. The client's training "
            "diverged: lower its learning rate, or leave the client out."
        )


def check_merged(state: Mapping[str, torch.Tensor]) -> None:
    """
    Args:
        state (`Mapping[str, torch.Tensor]`): A new state.

    Raises:
        ValueError: if an entry is NaN or infinite, as finite uploads can make it where numbers overflow.
    """
    for name, tensor in state.items():
        if not is_finite(tensor):
            raise ValueError(
                f"Tensor {name!r}: the merge has made entries that are NaN or infinite, although all uploads are finite. "
                "Either the global state has such entries, or uploads are so large that they overflow: leave them out, or "
                "merge in a dtype with a larger range."
            )


def is_finite(tensor: torch.Tensor) -> bool:
    """
    Args:
        tensor (`torch.Tensor`): A floating point tensor.

    Returns:
        `bool`: Whether no entry is NaN or infinite.
    """
    # one sum is several times cheaper than a look at every entry, and NaN and infinity do not get lost in it
    return math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all())


def _has_part(name: str, parts: tuple[str, ...]) -> bool:
    return any(part in name for part in parts)
