"""Packages that only a part of leanvit needs: imported there, on first use, and named where they are missing."""

import importlib.util


class MissingExtra(ImportError):
    """A package of one of the extras is not installed. The message is one line and holds the command."""


def need(what: str, extra: str, *packages: str) -> None:
    """Raises `MissingExtra` where one of the packages is not installed: what needs it, and which extra brings it.

    >>> from leanvit import extras
    >>> extras.need("this example", "notebooks", "json")
    >>> extras.need("this example", "notebooks", "json", "surely_not_there")
    Traceback (most recent call last):
    leanvit.extras.MissingExtra: this example needs surely_not_there: pip install 'leanvit[notebooks]'
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtra(f"{what} needs {' and '.join(missing)}: pip install 'leanvit[{extra}]'")
