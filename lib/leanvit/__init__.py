"""leanvit: vision transformers, cheap to adapt and cheap to run."""

__all__ = ["load", "save"]


def __getattr__(name: str):
    # on demand, so that the command line starts without importing torch
    if name in __all__:
        from leanvit import cuts

        return getattr(cuts, name)
    raise AttributeError(f"module 'leanvit' has no attribute {name!r}")
