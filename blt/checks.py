"""Checks of settings: a bad value raises ValueError naming the field, the value and what is allowed."""

from typing import get_type_hints


def check(config, name, is_good, allowed):
    """Raise ValueError naming a config field, its value and what is allowed, unless is_good."""
    if not is_good:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be {allowed}")


def check_positive(config, *names):
    """Raise ValueError unless these fields are numbers above zero, or None where the field may be None."""
    types = get_type_hints(type(config))
    for name in names:
        value = getattr(config, name)
        may_be_none = value is None and isinstance(None, types[name])
        check(config, name, may_be_none or (isinstance(value, (int, float)) and value > 0), "above 0")
