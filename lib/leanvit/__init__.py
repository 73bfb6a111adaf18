"""leanvit: vision transformers, cheap to adapt and cheap to run.

A method attaches to a timm model in place; `leanvit.save` stores what it trained or cut, `leanvit.load` puts it back.

>>> import leanvit, timm
>>> from leanvit.lora import lora_qv
>>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2,
...                           num_heads=2, num_classes=4)
>>> print(lora_qv(model, rank=2))  # then train it: leanvit.train.fit, or any loop
lora_qv: 2 layers, 644 of 32,868 parameters trained
>>> leanvit.save(model, "adapted.safetensors").name
'adapted.safetensors'
"""

__all__ = ["load", "save"]


def __getattr__(name: str):
    # on demand, so that the command line starts without importing torch
    if name in __all__:
        from leanvit import cuts

        return getattr(cuts, name)
    raise AttributeError(f"module 'leanvit' has no attribute {name!r}")
