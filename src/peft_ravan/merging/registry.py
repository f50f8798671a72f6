"""The merge methods by name, with what documentation, command line help and model cards say of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from .fedavg import fedavg
from .fedrpca import fedrpca
from .ravan import ravan
from .updates import MergeResult


@dataclass(frozen=True)
class MergeMethod:
    """
    A merge method.

    Args:
        name (`str`): The name it is chosen by.
        pretty_name (`str`): The name for people.
        summary (`str`): What it does, in one sentence.
        reference (`str`): The address of the paper.
        function (`Callable`): The pure function `(global_state, updates, **options) -> MergeResult`.
    """

    name: str
    pretty_name: str
    summary: str
    reference: str
    function: Callable[..., MergeResult]

    @property
    def options(self) -> dict[str, object]:
        """The options of the method with their defaults."""
        parameters = list(inspect.signature(self.function).parameters.values())
        return {parameter.name: parameter.default for parameter in parameters[2:]}

    def check_options(self, options: dict[str, object]) -> None:
        """
        Args:
            options (`dict[str, object]`): Options by name.

        Raises:
            TypeError: if the method does not have one of them.
        """
        unknown = sorted(set(options) - set(self.options))
        if unknown:
            known = ", ".join(self.options) or "none"
            raise TypeError(f"Merge method {self.name!r} has no option {unknown[0]!r}. Its options are: {known}.")


MERGE_METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            name="fedavg",
            pretty_name="FedAvg",
            summary="Every tensor is averaged over the clients, weighted by their examples.",
            reference="https://huggingface.co/papers/1602.05629",
            function=fedavg,
        ),
        MergeMethod(
            name="ravan",
            pretty_name="Ravan",
            summary="Each head's product s*H is averaged over the clients that trained it, which is exact.",
            reference="https://huggingface.co/papers/2506.05568",
            function=ravan,
        ),
        MergeMethod(
            name="fedrpca",
            pretty_name="FedRPCA",
            summary="Robust PCA splits the updates into a common and a sparse part, and the sparse part is amplified.",
            reference="https://huggingface.co/papers/2506.01194",
            function=fedrpca,
        ),
    )
}


def get_merge_method(name: str) -> MergeMethod:
    """
    Args:
        name (`str`): The name of a merge method.

    Returns:
        [`MergeMethod`]: The method.

    Raises:
        ValueError: if there is none of that name.
    """
    if name not in MERGE_METHODS:
        raise ValueError(f"There is no merge method {name!r}. Choose one of: {', '.join(MERGE_METHODS)}.")
    return MERGE_METHODS[name]
