"""leanvit: vision transformers, cheap to adapt and cheap to run."""
