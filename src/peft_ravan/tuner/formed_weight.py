"""
The formed weight of a layer, `W + sum_i s_i B_i H_i A_i`, held as long as nothing it depends on has changed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


# how long a formed weight is kept: not even for the backward pass, for it, or until something has changed
KEEP_UNTIL = (None, "backward", "changed")


class FormedFrom(NamedTuple):
    """
    What a formed weight depends on.

    Args:
        adapter_name (`str`): The name of the adapter.
        weight (`torch.Tensor`): The base weight W, `[d_out, d_in]`.
        basis_A (`torch.Tensor`): The stacked A, `[h*r, d_in]`.
        basis_B (`torch.Tensor`): The stacked B, `[d_out, h*r]`.
        core (`torch.Tensor`): H, `[h, r, r]`.
        scaling (`torch.Tensor`): s, `[h]`.
    """

    adapter_name: str
    weight: torch.Tensor
    basis_A: torch.Tensor
    basis_B: torch.Tensor
    core: torch.Tensor
    scaling: torch.Tensor

    def frozen(self) -> tuple[torch.Tensor, ...]:
        return self.weight, self.basis_A, self.basis_B

    def versions(self) -> tuple:
        """What tells cheaply that a frozen tensor has been replaced, moved, cast or written to."""
        return (
            self.adapter_name,
            *(
                (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.shape)
                for tensor in self.frozen()
            ),
        )


class FormedWeight:
    """
    Holds the formed weight of a layer, and gives it back as long as it is right.

    A version counter does not see all that can change a tensor: not a write through `.data`, nor what sharding copies
    into a parameter. So H and s are compared by value, and the frozen tensors by their products with random vectors,
    which cost as much as one more token.

    Copies, also those in a pickle, are empty.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Free what is held."""
        self._formed = self._versions = self._values = self._probes = None

    def get(self, source: FormedFrom) -> torch.Tensor | None:
        """
        Args:
            source ([`FormedFrom`]): What it has to be formed from.

        Returns:
            `torch.Tensor`: The formed weight if it is held and right, `[d_out, d_in]`. If it is not, it is freed.
        """
        if self._formed is not None and not self._is_current(source):
            self.clear()
        return self._formed

    def hold(self, formed: torch.Tensor, source: FormedFrom) -> None:
        """
        Args:
            formed (`torch.Tensor`): The formed weight, without a graph, `[d_out, d_in]`.
            source ([`FormedFrom`]): What it was formed from.
        """
        self._formed = formed
        self._versions = source.versions()
        self._probes = [_probe(source.weight[0]), _probe(source.weight[:, 0])]
        self._values = self._values_of(source)

    def _is_current(self, source: FormedFrom) -> bool:
        # what was formed in inference mode cannot take part in training
        if self._formed.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if self._versions != source.versions():
            return False
        return all(torch.equal(held, now) for held, now in zip(self._values, self._values_of(source), strict=True))

    def _values_of(self, source: FormedFrom) -> list[torch.Tensor]:
        of_inputs, of_outputs = self._probes  # [d_in], [d_out]
        with torch.no_grad():
            return [
                source.core.clone(),
                source.scaling.clone(),
                source.weight @ of_inputs,
                source.basis_A @ of_inputs,
                of_outputs @ source.basis_B,
            ]

    def __deepcopy__(self, memo: dict) -> FormedWeight:
        return FormedWeight()

    def __reduce__(self) -> tuple:
        return FormedWeight, ()


def _probe(like: torch.Tensor) -> torch.Tensor:
    """A random vector, which leaves the generators of the process as they are, so that a seeded run stays the same."""
    generator = torch.Generator(like.device)
    generator.seed()
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
