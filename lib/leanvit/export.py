"""Take a model out of Python: torch.export's .pt2, or ONNX where the packages onnx and onnxscript are installed.

Cut models (ComCAT, UVC) export as they are: their modules are linear layers and fused attention. A method that hangs
something on the backward pass or adds branches must be merged or detached first, and the error says which.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from leanvit.evaluate import modes_restored
from leanvit.uvc_modules import refuse_open_search

# whose modules are for training, and the way back; adapters in series (Adapter, Compacter) are plain layers and stay
LEFT = {
    "lbp_wht": "lbp_wht.detach(model)",
    "kadaptation": "kadaptation.merge(model)",
    "lora": "baselines.merge(model)",
    "baselines": "baselines.merge(model)",
    "comcat_diffusion": "comcat_diffusion.merge(model)",
}
SUFFIXES = (".pt2", ".onnx")


def left_behind(model: nn.Module) -> dict[str, str]:
    """`{module name: way back}` for modules of attached methods, which cannot be exported."""
    found = {}
    for name, module in model.named_modules():
        package, _, room = type(module).__module__.rpartition(".")
        if package.split(".")[0] == "peft":  # LoRA and VeRA of the library
            found[name] = LEFT["baselines"]
        if package == "leanvit" and room in LEFT and type(module).__name__ != "WideAttention":
            found[name] = LEFT[room]
    return found


def export(model: nn.Module, path: str | Path, example: Tensor, *, dynamic_batch: bool = True) -> Path:
    """Write `model`, in eval mode, to a file ending in .pt2 (`torch.export.load`) or .onnx.

    Args:
        example: images `(B, 3, H, W)`, B >= 2 where `dynamic_batch` (torch takes a batch of 1 for a constant).

    The folder of `path` is made where there is none.

    Raises:
        ValueError: another suffix, too small a batch, a method that is still attached (merge or detach it first), or an
            open search of UVC.
        ImportError: .onnx without onnx and onnxscript.

    >>> import torch
    >>> from leanvit import export, models
    >>> model, images = models.create("embedded_vit", depth=1), torch.rand(2, 3, 32, 32)
    >>> path = export.export(model, "small.pt2", images)
    >>> torch.export.load(path).module()(images[:1]).shape  # any number of images
    torch.Size([1, 10])
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"export: {path.name} must end in {' or '.join(SUFFIXES)}")
    if dynamic_batch and example.shape[0] < 2:
        raise ValueError("export: example holds one image; give two, or dynamic_batch=False")
    refuse_open_search(model, "export")
    left = left_behind(model)
    if left:
        name, back = next(iter(left.items()))
        kind = type(model.get_submodule(name)).__name__
        raise ValueError(f"export: {name} is a {kind}, which is for training; call {back} first")
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    with modes_restored(model), torch.no_grad():
        model.eval()
        if path.suffix == ".pt2":
            program = torch.export.export(model, (example,), dynamic_shapes=shapes)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.export.save(program, path)
            return path
        missing = [p for p in ("onnx", "onnxscript") if importlib.util.find_spec(p) is None]
        if missing:
            raise ImportError(f"export: {path.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.onnx.export(model, (example,), str(path), dynamo=True, dynamic_shapes=shapes, verbose=False)
    return path
