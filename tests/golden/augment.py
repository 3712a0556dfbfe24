#!/usr/bin/python3
"""Writes augment.safetensors, the reference of augment_test.cpp: what timm and Pillow make of small pictures.

Needs timm 0.9.16, Pillow (written with 13.0), torchvision, numpy and safetensors; the tests read the file only. Run in this folder:
    python3 augment.py
picture/<name> are the inputs. op/<name>/<operation of timm>/<argument>[/<filter>] is the picture after the operation; what comes in from
outside has the colour FILL. hue/<name>/<turn> is torchvision's adjust_hue; the picture `colors` holds a third of the 16^3 mixtures of
multiples of 17. levels/<operation> holds the argument for each of `magnitudes`, without and with a minus sign. simple is the
picture `rgb` with its shorter side at 12 and 4 pixels of reflection around it.
"""
import random

import numpy as np
import torchvision.transforms as transforms
import torchvision.transforms.functional as functional
from PIL import Image
from safetensors.numpy import save_file
from timm.data import auto_augment
from timm.data.distributed_sampler import RepeatAugSampler

FILL = (124, 116, 104)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
out = {}


def picture(height, width, channels, seed):
    """Slopes with noise and some places at the ends of the range."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [60 + 140 * x / width, 30 + 180 * y / height, 200 - 120 * (x + y) / (width + height)][:channels]
    values = np.stack(planes, -1) + g.normal(0, 25, (height, width, channels))
    values[g.random((height, width)) < 0.06] = 300
    values[g.random((height, width)) < 0.06] = -40
    return np.clip(values, 0, 255).astype(np.uint8)


pictures = {
    "rgb": picture(20, 24, 3, 1),
    "gray": picture(20, 24, 1, 2),
    "large": picture(50, 60, 1, 3),  # more pixels than values: equalize has steps
    "thin": picture(9, 2, 3, 4),  # narrower than a 3 x 3 filter
    "flat": np.stack([np.full((20, 24), 77), np.indices((20, 24)).sum(0) % 2 * 90 + 20, picture(20, 24, 1, 5)[..., 0]], -1).astype(np.uint8),
}
for name, pixels in pictures.items():
    out[f"picture/{name}"] = pixels


def case(name, operation, argument=0, kernel=None):
    pixels = pictures[name]
    channels = pixels.shape[2]
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    keywords = dict(fillcolor=FILL if channels == 3 else FILL[0], resample=FILTERS[kernel or "bicubic"])
    arguments = () if operation in ("AutoContrast", "Equalize", "Invert") else (argument,)
    result = np.asarray(auto_augment.NAME_TO_OP[operation](image, *arguments, **keywords))
    out["/".join(["op", name, operation, repr(argument)] + ([kernel] if kernel else []))] = np.array(result).reshape(pixels.shape)


for operation in ("AutoContrast", "Equalize"):
    for name in pictures:
        case(name, operation)
for name in ("rgb", "gray"):
    case(name, "Invert")
    for bits in (1, 4, 8) if name == "rgb" else (2,):
        case(name, "Posterize", bits)
    for threshold in (0, 128, 256) if name == "rgb" else (26,):
        case(name, "Solarize", threshold)
    for add in (0, 99, 128) if name == "rgb" else (110,):
        case(name, "SolarizeAdd", add)
    for operation in ("Color", "Contrast", "Brightness", "Sharpness"):
        for factor in (0.0, 0.1, 0.73, 1.0, 1.9, 2.8) if name == "rgb" else (0.3, 1.81):
            case(name, operation, factor)
    for sigma in (0.1, 0.7, 1.3, 2.0, 6.5) if name == "rgb" else (0.4, 2.0):
        case(name, "GaussianBlur", sigma)
    for kernel in FILTERS:
        for degrees in (-30.0, 13.7, 90.0, 180.0, 0.0) if name == "rgb" else (-27.0,):
            case(name, "Rotate", degrees, kernel)
        for shear in (-0.3, 0.11):
            case(name, "ShearX", shear, kernel)
            case(name, "ShearY", shear, kernel)
        for share in (-0.45, 0.21) if name == "rgb" else (0.3,):
            case(name, "TranslateXRel", share, kernel)
            case(name, "TranslateYRel", share, kernel)
for operation, argument in (("Sharpness", 1.9), ("GaussianBlur", 2.0), ("GaussianBlur", 9.0), ("Contrast", 0.4)):
    case("thin", operation, argument)
case("thin", "Rotate", 21.0, "bicubic")

colors = np.array([(r, g, b) for r in range(0, 256, 17) for g in range(0, 256, 17) for b in range(0, 256, 17)], np.uint8)[1::3]
pictures["colors"] = np.ascontiguousarray(colors[: 35 * 39].reshape(35, 39, 3))
out["picture/colors"] = pictures["colors"]
for name, turns in (("rgb", (-0.5, -0.1, 0.0, 0.003, 0.1, 0.37, 0.5)), ("gray", (0.2,)), ("flat", (-0.3,)), ("colors", (0.1,))):
    pixels = pictures[name]
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    for turn in turns:
        out[f"hue/{name}/{turn!r}"] = np.array(functional.adjust_hue(image, turn)).reshape(pixels.shape)

magnitudes = [0, 0.7, 2.5, 5, 8.49, 9, 10, 14.2]
out["magnitudes"] = np.array(magnitudes)
for operation, level in auto_augment.LEVEL_TO_ARG.items():
    if level is None or operation in ("TranslateX", "TranslateY", "PosterizeOriginal", "GaussianBlurRand"):
        continue
    rows = []
    for draw in (0.0, 1.0):
        random.random = lambda draw=draw: draw
        rows.append([float(level(m, {})[0]) for m in magnitudes])
    out[f"levels/{operation}"] = np.array(rows)

rgb = Image.fromarray(pictures["rgb"])
small = transforms.Resize(12, interpolation=transforms.InterpolationMode.BICUBIC)(rgb)
out["simple"] = np.array(transforms.Pad(4, padding_mode="reflect")(small))
for rank in range(2):
    sampler = RepeatAugSampler(range(10), num_replicas=2, rank=rank, shuffle=False, num_repeats=3, selected_round=0)
    out[f"repeats/{rank}"] = np.array(list(sampler), dtype=np.int64)

save_file({name: np.ascontiguousarray(out[name]) for name in sorted(out)}, "augment.safetensors")
