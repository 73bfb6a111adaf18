"""leanvit: vision transformers, cheap to adapt and cheap to run."""

from leanvit.state import load, save

__all__ = ["load", "save"]
