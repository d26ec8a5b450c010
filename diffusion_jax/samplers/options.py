"""Checks of the options of samplers that are no numbers to be learned: orders, names, counts."""


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Raises ValueError unless the value is one of those allowed, and of its type.

    Without the type True and 2.0 would pass for the orders 1 and 2.

    Source: none; a convention of this library.
    """
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raises ValueError unless the value is an integer of at least 0.

    Source: none; a convention of this library.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
