"""The checks that an upload has to pass before it is merged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from peft import LoraConfig, PeftConfig

from ..tuner.state import has_part, is_basis, is_core, is_scaling
from .changes import change_norm
from .entries import check_entries
from .limits import UpdateLimits
from .lora import A_PARTS, is_lora_matrix, lora_scaling, lora_targets
from .method import MergeMethod
from .plain import MAX_NAME_LENGTH, plain_update
from .updates import ClientUpdate, UpdateError


class UpdateChecker:
    """
    Passes on the updates that fit the global state. Each is read once and passed on as a plain update.

    Args:
        global_state (`Mapping[str, torch.Tensor]`): The state the clients started from.
        method ([`MergeMethod`]): The merge method, which says what may differ from client to client.
        on_bad_update (`str`, *optional*, defaults to `"raise"`): `"raise"`, or `"drop"` to go on without the client.
        config ([`~peft.PeftConfig`], *optional*): The configuration of the global adapter.
        limits ([`UpdateLimits`], *optional*): Limits to the influence of one client.
        may_be_empty (`bool`, *optional*, defaults to `False`): Whether there may be no update that fits.
        round_number (`int`, *optional*, defaults to 1): The round. It determines what is frozen.

    **Attributes**:
        - **dropped** (`list[dict[str, str]]`) -- `client` and `reason` of the updates that were dropped.
        - **clipped** (`list[dict[str, Any]]`) -- `client` and `norm` of the updates that were scaled down to the limit.
        - **accepted** (`list[tuple[str, int]]`) -- The clients that passed, with the number of examples counted for
        each.

    Raises:
        ValueError: if `on_bad_update` is neither of these.
    """

    def __init__(
        self,
        global_state: Mapping[str, torch.Tensor],
        method: MergeMethod,
        on_bad_update: str = "raise",
        config: PeftConfig | None = None,
        limits: UpdateLimits | None = None,
        may_be_empty: bool = False,
        round_number: int = 1,
    ):
        if on_bad_update not in ("raise", "drop"):
            raise ValueError(f"`on_bad_update` must be 'raise' or 'drop', got {on_bad_update!r}.")
        self.global_state = global_state
        self.method = method
        self.on_bad_update = on_bad_update
        self.config = config
        self.limits = limits or UpdateLimits()
        self.may_be_empty = may_be_empty
        self.round_number = round_number
        self.dropped: list[dict[str, str]] = []
        self.clipped: list[dict[str, str | float]] = []
        self.accepted: list[tuple[str, int]] = []
        self._frozen = method.frozen_in(round_number)
        self._lora_targets = lora_targets(global_state)
        self._form = _form(global_state)

    def passing(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """
        Args:
            updates (`Iterable[ClientUpdate]`): What the clients uploaded.

        Yields:
            [`ClientUpdate`]: The updates that fit and are within the limits, each read once.

        Raises:
            UpdateError: if an update does not fit, or if none is left at the end.
        """
        checked = self._fitting(updates)
        if self.limits.needs_all_updates:
            checked = self._within_the_median(list(checked))
        for index, update in checked:
            self.accepted.append((_name(update, index), update.num_examples))
            yield update
        self._check_not_empty()

    def without_the_largest(self, updates: Sequence[ClientUpdate]) -> list[ClientUpdate]:
        """
        Refuse the accepted update with the largest change, because the merge with it is not finite.

        Args:
            updates (`Sequence[ClientUpdate]`): Updates that passed.

        Returns:
            `list[ClientUpdate]`: The others.

        Raises:
            UpdateError: if updates are not dropped, or none is left.
        """
        norms = [change_norm(update, self.global_state) for update in updates]
        largest = norms.index(max(norms))
        name, _ = self.accepted[largest]
        error = UpdateError(
            f"client {name!r}: the merge with it has entries that are NaN or infinite, and of all updates its change is the "
            f"largest (norm {norms[largest]:.3g}). Set `max_update_norm`, or merge in a dtype with a larger range."
        )
        self._refuse(name, error)
        del self.accepted[largest]
        self._check_not_empty()
        return [update for index, update in enumerate(updates) if index != largest]

    def _fitting(self, updates: Iterable[ClientUpdate]) -> Iterator[tuple[int, ClientUpdate]]:
        seen: set[str] = set()
        for index, arrived in enumerate(updates):
            client = _label(arrived, index)
            try:
                update = plain_update(arrived, client)
                if update.client_id in seen:
                    raise UpdateError(
                        f"{client}: there are two updates of this client, which would count twice. Keep one."
                    )
                self._check(update, client)
                update = replace(update, num_examples=self.limits.counted(update.num_examples))
                if not self.limits.needs_all_updates:
                    update = self._within(update, client, self.limits.largest_norm())
            except UpdateError as error:
                self._refuse(_name(arrived, index), error)
                continue
            seen |= {update.client_id} - {""}
            del arrived
            yield index, update

    def _within_the_median(self, checked: Sequence[tuple[int, ClientUpdate]]) -> Iterator[tuple[int, ClientUpdate]]:
        largest = self.limits.largest_norm(change_norm(update, self.global_state) for _, update in checked)
        for index, update in checked:
            try:
                within = self._within(update, _label(update, index), largest)
            except UpdateError as error:
                self._refuse(_name(update, index), error)
                continue
            yield index, within

    def _within(self, update: ClientUpdate, client: str, largest: float) -> ClientUpdate:
        if self.limits.max_update_norm is None:
            return update
        norm = change_norm(update, self.global_state)
        within = self.limits.applied(update, norm, largest, self.global_state, client)
        if within is not update:
            self.clipped.append({"client": update.client_id, "norm": norm})
        return within

    def _refuse(self, name: str, error: UpdateError) -> None:
        if self.on_bad_update == "raise":
            raise error
        self.dropped.append({"client": name, "reason": str(error)})

    def _check_not_empty(self) -> None:
        if not (self.accepted or self.may_be_empty):
            reasons = "".join(f" {entry['reason']}" for entry in self.dropped)
            raise UpdateError(f"A merge needs at least one client update, got none.{reasons}")

    def _check(self, update: ClientUpdate, client: str) -> None:
        # most updates have the form of the global state, and comparing the form is cheap
        special = update.trained_heads or update.config or self._frozen or self.method.personal_parts
        if special or _form(update.state) != self._form:
            self._check_names(update, client)
            for name in update.state:
                self._check_tensor(name, update, client)
            self._check_ranks(update, client)
            self._check_scalings(update, client)
        check_entries(update.state, client)

    def _check_names(self, update: ClientUpdate, client: str) -> None:
        method = self.method
        for name in self.global_state:
            may_lack = has_part(name, self._frozen + method.personal_parts)
            if name not in update.state and not may_lack:
                raise UpdateError(
                    f"{client}, tensor {name!r}: missing from the update. An update holds every tensor of the global "
                    "state; was it made by another adapter configuration?"
                )
        for name in update.state:
            if has_part(name, method.personal_parts):
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
        if tensor.dtype != global_tensor.dtype:
            raise UpdateError(
                f"{client}, tensor {name!r}: must be {global_tensor.dtype} as in the global state, got {tensor.dtype}. "
                f"Convert it before the upload, if this was meant: `tensor.to({global_tensor.dtype})`."
            )
        expected = self._expected_shape(name, update, client)
        if self.method.different_ranks and is_lora_matrix(name):
            axis = 0 if has_part(name, A_PARTS) else 1
            if tensor.dim() == len(expected) and tensor.shape[axis] > 0:
                expected = torch.Size([*expected[:axis], tensor.shape[axis], *expected[axis + 1 :]])
        if tensor.shape != expected:
            raise UpdateError(
                f"{client}, tensor {name!r}: must have shape {tuple(expected)}, got {tuple(tensor.shape)}. With "
                f"{self.method.pretty_name} every client needs the adapter configuration of the global adapter"
                + (", except for the rank." if self.method.different_ranks else ".")
            )
        if has_part(name, self._frozen) and not torch.equal(tensor, global_tensor.to(tensor.device)):
            raise UpdateError(
                f"{client}, tensor {name!r}: differs from the global one, but {self.method.pretty_name} keeps it frozen"
                f"{self._in_this_round}. Freeze it on the clients (`requires_grad_(False)`), and leave it out of the upload."
            )

    @property
    def _in_this_round(self) -> str:
        return f" in round {self.round_number}" if self.method.frozen_cycle else ""

    def _expected_shape(self, name: str, update: ClientUpdate, client: str) -> torch.Size:
        shape = self.global_state[name].shape
        mask = (update.trained_heads or {}).get(name)
        if mask is None:
            return shape
        if mask.dtype != torch.bool or mask.shape != (shape[0],):
            raise UpdateError(
                f"{client}, tensor {name!r}: trained_heads must be a bool tensor of shape ({shape[0]},), "
                f"one entry per head, got {mask.dtype} of shape {tuple(mask.shape)}."
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
        if not isinstance(self.config, LoraConfig):
            if update.config is not None and not self.method.different_ranks:
                raise UpdateError(
                    f"{client}: has a config of its own, whose alpha / r cannot be compared. Give `config`, the LoraConfig of "
                    "the global adapter, too."
                )
            return
        for target in self._lora_targets:
            if has_part(target.B_name, self.method.personal_parts) or (
                self.method.different_ranks and target.bias_name not in self.global_state
            ):
                continue
            global_rank = self.global_state[target.B_name].shape[1]
            # where ranks may not differ, an upload has the global rank, even if B is frozen and left out
            rank = update.state[target.B_name].shape[1] if target.B_name in update.state else global_rank
            scaling = lora_scaling(own_config, target.module, rank)
            expected = lora_scaling(self.config, target.module, global_rank)
            if not math.isclose(scaling, expected):
                need = "a bias of B" if self.method.different_ranks else self.method.pretty_name
                raise UpdateError(
                    f"{client}, tensor {target.B_name!r}: its scaling alpha / r is {scaling:g}, that of the global adapter "
                    f"{expected:g}, but {need} needs the same scaling on all clients. Choose lora_alpha so that they agree."
                )


def _client_name(update: ClientUpdate) -> str:
    try:
        name = update.client_id
    except Exception:  # an object that is not an update may raise anything
        return ""
    return str(name)[:MAX_NAME_LENGTH] if isinstance(name, str) else ""


def _label(update: ClientUpdate, index: int) -> str:
    """The client's name for messages."""
    name = _client_name(update)
    return f"client {name!r}" if name else f"client number {index} (without a name)"


def _name(update: ClientUpdate, index: int) -> str:
    """The client's name for diagnostics."""
    return _client_name(update) or str(index)


def _form(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
