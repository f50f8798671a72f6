from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig

from .bases import BASES, check_bases_name
from .registration import ensure_peft_type


@dataclass
class RavanConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of a [`RavanModel`].

    Ravan adds `sum_i s_i * B_i @ H_i @ A_i` to each targeted weight, over `num_heads` heads of rank `r`. The bases `B_i`
    and `A_i` are frozen after initialisation; the cores `H_i` (`r x r`) and the scalings `s_i` are trained. The number of
    trained parameters of one target is `num_heads * (r**2 + 1)`, whatever the size of the layer, and the rank of the
    update is up to `num_heads * r`.

    The method is described in https://huggingface.co/papers/2506.05568.

    Args:
        r (`int`, *optional*, defaults to `16`):
            The rank of one head.
        num_heads (`int`, *optional*, defaults to `4`):
            The number of heads, h.
        target_modules (`list[str]` or `str`, *optional*):
            The names of the modules to apply the adapter to. A string is a regular expression, or `"all-linear"`. By
            default chosen by the architecture of the model, as for the other methods of PEFT.
        exclude_modules (`list[str]` or `str`, *optional*):
            The names of the modules not to apply the adapter to; a string is a regular expression.
        init_bases (`str`, *optional*, defaults to `"gram_schmidt"`):
            How the frozen bases are made. `"gram_schmidt"`: the `num_heads * r` columns of all B and the rows of all A
            are orthonormal, which needs `num_heads * r <= min(d_in, d_out)`. `"normal"`: independent normal entries
            with variance `1 / d`, so that a row of A and a column of B have an expected norm of 1.
        projection_seed (`int`, *optional*, defaults to `0`):
            The seed of the bases. Together with the name of the target it determines them, so everybody who uses the
            same seed has the same bases.
        save_projection (`bool`, *optional*, defaults to `True`):
            Whether to save the bases with the adapter. Without them the file is much smaller and they are made again
            from `projection_seed` when it is loaded. All adapters of a model must agree on it.
        ravan_dropout (`float`, *optional*, defaults to `0.0`):
            The dropout probability of the input of the adapter.
        fan_in_fan_out (`bool`, *optional*, defaults to `False`):
            Whether the layer to replace stores its weight as `(fan_in, fan_out)`. Set by itself for
            `transformers.pytorch_utils.Conv1D`.
        bias (`str`, *optional*, defaults to `"none"`):
            Which biases are trained: `"none"`, `"all"` or `"ravan_only"`. If not `"none"`, the model does not give the
            output of the base model when the adapter is disabled.
        modules_to_save (`list[str]`, *optional*):
            The modules apart from the adapter that are trained and saved, for example the classification head.
        init_weights (`bool`, *optional*, defaults to `True`):
            Whether the cores start at zero, so that a new adapter does not change the output. `False` gives random
            cores, which is only useful for testing.
        layers_to_transform (`list[int]` or `int`, *optional*):
            The indices of the layers to transform. By default all of them.
        layers_pattern (`list[str]` or `str`, *optional*):
            The name of the `nn.ModuleList` that holds the layers, used with `layers_to_transform`.

    Raises:
        ValueError: if a field has a value outside its range, or if fields exclude each other.
    """

    r: int = field(default=16, metadata={"help": "Rank of one head."})
    num_heads: int = field(default=4, metadata={"help": "Number of heads."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names of the modules to adapt, a regular expression, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of the modules not to adapt, or a regular expression."}
    )
    init_bases: str = field(
        default="gram_schmidt", metadata={"help": f"How the frozen bases are made: {', '.join(BASES)}."}
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of the frozen bases."})
    save_projection: bool = field(
        default=True, metadata={"help": "Save the bases with the adapter, or make them again from the seed."}
    )
    ravan_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of the adapter's input."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Set this if the layer stores its weight as (fan_in, fan_out)."}
    )
    bias: str = field(default="none", metadata={"help": "Which biases are trained: 'none', 'all' or 'ravan_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules apart from the adapter to train and save, such as the head."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start the cores at zero. False is only useful for testing."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to transform. By default all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList of the layers, with layers_to_transform."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ensure_peft_type()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self._check_numbers()
        self._check_layers()

    def _check_numbers(self) -> None:
        for name in ("r", "num_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be an integer of 1 or more, got {value!r}.")
        if not 0.0 <= self.ravan_dropout < 1.0:
            raise ValueError(f"`ravan_dropout` must be at least 0 and below 1, got {self.ravan_dropout!r}.")
        if self.bias not in ("none", "all", "ravan_only"):
            raise ValueError(f"`bias` must be 'none', 'all' or 'ravan_only', got {self.bias!r}.")
        check_bases_name(self.init_bases)

    def _check_layers(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` cannot be used when `target_modules` is a str. Put the layers into the regular "
                        "expression, or pass `target_modules` as a list."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
