"""
Bases from gradients, `init_bases="gradient_svd"`: for each target, the singular directions of an averaged gradient of
its weight (with one head, this is LoRA-SB, Ponkshe et al., 2024).

The gradient itself, `d_out x d_in` for each target, is never stored. Two random projections of it are enough to
recover its largest directions in one pass over the data (Tropp et al., Practical Sketching Algorithms for Low-Rank
Matrix Approximation, 2017, algorithms 1 and 7). Sketches are linear in the gradient: the mean of sketches is the
sketch of the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from .bases import BASES, BasesShape, make_bases
from .layer import RavanLayer
from .linalg import OVERSAMPLING
from .linear import Linear


class GradientSketch:
    """
    Two random projections of a gradient G, `[d_out, d_in]`: `G Omega`, `[d_out, k]`, and `Psi G`, `[l, d_in]`.

    Args:
        shape ([`~peft_ravan.tuner.bases.BasesShape`]): The shape of the target.
        seed (`int`): The seed of the projections. Sketches can only be added up if they have the same seed.
        device (`torch.device`): The device of the sketch.
        rank (`int`, *optional*): How many directions to recover, h*r by default. k is 10 more, l is 20 more.
    """

    def __init__(self, shape: BasesShape, seed: int, device: torch.device, rank: int | None = None):
        self.shape = shape
        rank = shape.total_rank if rank is None else min(rank, shape.total_rank)
        num_columns = min(rank + OVERSAMPLING, shape.d_in, shape.d_out)
        # Tropp's choice, 2 k + 1, recovers slightly more of flat spectra, but from h*r = d/3 on the sketch would be
        # larger than the gradient itself. A client should send about h*r numbers for each row and each column.
        num_rows = min(num_columns + OVERSAMPLING, shape.d_out)
        generator = torch.Generator().manual_seed(seed)
        self.omega = torch.randn(shape.d_in, num_columns, generator=generator).to(device)
        self.psi = torch.randn(num_rows, shape.d_out, generator=generator).to(device)
        self.columns = torch.zeros(shape.d_out, num_columns, dtype=torch.float64, device=device)
        self.rows = torch.zeros(num_rows, shape.d_in, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, grad_output: torch.Tensor) -> None:
        """
        Add the gradient of one call of the layer, `grad_output.T @ x`.

        Args:
            x (`torch.Tensor`): The input, `[T, d_in]`.
            grad_output (`torch.Tensor`): The gradient of the output, `[T, d_out]`.
        """
        x, grad_output = x.float(), grad_output.float()
        self.columns += grad_output.T @ (x @ self.omega)
        self.rows += (grad_output @ self.psi.T).T @ x

    def add_gradient(self, gradient: torch.Tensor) -> None:
        """
        Args:
            gradient (`torch.Tensor`): A gradient, `[d_out, d_in]`.
        """
        gradient = gradient.to(self.omega)
        self.columns += gradient @ self.omega
        self.rows += self.psi @ gradient

    def divide(self, number: int) -> None:
        """
        Args:
            number (`int`): The number to divide the sum of the gradients by, to get their mean.
        """
        self.columns /= number
        self.rows /= number

    def low_rank(self) -> torch.Tensor:
        """
        Returns:
            `torch.Tensor`: An approximation of the gradient, `[d_out, d_in]`, of rank k.
        """
        Q = torch.linalg.qr(self.columns).Q  # [d_out, k]
        # the default driver reads memory that PyTorch has not set (pytorch#187411), so each call gives another result
        return Q @ torch.linalg.lstsq(self.psi.double() @ Q, self.rows, driver="gels").solution


def initialize_bases_from_gradient(
    model: nn.Module,
    dataloader_or_gradients: Iterable[Mapping[str, Any]] | Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    num_batches: int | None = None,
    compute_loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
) -> None:
    """
    Set the bases of an adapter with `init_bases="gradient_svd"`, before it is trained.

    Args:
        model ([`~peft.PeftModel`]):
            The model, with a new adapter whose cores are still zero.
        dataloader_or_gradients (`Iterable[Mapping[str, Any]]` or `Mapping[str, torch.Tensor]`):
            Batches of keyword arguments of the model, including labels, over which the gradient is averaged. Or the
            gradients themselves, `[d_out, d_in]`, by the names of the targets within the base model.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter.
        num_batches (`int`, *optional*):
            The number of batches to use. By default all.
        compute_loss (`Callable`, *optional*):
            Computes the loss from the model and a batch. By default the loss that the model returns.

    Raises:
        ValueError: if the adapter has other bases or has already been trained, if no batch is given, or if a target
            got no gradient.
        TypeError: if a target is not a linear layer.

    Example:

        ```py
        >>> model = get_peft_model(base_model, RavanConfig(r=16, init_bases="gradient_svd", task_type="SEQ_CLS"))
        >>> initialize_bases_from_gradient(model, dataloader, num_batches=8)
        ```
    """
    if isinstance(dataloader_or_gradients, Mapping):
        sketches = make_sketches(model, adapter_name)
        _add_gradients(sketches, dataloader_or_gradients)
    else:
        batches = islice(dataloader_or_gradients, num_batches)
        sketches = sketch_gradients(model, batches, adapter_name, compute_loss)
    set_bases_from_sketches(model, sketches, adapter_name)


def make_sketches(
    model: nn.Module, adapter_name: str = "default", rank: int | None = None
) -> dict[str, GradientSketch]:
    """
    Args:
        model ([`~peft.PeftModel`]): The model, with a new adapter with `init_bases="gradient_svd"`.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter.
        rank (`int`, *optional*): How many directions of a gradient to recover, h*r by default and at most.

    Returns:
        `dict[str, GradientSketch]`: An empty sketch for each target, by its name within the base model.

    Raises:
        ValueError: if the adapter has other bases or has already been trained.
        TypeError: if a target is not a linear layer.
    """
    # the index is the seed: sketches can only be added up if everybody has the same projections
    return {
        name: GradientSketch(_shape_of(layer, adapter_name), index, layer.ravan_A[adapter_name].device, rank)
        for index, (name, layer) in enumerate(_gradient_targets(model, adapter_name).items())
    }


def sketch_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    compute_loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    rank: int | None = None,
) -> dict[str, GradientSketch]:
    """
    Sketch the mean gradient of each target's weight over some batches. The model is not changed.

    Args:
        model ([`~peft.PeftModel`]): The model, with a new adapter with `init_bases="gradient_svd"`.
        batches (`Iterable[Mapping[str, Any]]`): Batches of keyword arguments of the model, including labels.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter.
        compute_loss (`Callable`, *optional*):
            Computes the loss from the model and a batch. By default the loss that the model returns.
        rank (`int`, *optional*): How many directions of a gradient to recover, h*r by default and at most.

    Returns:
        `dict[str, GradientSketch]`: The sketches, by the names of the targets within the base model. They do not
        depend on any random state, so the sketches of several clients can be averaged.

    Raises:
        ValueError: if the adapter has other bases or has already been trained, or if no batch is given.
        TypeError: if a target is not a linear layer.
    """
    sketches = make_sketches(model, adapter_name, rank)
    targets = _adapted_layers(model, adapter_name)
    _add_batches(model, targets, sketches, batches, compute_loss or _loss_of_the_model)
    return sketches


def sketch_state(sketches: Mapping[str, GradientSketch]) -> dict[str, torch.Tensor]:
    """
    Args:
        sketches (`Mapping[str, GradientSketch]`): The sketches, by the names of the targets.

    Returns:
        `dict[str, torch.Tensor]`: The tensors to send, by name, in bfloat16 on the CPU, which is precise enough for a
        gradient over some batches. The projections are not sent, since everybody can make them.
    """
    return {
        f"{name}.{part}": getattr(sketch, part).bfloat16().cpu()
        for name, sketch in sketches.items()
        for part in ("columns", "rows")
    }


def sketches_from_state(
    model: nn.Module, state: Mapping[str, torch.Tensor], adapter_name: str = "default", rank: int | None = None
) -> dict[str, GradientSketch]:
    """
    The inverse of [`sketch_state`].

    Args:
        model ([`~peft.PeftModel`]): The model that the sketches are for.
        state (`Mapping[str, torch.Tensor]`): The tensors that were sent, or their mean over clients.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter.
        rank (`int`, *optional*): The rank that the sketches were made with.

    Returns:
        `dict[str, GradientSketch]`: The sketches, by the names of the targets.
    """
    sketches = make_sketches(model, adapter_name, rank)
    for name, sketch in sketches.items():
        sketch.columns.copy_(state[f"{name}.columns"])
        sketch.rows.copy_(state[f"{name}.rows"])
    return sketches


def set_bases_from_sketches(
    model: nn.Module, sketches: Mapping[str, GradientSketch], adapter_name: str = "default"
) -> None:
    """
    Set the bases of a new adapter in place.

    Args:
        model ([`~peft.PeftModel`]): The model.
        sketches (`Mapping[str, GradientSketch]`): Sketches of the gradients, by the names of the targets.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter.

    Raises:
        ValueError: if the adapter has other bases or has already been trained, or if a target got no gradient.
        TypeError: if a target is not a linear layer.
    """
    targets = _gradient_targets(model, adapter_name)
    config = model.peft_config[adapter_name]
    new_bases = {}
    for name, sketch in sketches.items():
        if not torch.isfinite(sketch.columns).all() or not sketch.columns.any():
            raise ValueError(
                f"The target {name!r} got a gradient of zero or one that is not finite, so it has no directions. Is it "
                "used in the forward pass, and does the loss depend on it?"
            )
        new_bases[name] = make_bases(
            "gradient_svd", sketch.shape, config.projection_seed, name, sketch.low_rank(), config.bases_scale
        )
    for name, (basis_A, basis_B) in new_bases.items():
        targets[name].ravan_A[adapter_name].copy_(basis_A)
        targets[name].ravan_B[adapter_name].copy_(basis_B)


def awaits_gradient(model: nn.Module, adapter_name: str = "default") -> bool:
    """
    Whether an adapter still waits for its bases from a gradient. This is detected from the bases themselves, so it
    does not matter how the model got them.

    Args:
        model ([`~peft.PeftModel`]): The model.
        adapter_name (`str`, *optional*, defaults to `"default"`): The name of the adapter.

    Returns:
        `bool`: Whether the bases are the placeholders used until there is a gradient.
    """
    config = model.peft_config[adapter_name]
    if BASES[getattr(config, "init_bases", "normal")].from_matrix != "gradient":
        return False
    # the bases of all targets are set at once, so checking one target is enough
    name, layer = next(iter(_adapted_layers(model, adapter_name).items()))
    stand_in, _ = make_bases(
        "gradient_svd", _shape_of(layer, adapter_name), config.projection_seed, name, scale=config.bases_scale
    )
    basis_A = layer.ravan_A[adapter_name].float().cpu()
    # not compared exactly: they may have been saved on another machine or in another dtype
    return bool((basis_A - stand_in).norm() < 0.05 * stand_in.norm())


def _adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, RavanLayer]:
    base_model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        name: module
        for name, module in base_model.named_modules()
        if isinstance(module, RavanLayer) and adapter_name in module.ravan_H
    }


def _gradient_targets(model: nn.Module, adapter_name: str) -> dict[str, RavanLayer]:
    config = model.peft_config[adapter_name]
    if BASES[getattr(config, "init_bases", "normal")].from_matrix != "gradient":
        raise ValueError(
            f"The adapter {adapter_name!r} was not made for bases from a gradient. Use "
            "`RavanConfig(init_bases='gradient_svd')`."
        )
    targets = _adapted_layers(model, adapter_name)
    for name, layer in targets.items():
        if not isinstance(layer, Linear):
            raise TypeError(
                f"Bases from a gradient are made for linear layers, but the target {name!r} is a "
                f"{type(layer.get_base_layer()).__name__}."
            )
        if layer.adapter_tensors(adapter_name)[2].any():
            raise ValueError(
                f"The adapter {adapter_name!r} was trained already (its core at {name!r} is not zero). Other bases would "
                "make it another adapter; set them before training."
            )
    return targets


def _shape_of(layer: RavanLayer, adapter_name: str) -> BasesShape:
    return BasesShape(*layer.bases_dimensions(), layer.num_heads[adapter_name], layer.r[adapter_name])


def _add_gradients(sketches: Mapping[str, GradientSketch], gradients: Mapping[str, torch.Tensor]) -> None:
    for name, sketch in sketches.items():
        if name not in gradients:
            raise ValueError(f"There is no gradient for the target {name!r}. Got gradients for {sorted(gradients)}.")
        expected = (sketch.shape.d_out, sketch.shape.d_in)
        if tuple(gradients[name].shape) != expected:
            raise ValueError(
                f"The gradient for the target {name!r} must have shape {expected}, got {tuple(gradients[name].shape)}."
            )
        sketch.add_gradient(gradients[name])


def _loss_of_the_model(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    output = model(**batch)
    return output["loss"] if isinstance(output, dict) else output[0]


def _add_batches(
    model: nn.Module,
    targets: Mapping[str, RavanLayer],
    sketches: Mapping[str, GradientSketch],
    batches: Iterable[Mapping[str, Any]],
    compute_loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor],
) -> None:
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []  # target, input, output
    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: calls.append((name, args[0], output)))
        for name, layer in targets.items()
    ]
    was_training = model.training
    model.eval()  # no dropout noise in the gradient
    device = next(model.parameters()).device
    try:
        num_seen = 0
        for batch in batches:
            num_seen += 1
            batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
            calls.clear()
            with torch.enable_grad():
                loss = compute_loss(model, batch)
            gradients = torch.autograd.grad(loss, [output for *_, output in calls], allow_unused=True)
            for (name, x, _), gradient in zip(calls, gradients, strict=True):
                if gradient is not None:
                    sketches[name].add(x.detach().flatten(0, -2), gradient.flatten(0, -2))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not num_seen:
        raise ValueError("Bases from a gradient need at least one batch, got none.")
    for sketch in sketches.values():
        sketch.divide(num_seen)
