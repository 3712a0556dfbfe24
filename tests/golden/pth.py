#!/usr/bin/python3
"""Writes pth/: small checkpoints of torch.save, for the test of tools/pth_to_safetensors.py, and pth/expected.safetensors.

Needs torch (written with 2.15) and safetensors; the test needs Python alone. Run in this folder:
    python3 pth.py
zip.pth and legacy.pth hold the same in both formats of torch.save: the weights below under `model` with the prefix module., the same times
two under `model_ema`, the arguments of a training, an optimizer's state. timm.pth has a table named state_dict, bare.pth the table alone.
evil.pth asks for os.system. module.pth is a whole pickled module.
"""
import argparse
import os
from collections import OrderedDict

import torch
from safetensors.torch import save_file

base = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8 - 1
weights = OrderedDict(
    f32=base,
    transposed=base.t(),  # strides of its own, the storage of f32
    part=base[1:3, 2:5],  # a view in the middle of that storage
    parameter=torch.nn.Parameter(torch.tensor([0.1, -2.5])),
    f16=torch.tensor([1.5, -0.25, 65504, 6e-8, float("inf"), float("nan"), -0.0]).half(),
    bf16=torch.tensor([3.140625, -1e30]).bfloat16(),
    f64=torch.tensor([[1 / 3]], dtype=torch.float64),
    num_batches_tracked=torch.tensor(1251),
    i32=torch.tensor([-7, 2**31 - 1], dtype=torch.int32),
    mask=torch.tensor([True, False, True]),
    bytes=torch.tensor([0, 255], dtype=torch.uint8),
    empty=torch.zeros(0, 3),
)
weights = OrderedDict((f"blocks.{i % 2}.{name}", tensor) for i, (name, tensor) in enumerate(weights.items()))
ema = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, "pth/expected.safetensors")

wrapped = OrderedDict((f"module.{name}", tensor) for name, tensor in weights.items())
wrapped._metadata = OrderedDict([("", {"version": 1})])
everything = {
    "model": wrapped,
    "model_ema": ema,
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]},
    "epoch": 3,
    "args": argparse.Namespace(model="deit_tiny_patch16_224", lr=1e-3, device=torch.device("cpu")),
}
torch.save(everything, "pth/zip.pth")
torch.save(everything, "pth/legacy.pth", _use_new_zipfile_serialization=False)
torch.save({"state_dict": weights, "arch": "x"}, "pth/timm.pth")
torch.save(weights, "pth/bare.pth")
torch.save(torch.nn.Linear(2, 2), "pth/module.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


torch.save({"model": {"w": base}, "more": Evil()}, "pth/evil.pth")
torch.save({"model": {"w": base}, "more": Evil()}, "pth/evil_legacy.pth", _use_new_zipfile_serialization=False)
