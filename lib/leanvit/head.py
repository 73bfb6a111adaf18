"""The head of few-shot adaptation: a linear layer on a feature, started from embeddings of the class names.

ELEVATER (arXiv 2204.08790): feature -> BatchNorm without weights -> linear, whose row c is the normalised mean of the
normalised embeddings of the prompts of class c, and whose bias is zero. Features are not normalised and nothing scales
the logits; without the batch norm the predictions are CLIP's zero-shot ones, as scaling an image changes no order.

Known divergence of the released loops, kept as `frozen_after`: those of KAdaptation, LoRA, Adapter and Compacter call
train() once, so their batch norm leaves training mode after the first epoch, with statistics that hardly moved, while
linear probing and full fine-tuning normalise by the batch throughout. The default here has no batch norm at all.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from leanvit import surgery
from leanvit.models import WeightsError


class FewShotHead(nn.Module):
    """`linear(norm(x))`: logits `(B, num_classes)` of features `(B, in_features)`.

    `batch_norm` adds a BatchNorm1d without weights. `frozen_after` is the demonstration named above: after so many
    training steps the norm uses its running statistics, in training too (one epoch of 5 shots is one step or a few).
    Raises `ValueError` for a `frozen_after` below 1 or without the norm.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, batch_norm: bool = False, frozen_after: int | None = None
    ):
        super().__init__()
        if frozen_after is not None and (not batch_norm or frozen_after < 1):
            raise ValueError(f"FewShotHead: frozen_after={frozen_after} needs batch_norm=True and at least 1 step")
        self.in_features, self.frozen_after = in_features, frozen_after
        self.norm = nn.BatchNorm1d(in_features, affine=False) if batch_norm else None
        self.linear = nn.Linear(in_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            if self.frozen_after is not None and self.norm.num_batches_tracked >= self.frozen_after:
                self.norm.eval()
            x = self.norm(x)
        return self.linear(x)


def few_shot_head(
    model: nn.Module,
    num_classes: int,
    *,
    weight: Tensor | None = None,
    batch_norm: bool = False,
    frozen_after: int | None = None,
    keep_projection: bool = False,
) -> FewShotHead:
    """Put a `FewShotHead` in the place of the classifier of a timm model, and return it.

    `weight (num_classes, D)` starts it (see `language_head`), with bias zero. `keep_projection` is for CLIP towers,
    whose classifier in timm is the projection to the text tower's space: it moves before the head, to `fc_norm`, where
    `forward_head(pre_logits=True)` gives the projected feature, and is no longer part of the head (so a frozen backbone
    freezes it). Raises `ValueError`, the model unchanged, for a model without one linear classifier, and a weight of
    another shape.
    """
    surgery.check_whole("few_shot_head", num_classes=num_classes)
    names = surgery.head_modules(model)
    old = model.get_submodule(names[0]) if len(names) == 1 else None
    if isinstance(old, nn.Identity):
        width = getattr(model, "head_hidden_size", None) or model.num_features
    elif isinstance(old, nn.Linear | FewShotHead):
        width = old.in_features
    else:
        what = f"classifiers {', '.join(names)}" if len(names) > 1 else f"classifier {type(old).__name__}"
        raise ValueError(f"few_shot_head: {type(model).__name__} has {what if names else 'no classifier'}; one "
                         "nn.Linear is needed")  # fmt: skip
    if keep_projection:
        if not isinstance(old, nn.Linear) or not isinstance(getattr(model, "fc_norm", None), nn.Identity):
            raise ValueError(
                f"few_shot_head: keep_projection needs a linear head and a free fc_norm, as in timm's CLIP towers; "
                f"{type(model).__name__} has {type(old).__name__} and {type(getattr(model, 'fc_norm', None)).__name__}"
            )
        width = old.out_features
    if weight is not None and tuple(weight.shape) != (num_classes, width):
        raise ValueError(
            f"few_shot_head: weight is {tuple(weight.shape)}; {num_classes} classes on a feature of {width} need "
            f"{(num_classes, width)}"
        )
    like = next(p for p in model.parameters() if p.is_floating_point())
    head = FewShotHead(width, num_classes, batch_norm=batch_norm, frozen_after=frozen_after)
    if weight is not None:
        with torch.no_grad():
            head.linear.weight.copy_(weight)
            head.linear.bias.zero_()
    head.to(like.device, like.dtype)
    surgery.replace(model, names[0], head)
    if keep_projection:
        surgery.replace(model, "fc_norm", old)
    model.num_classes = num_classes
    return head


def language_head(embeddings: str | Path | Mapping[str, Tensor], classes: Sequence[str]) -> Tensor:
    """The head's weight `(C, D)`, rows of norm 1, from class name -> embedding `(D,)`, or of its prompts `(P, D)`.

    `embeddings` is a mapping, or a file of one: .safetensors, .npz or .json. Raises `FileNotFoundError`, and
    `ValueError` for a file that is none, classes without an embedding, and embeddings that are zero, not finite or of
    different widths.
    """
    found = embeddings if isinstance(embeddings, Mapping) else _read_embeddings(Path(embeddings).expanduser())
    where = "the mapping" if isinstance(embeddings, Mapping) else Path(embeddings).name
    missing = [name for name in classes if name not in found]
    if missing:
        near = difflib.get_close_matches(missing[0], list(found), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"language_head: {where} has no embedding of {', '.join(missing[:5])}{more}{hint}")
    if not classes:
        raise ValueError("language_head: no class is named")
    rows = []
    for name in classes:
        try:
            vectors = torch.as_tensor(np.asarray(found[name]) if isinstance(found[name], list) else found[name]).float()
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"language_head: the embedding of {name!r} in {where} is no array of numbers, (D,) or (prompts, D)"
            ) from None
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        if vectors.ndim != 2 or 0 in vectors.shape or not vectors.isfinite().all() or (vectors == 0).all(1).any():
            raise ValueError(
                f"language_head: the embedding of {name!r} in {where} is {tuple(vectors.shape)}; it must be (D,) or "
                "(prompts, D), finite and not zero"
            )
        mean = F.normalize(vectors, dim=1).mean(0)
        if mean.norm() < 1e-6:
            raise ValueError(f"language_head: the prompts of {name!r} in {where} cancel each other, their mean is zero")
        rows.append(F.normalize(mean, dim=0))
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        raise ValueError(f"language_head: the embeddings in {where} have different widths: {widths}")
    return torch.stack(rows)


