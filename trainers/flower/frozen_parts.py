"""What is frozen in the adapter of a federation: every node makes it for itself, or is sent it once."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .introduction import Bases, Introduction, check_same_adapter, differ_in_values_only


class FrozenParts:
    """
    The frozen parts of the server's adapter, which updates of all clients must have in common: the bases of a Ravan
    adapter, or LoRA's A for FFA-LoRA.

    Args:
        made (`Mapping[str, torch.Tensor]`): Their fingerprints, see [`frozen_fingerprints`].
        parts (`Mapping[str, torch.Tensor]`, *optional*): The parts themselves, if a node that makes others could be sent
            them.
        send (`bool`, *optional*, defaults to `False`): Whether such a node is sent them, or left out.
    """

    def __init__(
        self, made: Mapping[str, torch.Tensor], parts: Mapping[str, torch.Tensor] | None = None, send: bool = False
    ):
        self._made = self._common = made
        self._sent = None if parts is None else Bases(parts)
        self._are_sent_to_others, self._are_sent_to_all = send, False

    def send_to_all(self, parts: Mapping[str, torch.Tensor], fingerprints: Mapping[str, torch.Tensor]) -> None:
        """
        Send every node parts that none can make for itself.

        Args:
            parts (`Mapping[str, torch.Tensor]`): The parts.
            fingerprints (`Mapping[str, torch.Tensor]`): Their fingerprints.
        """
        self._sent, self._common, self._are_sent_to_all = Bases(parts), fingerprints, True

    @property
    def message(self) -> Bases:
        """What nodes are sent."""
        return self._sent

    def check_made(self, introduction: Introduction) -> None:
        """
        Args:
            introduction ([`Introduction`]): What a node says of itself before it was sent anything.

        Raises:
            ValueError: if what it has made is not what the server has made, and cannot be replaced.
        """
        could_be_sent = self._sent is not None and differ_in_values_only(self._made, introduction.frozen)
        if not (could_be_sent and self._are_sent_to_others):
            check_same_adapter(self._made, introduction, could_be_sent and not self._are_sent_to_all)

    def must_be_sent_to(self, introduction: Introduction) -> bool:
        """
        Args:
            introduction ([`Introduction`]): What a node says of itself, which was checked.

        Returns:
            `bool`: Whether the node needs the parts of the server.
        """
        return self._are_sent_to_all or differ_in_values_only(self._made, introduction.frozen)

    def check(self, introduction: Introduction) -> None:
        """
        Args:
            introduction ([`Introduction`]): What a node says of itself after it was sent the parts.

        Raises:
            ValueError: if it does not have them.
        """
        check_same_adapter(self._common, introduction)
