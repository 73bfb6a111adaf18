"""The checkpoints of one training: a folder `step_<n>` of accelerate's state and progress.json, complete or absent.

A checkpoint is written to a new folder, which is renamed when everything in it is on the disk; only then is the one
before removed. So whatever stops a training, the newest folder of that name is a good one.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from leanvit import atomic


class TrainingDiverged(RuntimeError):
    """The loss, or a trained parameter, is no longer finite."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or belongs to another training."""


def fingerprint(model: nn.Module, dataset: Dataset, **settings) -> dict:
    """What must be equal for a checkpoint to be this training's own: settings, data, parameters."""
    parts = {k: v for k, v in settings.items() if k != "workers"} | {"images": len(dataset)}
    parts |= {f"data {k}": getattr(dataset, k) for k in ("name", "sha256") if isinstance(getattr(dataset, k, 0), str)}
    for name, p in model.named_parameters():
        parts[f"parameter {name}"] = f"{list(p.shape)} {'trained' if p.requires_grad else 'frozen'}"
    return parts


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint: it was renamed to its name when everything in it was written."""
    found = [p for p in folder.glob("step_*") if (p / "progress.json").is_file()]
    return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)


def _ours(folder: Path) -> list[Path]:
    return [*folder.glob("step_*"), *folder.glob(".writing_*")]


def check_room(folder: Path, model: nn.Module) -> None:
    """Fail before the training, not in the middle of it, when `folder` cannot take the checkpoints.

    Raises `CheckpointError` when it cannot be written, or has less room than two checkpoints of `model` need.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    needed = 2 * (sum(t.numel() * t.element_size() for t in model.state_dict().values()) + 2 * trained)
    try:
        atomic.check_writable(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"checkpoint_dir {folder} cannot be written: {error.strerror or error}") from error
    if free < needed:
        raise CheckpointError(
            f"checkpoint_dir {folder} has {free / 2**20:.0f} MiB free; two checkpoints of this model need "
            f"{needed / 2**20:.0f} MiB (the old one goes when the new one is complete)"
        )


def diverged(what: str, folder: Path | None) -> TrainingDiverged:
    """The error, with what is still good."""
    kept = "" if folder is None else f"; the last good checkpoint is {newest(folder) or 'none'}"
    return TrainingDiverged(f"{what}{kept}. A smaller lr, a longer warm-up or clip_norm usually helps")


def save(accelerator: Accelerator, folder: Path, progress: dict, model: nn.Module) -> None:
    """Write a complete new folder, rename it to its name, then remove the older ones.

    Raises `TrainingDiverged` for a trained parameter that is not finite, `CheckpointError` when it cannot be written;
    the checkpoint before stays.
    """
    step = progress["step"]
    poisoned = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if poisoned:
        raise diverged(f"step {step}: parameter {poisoned[0]} (of {len(poisoned)}) is no longer finite", folder)
    new, final = folder / f".writing_{step:08d}", folder / f"step_{step:08d}"
    try:
        if accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(new))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (new / "progress.json").write_text(json.dumps(progress, indent=1))
            for file in new.iterdir():  # the rename must not reach the disk before the contents
                with file.open("r+b") as f:
                    os.fsync(f.fileno())
            shutil.rmtree(final, ignore_errors=True)
            new.rename(final)
            for old in _ours(folder):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)
    except Exception as error:  # torch, safetensors and the system each have their own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        raise CheckpointError(
            f"step {step}: the checkpoint in {folder} cannot be written: {str(error).strip() or type(error).__name__}. "
            f"The model keeps its weights of this step in memory; the last complete checkpoint on disk is "
            f"{newest(folder) or 'none'}, and a new call of fit goes on from there"
        ) from error
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, mine: dict) -> dict | None:
    """Load the newest checkpoint of `folder` and return its progress, or None where there is none.

    Raises `CheckpointError` for one that is damaged, or of another training than `mine`, its `fingerprint`.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
        theirs = progress["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} is damaged ({error}); remove it to start anew") from error
    different = [k for k in {**theirs, **mine} if theirs.get(k, "absent") != mine.get(k, "absent")]
    if different:
        shown = "; ".join(
            f"{k} is {theirs.get(k, 'absent')} there and {mine.get(k, 'absent')} here" for k in different[:3]
        )
        raise CheckpointError(
            f"checkpoint {checkpoint} belongs to another training ({len(different)} differences): {shown}. "
            f"Use another checkpoint_dir, or remove this one"
        )
    try:
        accelerator.load_state(str(checkpoint))  # its pickles with weights_only=True: they hold data, or are refused
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"checkpoint {checkpoint} is damaged ({why}); remove it to start anew") from error
    return progress


def clear(folder: Path) -> None:
    """Remove our own checkpoints, and the folder when nothing else lies in it."""
    for path in _ours(folder):
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