def _read_embeddings(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"language_head: there is no file {path}; `class_embeddings` makes one's contents")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        found = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ValueError(f"language_head: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"language_head: {path} is no mapping of class names in .safetensors, .npz or .json")
    return found


def class_embeddings(
    classes: Sequence[str], templates: Sequence[str], model_name: str = "ViT-B-32-quickgelu", pretrained: str = "openai"
) -> dict[str, Tensor]:
    """Class name -> embeddings `(templates, D)`, normalised, by the text tower of an open_clip model.

    A template holds `{}` where the name goes. `pretrained` is a tag of open_clip or a file of weights. Store the result
    with `safetensors.torch.save_file(result, "classes.safetensors")`; `language_head` reads it, without open_clip.
    Raises `ImportError` where open_clip is not installed, `WeightsError` where the weights cannot be had, `ValueError`
    for a template without `{}`.
    """
    wrong = [t for t in templates if "{}" not in t]
    if not templates or wrong:
        raise ValueError(f"class_embeddings: templates with {{}} for the class name are needed; got {wrong or 'none'}")
    try:
        import open_clip
    except ImportError:
        raise ImportError(
            "class_embeddings: open_clip is not installed: `pip install open_clip_torch`, or give language_head a file "
            "of class embeddings that were made elsewhere"
        ) from None
    try:
        model = open_clip.create_model(model_name, pretrained=pretrained).eval()
        tokenize = open_clip.get_tokenizer(model_name)
    except (OSError, RuntimeError, ValueError) as error:  # the hub's errors are all OSError or ValueError
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"class_embeddings: open_clip cannot make {model_name} with weights {pretrained!r} here ({first}); give "
            "pretrained=<file>, or fetch the weights on a machine with a network"
        ) from None
    with torch.no_grad():
        prompts = {name: tokenize([t.replace("{}", name) for t in templates]) for name in classes}
        return {name: F.normalize(model.encode_text(tokens).float(), dim=1) for name, tokens in prompts.items()}
