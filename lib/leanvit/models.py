"""Vision transformers: any timm model with hub weights or a local file, and the embedded backbone.

`embedded_vit` is a small DeiT-like ViT for 32 x 32 images: patches of 4 pixels, a grid of 8 x 8 and a class token, six
blocks of width 96 with three heads, 683,242 parameters with ten classes. `notebooks/0_backbone.ipynb` trained the
committed weights; their recipe and accuracy stand in the file's header (`load_checkpoint` returns it).
"""

import difflib
import inspect
import json
import pickle
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import timm
import timm.data
import torch
import torchvision.transforms as tvt
from PIL import Image
from safetensors import safe_open
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.transforms.functional import to_pil_image

from leanvit import surgery

EMBEDDED_WEIGHTS = Path(__file__).parent / "assets" / "embedded_vit.safetensors"
# mean and standard deviation of the 10,000 embedded training images at 32 x 32, border included
EMBEDDED_CFG = {
    "architecture": "embedded_vit",
    "input_size": (3, 32, 32),
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "mean": (0.2175, 0.2175, 0.2175),
    "std": (0.3301, 0.3301, 0.3301),
    "num_classes": 10,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


class WeightsError(ValueError):
    """Weights that do not fit the model or cannot be read. The message is one line."""


def create(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    img_size: int | tuple[int, int] | None = None,
    **timm_kwargs,
) -> nn.Module:
    """The model `name`: "embedded_vit" or any name of timm.

    `checkpoint`: "embedded" (the committed weights of embedded_vit) or a file, see `load_checkpoint`. `pretrained`:
    timm's weights from the hub. `num_classes`: None takes as many as the file's classifier has (without a file, or
    with .npz: the architecture's own number; a file without a classifier needs a number); where a number differs from
    the checkpoint's, the head starts anew; where it does not, the checkpoint's head is kept, as timm does. `img_size`:
    side, or (height, width), in pixels. Raises `WeightsError` when weights do not fit or cannot be reached,
    `ValueError` for an unknown name or for weights asked for twice.

    >>> from leanvit import models
    >>> model = models.create("embedded_vit", checkpoint="embedded")
    >>> sum(p.numel() for p in model.parameters())
    683242
    """
    if checkpoint is not None and pretrained:
        raise ValueError(f"{name}: give checkpoint={str(checkpoint)!r} or pretrained=True, not both")
    if checkpoint == "embedded" and name != "embedded_vit":
        raise ValueError(f'checkpoint="embedded" holds weights of embedded_vit, not of {name}')
    if img_size is not None:
        timm_kwargs["img_size"] = img_size
    if name == "embedded_vit":
        if pretrained:
            raise ValueError('embedded_vit has no weights on the hub: use checkpoint="embedded"')
        model = _embedded_vit(10 if num_classes is None else num_classes, **timm_kwargs)
    else:
        if num_classes is not None:
            timm_kwargs["num_classes"] = num_classes
        model = _timm_model(name, pretrained, timm_kwargs)
    if checkpoint is not None:
        path = EMBEDDED_WEIGHTS if checkpoint == "embedded" else checkpoint
        _load(model, path, head="own" if num_classes is None else "new")
    return model


def _embedded_vit(num_classes: int, **kwargs) -> VisionTransformer:
    settings = dict(img_size=32, patch_size=4, embed_dim=96, depth=6, num_heads=3, mlp_ratio=4.0)
    settings |= dict(weight_init="jax")  # Xavier: timm's default of std 0.02 is small for this width and starts slowly
    model = VisionTransformer(num_classes=num_classes, **settings | kwargs)
    model.pretrained_cfg = model.default_cfg = dict(EMBEDDED_CFG)
    return model


def _timm_model(name: str, pretrained: bool, kwargs: dict) -> nn.Module:
    base = name.split(".")[0]
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(base):
        near = difflib.get_close_matches(base, ["embedded_vit", *timm.list_models()], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists what there is"
        raise ValueError(f"unknown model {name!r}: {hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, RuntimeError, ValueError) as error:  # the hub's errors are all OSError or ValueError
        if not pretrained:
            raise
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(base) else None
        where = getattr(cfg, "hf_hub_id", None) or getattr(cfg, "url", None) or name
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"the weights of {name} ({where}) cannot be had here ({type(error).__name__}: {first}); on a machine "
            f"with a network run `hf download {where}` and copy its cache ($HF_HOME, else ~/.cache/huggingface) here, "
            "or give checkpoint=<file>"
        ) from None


def load_checkpoint(model: nn.Module, path: str | Path, *, new_head: bool = False) -> dict:
    """Load `path` (.safetensors, .pth/.pt/.bin, or .npz of the original JAX ViTs) strictly; returns its JSON header.

    Prefixes of wrappers ("module.") and keys like "state_dict" or "model" are taken off; position grids and patch
    kernels of another size are resampled by the model's own timm filter, and named under "resampled" in the header.
    `new_head`: a classifier of another number of classes, or none, is left out and the model's own stays.
    Raises `WeightsError` that lists what is missing, unexpected and of another shape; the model is then unchanged.
    """
    return _load(model, path, head="new" if new_head else "strict")


def _load(model: nn.Module, path: str | Path, head: str) -> dict:
    """`load_checkpoint`; with `head="own"` the model gets as many classes as the file's classifier has."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise WeightsError(f"{path}: no such file of weights (cwd {Path.cwd().name}/)")
    if path.suffix == ".npz":
        return _load_npz(model, path)
    tensors, header = _read(path)
    original = {key: tuple(value.shape) for key, value in tensors.items()}
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    cannot = ""
    if filter_fn is not None:
        try:
            tensors = filter_fn(dict(tensors), model)
        except (RuntimeError, ValueError, AssertionError, AttributeError, KeyError, TypeError) as error:
            cannot = f"{path}: timm cannot convert it for {type(model).__name__}: {' '.join(str(error).split())}"
    if head == "own":
        _as_many_classes(model, tensors)
    wanted = model.state_dict()
    own = set()
    if head == "new":
        parts = {name.split(".")[0] for name in _classifiers(model)}
        own = surgery.head_parameters(model) | {k for k in tensors if k.split(".")[0] in parts}
        for key in own:
            if key not in wanted or key not in tensors or tensors[key].shape != wanted[key].shape:
                tensors.pop(key, None)
        if not own <= tensors.keys():
            tensors |= {key: wanted[key] for key in own if key in wanted}
    if problems := _differences(tensors, wanted):
        raise WeightsError(f"{path}: does not fit the model: {'; '.join(problems)}{_sizes(original, wanted)}")
    if cannot:
        raise WeightsError(cannot)
    model.load_state_dict(tensors, strict=True)
    resampled = [
        f"{key} {original[key]} -> {tuple(value.shape)}"
        for key, value in tensors.items()
        if key not in own and key in original and original[key] != tuple(value.shape)
    ]
    return header | ({"resampled": resampled} if resampled else {})


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and JSON header (`{}` when there is none) of a file of weights."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            return clean_state_dict(tensors), _header(metadata)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path}: holds more than tensors, so it is not opened (it could run code); save its state_dict alone, "
            "best with safetensors.torch.save_file"
        ) from None
    except Exception as error:  # a file of anything makes torch.load fail in any way
        why = (str(error).splitlines() or ["the file ends too early"])[0]
        raise WeightsError(f"{path}: cannot be read as weights ({why})") from None
    for key in ("state_dict", "model", "teacher", "student"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise WeightsError(f"{path}: no dictionary of tensors, nor one under state_dict or model (found: {keys})")
    return clean_state_dict(content), {}


def _header(metadata: dict[str, str]) -> dict:
    try:
        return dict(json.loads(metadata.get("header", "{}")))
    except (ValueError, TypeError):
        return {}  # somebody else's use of the word


def _load_npz(model: nn.Module, path: Path) -> dict:
    if not hasattr(model, "load_pretrained"):
        raise WeightsError(f"{path}: timm does not read .npz files for {type(model).__name__}; convert it first")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            blocks = {int(m[1]) for key in archive.files if (m := re.search(r"encoderblock_(\d+)/", key))}
        if hasattr(model, "blocks") and blocks and len(blocks) != len(model.blocks):
            raise ValueError(f"it has {len(blocks)} blocks, the model {len(model.blocks)}")
        model.load_pretrained(str(path))
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError, zipfile.BadZipFile) as error:
        model.load_state_dict(before)
        raise WeightsError(f"{path}: does not fit the model: {error}") from None
    return {}


def _classifiers(model: nn.Module) -> list[str]:
    """Names of the classifier's layers, also of a classifier that the model was made without."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return [named] if isinstance(named, str) else list(named)


def _as_many_classes(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give the model as many classes as the classifier among `tensors` has, where there is one that fits otherwise."""
    wanted, has = model.state_dict(), getattr(model, "num_classes", None)
    sizes = {
        len(tensors[key])
        for key in (f"{name}.weight" for name in _classifiers(model))
        if key in tensors and (tensors[key].shape[1:] == wanted[key].shape[1:] if key in wanted else has == 0)
    }
    if len(sizes) == 1 and sizes != {has}:
        model.reset_classifier(sizes.pop())


def _differences(tensors: dict, wanted: dict) -> list[str]:
    def listed(word: str, entries: list[str]) -> list[str]:
        more = f" and {len(entries) - 8} more" if len(entries) > 8 else ""
        return [f"{len(entries)} {word}: {', '.join(entries[:8])}{more}"] if entries else []

    shapes = [
        f"{key} {tuple(tensors[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in tensors and tensors[key].shape != wanted[key].shape
    ]
    return (
        listed("missing", [key for key in wanted if key not in tensors])
        + listed("unexpected", [key for key in tensors if key not in wanted])
        + listed("of another shape", shapes)
    )


def _sizes(original: dict, wanted: dict) -> str:
    """A hint where depth or width differ, for models whose blocks are named blocks.<i>."""

    def size(shapes: dict) -> tuple[int, int | None]:
        depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
        width = next((shape[0] for key, shape in shapes.items() if key.endswith("norm1.weight")), None)
        return depth, width

    have, want = size(original), size({key: tuple(value.shape) for key, value in wanted.items()})
    if have == want or not have[0] or not want[0]:
        return ""
    return f" (the file holds {have[0]} blocks of width {have[1]}, the model {want[0]} of width {want[1]})"


def token_grid(model: nn.Module) -> tuple[tuple[int, int], int]:
    """((h, w), prefix tokens) of a model with a patch embedding; class and register tokens are prefix tokens.

    Raises `ValueError` for a model without one.

    >>> from leanvit import models
    >>> models.token_grid(models.create("embedded_vit"))
    ((8, 8), 1)
    """
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if grid is None:
        raise ValueError(f"{type(model).__name__} has no patch embedding with a token grid (patch_embed.grid_size)")
    return (int(grid[0]), int(grid[1])), int(getattr(model, "num_prefix_tokens", 0))


def transforms(model: nn.Module, train: bool, **augment) -> "Transform":
    """The model's own preprocessing (size, crop, interpolation, mean, std), with timm's augmentation for training.

    The result takes a PIL image, or a uint8 tensor `(3, H, W)` or `(B, 3, H, W)`, and returns normalised float32.
    `augment`: keywords of `timm.data.create_transform` (scale, ratio, hflip, color_jitter, auto_augment, re_prob, …),
    and `padding`: pad by that many pixels and cut at random instead of a random resized crop. As in DeiT's training
    code, models for images up to 32 pixels start from padding=4, without colour jitter; others from timm's defaults.
    Random numbers come from torch's, numpy's and Python's global generators. Raises `ValueError` for other keywords,
    and for any without `train`.

    >>> import torch
    >>> from leanvit import models
    >>> transform = models.transforms(models.create("embedded_vit"), train=False)
    >>> transform(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape
    torch.Size([2, 3, 32, 32])
    """
    if not train and augment:
        raise ValueError(f"augmentation ({', '.join(augment)}) needs train=True")
    config = timm.data.resolve_model_data_config(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][-2:]
    config["input_size"] = (3, *size)
    return Transform(config, train, augment)


class Transform:
    """See `transforms`. `batched` says that it takes uint8 tensors `(B, 3, H, W)`, too, a whole batch at once.

    Raises `ValueError` for an unknown augmentation, and when it is called with images of another kind.
    """

    batched = True

    def __init__(self, config: dict, train: bool, augment: dict):
        self.config, self.train, size = config, train, config["input_size"][-2:]
        small = train and max(size) <= 32 and not {"scale", "ratio", "train_crop_mode"} & augment.keys()
        self.augment = ({"padding": 4, "color_jitter": None} if small else {}) | augment
        known = set(inspect.signature(timm.data.create_transform).parameters) - config.keys() | {"padding"}
        for key in self.augment.keys() - known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"unknown augmentation {key!r}{f' (did you mean {near[0]}?)' if near else ''}")
        timm_augment = {key: value for key, value in self.augment.items() if key != "padding"}
        self.pil = timm.data.create_transform(**config, is_training=train, **timm_augment)
        if train and self.augment.get("padding") is not None:
            resize = tvt.Resize(size, interpolation=timm.data.transforms.str_to_interp_mode(config["interpolation"]))
            self.pil.transforms[:1] = [resize, tvt.RandomCrop(size, padding=self.augment["padding"])]
        self.mean, self.std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def __repr__(self) -> str:
        return f"Transform(train={self.train}, {self.config}, {self.augment})"

    def __call__(self, images: Image.Image | torch.Tensor) -> torch.Tensor:
        if isinstance(images, Image.Image):
            return self.pil(images.convert("RGB"))
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise ValueError(f"expected a PIL image or uint8 (..., 3, H, W), got {images.dtype} {tuple(images.shape)}")
        as_they_are = tuple(images.shape[-2:]) == tuple(self.config["input_size"][-2:]) and self.config["crop_pct"] == 1
        if self.train or not as_they_are:  # as PIL does it, one by one: every image has its own random numbers
            each = [self.pil(to_pil_image(image)) for image in images.reshape(-1, *images.shape[-3:])]
            return torch.stack(each) if images.ndim == 4 else each[0]
        return images.float().div_(255).sub_(self.mean).div_(self.std)
