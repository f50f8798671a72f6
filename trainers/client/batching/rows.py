"""The rows of several clients in one batch: how inputs are put together, and outputs are taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import pad
from torch.utils import _pytree as pytree
from transformers import Cache


# what is filled up if the texts of clients differ in length, and with what. Tokens outside of the attention mask have no
# influence on others.
_FILLED = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "inputs_embeds": 0}


class CannotBatchError(ValueError):
    """Rows of several clients cannot be computed together."""


@dataclass(frozen=True)
class Inputs:
    """
    The inputs of a part of the model.

    Args:
        named (`Mapping[str, Any]`): Names to inputs: tensors, other values, or containers of both.
        padding (`int`): The token that texts are filled up with.

    **Attributes**:
        - **size** (`int`) -- The number of rows.
        - **width** (`int`, *optional*) -- The length of texts, if they can be filled up.
    """

    named: Mapping[str, Any]
    padding: int
    size: int = field(init=False)
    width: int | None = field(init=False)

    def __post_init__(self):
        tensors = [leaf for leaf in pytree.tree_leaves(dict(self.named)) if _has_rows(leaf)]
        if not tensors:
            raise CannotBatchError("it has no input with rows")
        object.__setattr__(self, "size", len(tensors[0]))
        object.__setattr__(self, "width", self._width())

    def _width(self) -> int | None:
        tokens, mask = (self.named.get(name) for name in ("input_ids", "attention_mask"))
        tokens = self.named.get("inputs_embeds") if tokens is None else tokens
        if not (isinstance(tokens, torch.Tensor) and isinstance(mask, torch.Tensor)) or mask.dim() != 2:
            return None
        width = tokens.shape[1]
        others = [value for name, value in self.named.items() if name not in _FILLED]
        for leaf in pytree.tree_leaves(others):
            if isinstance(leaf, torch.Tensor) and leaf.dim() > 1:
                return None  # it may belong to the tokens
        return width if mask.shape[1] == width else None

    def kind(self) -> tuple:
        """
        Returns:
            `tuple`: What inputs have in common that can be put together.
        """
        leaves, structure = pytree.tree_flatten(dict(self.named))
        return repr(structure), *(self._kind_of(leaf) for leaf in leaves)

    def _kind_of(self, leaf: Any) -> tuple:
        if not isinstance(leaf, torch.Tensor):
            return type(leaf), leaf if isinstance(leaf, (bool, int, float, str, type(None))) else id(leaf)
        shape = list(leaf.shape)
        if self._is_own(leaf):
            shape[0] = "rows"
        if self.width is not None and len(shape) > 1 and shape[1] == self.width:
            shape[1] = "width"
        return (leaf.dtype, leaf.device, *shape)

    def _is_own(self, leaf: Any) -> bool:
        return _has_rows(leaf) and len(leaf) == self.size

    def filled(self, width: int | None) -> dict[str, Any]:
        """
        Args:
            width (`int`, *optional*): The length that texts are filled up to.

        Returns:
            `dict[str, Any]`: The inputs.
        """
        if width is None or width == self.width:
            return dict(self.named)
        return {name: self._filled(name, value, width) for name, value in self.named.items()}

    def _filled(self, name: str, value: Any, width: int) -> Any:
        if name not in _FILLED or not isinstance(value, torch.Tensor) or value.dim() < 2:
            return value
        with_what = self.padding if name == "input_ids" else _FILLED[name]
        return pad(value, (0, 0) * (value.dim() - 2) + (0, width - self.width), value=with_what)


def leaves_of(outputs: Any) -> list[Any]:
    """
    Args:
        outputs: Outputs of a part of a model.

    Returns:
        `list`: The tensors and other values in it.
    """
    return pytree.tree_leaves(outputs, is_leaf=lambda node: isinstance(node, Cache))


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


class Rows:
    """
    Which rows of a batch belong to which client.

    Args:
        inputs (`Sequence[Inputs]`): The inputs of each client, which are of the same kind.
    """

    def __init__(self, inputs: Sequence[Inputs]):
        self._inputs = inputs
        self._sizes = [own.size for own in inputs]
        self._widths = [own.width for own in inputs]
        self._width = None if self._widths[0] is None else max(self._widths)

    def joined_inputs(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: The inputs of all clients together.
        """
        flat = [pytree.tree_flatten(own.filled(self._width)) for own in self._inputs]
        sizes = self._sizes
        joined = [_joined_input(leaves, sizes) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
        return pytree.tree_unflatten(joined, flat[0][1])

    def sizes_in(self, tensor: Any) -> list[int] | None:
        """
        Args:
            tensor: A tensor within the model, whose first dimension may combine rows and others.

        Returns:
            `list[int]`: How many entries of its first dimension belong to each client. `None` if it has no rows.
        """
        total = sum(self._sizes)
        if not _has_rows(tensor) or not len(tensor) or len(tensor) % total:
            return None
        return [size * (len(tensor) // total) for size in self._sizes]

    def split_inputs(self, tree: Any) -> list[Any]:
        """
        Args:
            tree: Inputs of a layer. Tensors without rows are the same for all clients.

        Returns:
            `list[Any]`: The inputs of each client.
        """
        return self._split(tree, lambda leaf: [leaf] * len(self._sizes))

    def split_outputs(self, tree: Any) -> list[Any]:
        """
        Args:
            tree: Outputs of a part of the model.

        Returns:
            `list[Any]`: The outputs of each client.

        Raises:
            CannotBatchError: if an output cannot be divided by rows.
        """
        split = self._split(tree, self._split_other)
        if len(set(self._widths)) == 1:
            return split
        return [
            pytree.tree_map(lambda leaf, width=width: self._cut(leaf, width), own)
            for own, width in zip(split, self._widths, strict=True)
        ]

    def _split(self, tree: Any, split_other: Any) -> list[Any]:
        leaves, structure = pytree.tree_flatten(tree, is_leaf=lambda node: isinstance(node, Cache))
        columns = []
        for leaf in leaves:
            sizes = self.sizes_in(leaf)
            columns.append(split_other(leaf) if sizes is None else leaf.split(sizes))
        return [pytree.tree_unflatten(list(own), structure) for own in zip(*columns, strict=True)]

    def _split_other(self, leaf: Any) -> list[Any]:
        if isinstance(leaf, Cache):
            leaf = None  # it is of use for generation only
        if isinstance(leaf, (bool, int, float, str, type(None))):
            return [leaf] * len(self._sizes)
        what = (
            f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"a {type(leaf).__name__}"
        )
        raise CannotBatchError(f"its output has {what}, and {sum(self._sizes)} rows")

    def _cut(self, leaf: Any, width: int) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 3:
            return leaf
        if leaf.dim() > 3:
            raise CannotBatchError(f"its output has {leaf.dim()} dimensions, and texts differ in length")
        return leaf[:, :width] if leaf.shape[1] == self._width else leaf

    @staticmethod
    def join(outputs: Sequence[Any]) -> Any:
        """
        Args:
            outputs (`Sequence[Any]`): The outputs of a layer for each client.

        Returns:
            The outputs for all rows.
        """
        flat = [pytree.tree_flatten(own) for own in outputs]
        columns = zip(*(leaves for leaves, _ in flat), strict=True)
        joined = [torch.cat(leaves) if _has_rows(leaves[0]) else leaves[0] for leaves in columns]
        return pytree.tree_unflatten(joined, flat[0][1])


def _joined_input(leaves: Sequence[Any], sizes: Sequence[int]) -> Any:
    first = leaves[0]
    if not isinstance(first, torch.Tensor):
        return first
    if all(_has_rows(leaf) and len(leaf) == size for leaf, size in zip(leaves, sizes, strict=True)):
        return torch.cat(leaves)
    if all(leaf is first or torch.equal(leaf, first) for leaf in leaves):
        return first
    raise CannotBatchError(f"clients have different inputs of shape {list(first.shape)}, without rows")
