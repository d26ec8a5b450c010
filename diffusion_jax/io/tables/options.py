"""Reads another library's configurations: defaults for missing options, errors for unknown ones."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any


class UnsupportedOption(ValueError):
    """A checkpoint's configuration asks for something that our networks do not have."""


class UnknownOptions(UnsupportedOption):
    """A configuration has options that its class does not have.

    Attributes:
      names: of these options.
    """

    def __init__(self, message: str, names: Sequence[str] = ()):
        self.names = tuple(names)
        super().__init__(message)


def complete(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    owner: str,
    *,
    required: Sequence[str] = (),
) -> dict[str, Any]:
    """The options of a config.json with the other library's defaults filled in.

    Args:
      config: the parsed file; keys that start with "_" are metadata.
      defaults: every option of the class that has a default, and that.
      owner: name of the class, for messages.
      required: the other options.

    Raises:
      UnknownOptions: naming the options that the class does not have.
      UnsupportedOption: if `config` is no mapping, a required option is missing, or an option is
        text or an object where its default is a number or a truth value, or no list where that is
        one.
    """
    if not isinstance(config, Mapping):
        raise UnsupportedOption(f"{owner} must have options by their names, got {config!r:.99}")
    defaults = {**dict.fromkeys(required), **defaults}
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown, problems = sorted(set(given) - set(defaults)), []
    for key in unknown:
        near = difflib.get_close_matches(key, defaults, n=1)
        problems.append(f"{key!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    if problems:
        raise UnknownOptions(
            f"{owner} has no option {', '.join(problems)}; it has {', '.join(sorted(defaults))}",
            unknown,
        )
    missing = [option for option in required if option not in given]
    if missing:
        raise UnsupportedOption(f"{owner} must have the option {', '.join(missing)}")
    for option, value in given.items():
        default = defaults[option]
        no_number = isinstance(default, int | float) and isinstance(value, str | Mapping)
        no_list = isinstance(default, list | tuple) and not isinstance(value, list | tuple)
        if no_number or no_list:
            raise UnsupportedOption(
                f"{option} of {owner} must be like its default {default!r}, got {value!r}"
            )
    return {**defaults, **given}


def require(options: Mapping[str, Any], supported: Mapping[str, Sequence[Any]], owner: str) -> None:
    """Raises UnsupportedOption unless every option has one of its supported values.

    Args:
      options: of the class, completed.
      supported: option -> the values that we compute.
      owner: name of the class, for messages.
    """
    for option, values in supported.items():
        # Not `in`, which takes 1 for True and 0 for False.
        if not any(type(options[option]) is type(v) and options[option] == v for v in values):
            expected = " or ".join(repr(value) for value in values)
            raise UnsupportedOption(
                f"{option} of {owner} must be {expected} here, got {options[option]!r}"
            )


def require_lists(options: Mapping[str, Any], names: Sequence[str], owner: str) -> None:
    """Raises UnsupportedOption unless these options are lists of numbers."""
    for name in names:
        value = options[name]
        is_list = isinstance(value, list | tuple)
        if not is_list or not all(isinstance(each, int | float) for each in value):
            raise UnsupportedOption(f"{name} of {owner} must be a list of numbers, got {value!r}")


def require_integers(options: Mapping[str, Any], names: Sequence[str], owner: str) -> None:
    """Raises UnsupportedOption unless these options are positive integers."""
    for name in names:
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UnsupportedOption(
                f"{name} of {owner} must be an integer of at least 1, got {value!r}"
            )
