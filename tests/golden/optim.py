#!/usr/bin/python3
"""Writes optim.safetensors, the reference numbers of tests/optim/optimizer_test.cpp: ten steps of each optimizer in PyTorch (float64)
and the moving averages of the weights.

SGD and AdamW are torch.optim's (written with PyTorch 1.13, Debian's python3-torch), LAMB and the average (ModelEmaV3) timm 0.9.16's. The
folder of timm is an argument, and two files are read from it, since timm as a whole wants torchvision:
    /usr/bin/python3 optim.py .../site-packages/timm
Four parameters: `weight` and `zero` (whose first values are 0) with decay, `scaled` with decay and half the learning rate, and `bias`
without decay. The learning rate of step t = 1 .. 10 is 0.02 t; gradients are given and the same for all optimizers.
"""
import importlib.util
import json
import struct
import sys

import torch
from torch import nn

STEPS, DECAY = 10, 0.1
SHAPES = {"weight": (5, 7), "zero": (4,), "scaled": (2, 3), "bias": (9,)}


def load(path):
    spec = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(path, tensors):
    header, data = {}, b""
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().contiguous().double().numpy().tobytes()
        header[name] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def half_precise(x):
    """Rounded to float32, so that single and double precision start from the same numbers."""
    return x.float().double()


class Weights(nn.Module):
    def __init__(self, start):
        super().__init__()
        for name, value in start.items():
            setattr(self, name, nn.Parameter(value.clone()))


def run(out, name, start, gradients, make, averages=()):
    model = Weights(start)
    groups = [{"params": [model.weight, model.zero], "weight_decay": DECAY, "scale": 1.0},
              {"params": [model.scaled], "weight_decay": DECAY, "scale": 0.5},
              {"params": [model.bias], "weight_decay": 0.0, "scale": 1.0}]
    optimizer = make(groups)
    averages = {key: ema(model) for key, ema in averages}
    for step in range(1, STEPS + 1):
        for key, p in model.named_parameters():
            p.grad = gradients[key][step - 1].clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * step * group["scale"]
        optimizer.step()
        for ema in averages.values():
            ema.update(model, step=step)
        if step in (1, STEPS):
            out.update({f"{name}/{step}/{key}": p.detach().clone() for key, p in model.named_parameters()})
            for which, ema in averages.items():
                out.update({f"{which}/{step}/{key}": p.detach().clone() for key, p in ema.module.named_parameters()})


def main():
    Lamb = load(sys.argv[1] + "/optim/lamb.py").Lamb
    Ema = load(sys.argv[1] + "/utils/model_ema.py").ModelEmaV3
    torch.manual_seed(99)
    start = {name: half_precise(torch.randn(shape) * (0.0 if name == "zero" else 0.5)) for name, shape in SHAPES.items()}
    gradients = {name: half_precise(torch.randn(STEPS, *shape)) for name, shape in SHAPES.items()}
    out = {"start/" + name: value for name, value in start.items()}
    out.update({"gradient/" + name: value for name, value in gradients.items()})
    sgd, far = torch.optim.SGD, 1e9  # no clipping within LAMB: the engine clips before
    betas = (0.8, 0.95)
    averages = [("average", lambda m: Ema(m, decay=0.7, foreach=False)),
                ("warm_average", lambda m: Ema(m, decay=0.7, use_warmup=True, foreach=False))]
    run(out, "adamw", start, gradients, lambda g: torch.optim.AdamW(g, lr=1, betas=betas, eps=1e-6), averages)
    run(out, "sgd", start, gradients, lambda g: sgd(g, lr=1))
    run(out, "momentum", start, gradients, lambda g: sgd(g, lr=1, momentum=0.9))
    run(out, "nesterov", start, gradients, lambda g: sgd(g, lr=1, momentum=0.9, nesterov=True))
    run(out, "lamb", start, gradients, lambda g: Lamb(g, lr=1, betas=betas, eps=1e-6, max_grad_norm=far))
    run(out, "lambc", start, gradients, lambda g: Lamb(g, lr=1, betas=betas, eps=1e-6, max_grad_norm=far, trust_clip=True))
    save("optim.safetensors", out)


main()
