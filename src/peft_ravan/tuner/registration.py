"""Registers RAVAN with PEFT. This is the only module that touches PEFT's enum and its mappings."""

from __future__ import annotations

import warnings

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method


METHOD_NAME = "ravan"


def ensure_peft_type() -> PeftType:
    """
    Return `PeftType.RAVAN`, and add it to PEFT's enum if it does not exist.

    `PeftType` cannot be extended, and a plain string is not enough: transformers reads `peft_type.value`, and
    `get_model_status` shows `str(peft_type)`. If this is called again, or if PEFT ships its own RAVAN, the existing
    member is returned.

    Returns:
        `PeftType`: The member.
    """
    name = METHOD_NAME.upper()
    if name in PeftType.__members__:
        return PeftType[name]

    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # EnumMeta protects its own __setattr__. Lookup by name, lookup by value (also when unpickling) and iteration read
    # the three maps below.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """
    Register the Ravan config and tuner with PEFT. Registering the same classes again does nothing.

    Args:
        config_cls (`type`):
            The configuration class, [`RavanConfig`].
        model_cls (`type`):
            The tuner class, [`RavanModel`].
    """
    peft_type = ensure_peft_type()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is None:
        register_peft_method(name=METHOD_NAME, config_cls=config_cls, model_cls=model_cls)
        return

    if registered.__module__ != config_cls.__module__:
        warnings.warn(
            f"PEFT already has a method called {METHOD_NAME!r}, from `{registered.__module__}`. In this process "
            f"`{config_cls.__module__}` takes its place, because its configuration and checkpoints may differ. To use "
            "the other one, do not import `peft_ravan`."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
