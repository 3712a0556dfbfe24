#!/usr/bin/env python3
"""One training step of a vision transformer in PyTorch, for comparison with mesa-bench: the same model, batch, precision and kind of data.

Forward, cross-entropy, backward and AdamW on synthetic data that already lie on the device; bf16 by autocast, fused attention, fused AdamW.
timm's model where timm has it and is installed, otherwise (or with --plain) a plain one of the same shape. Prints one JSON line (with --compile both
two, eager first): images/s and milliseconds a step (minimum, median, maximum), peak bytes allocated, and the bytes that autograd saves for the
backward pass.

    tools/peers/torch_step.py --model deit_small --batch 128 --precision bf16 --compile
    tools/peers/torch_step.py --model deit_base --precision bf16 --largest-batch 24e9
"""
import argparse
import gc
import json
import os
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../tests/golden"))  # plain models that tests compare with

SIZES = {"deit_tiny": (192, 3), "deit_small": (384, 6), "deit_base": (768, 12)}  # width, heads; depth 12, patch 16, 224 pixels
TIMM = {**{name: name + "_patch16_224" for name in SIZES}, "swin_tiny": "swin_tiny_patch4_window7_224", "resnet18": "resnet18", "resnet50": "resnet50"}
MODELS = [*SIZES, "swin_tiny", "pvt_tiny", "resnet18", "resnet50"]


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainViT(nn.Module):
    def __init__(self, width, heads, depth=12, patch=16, image=224, classes=1000):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def plain(name):
    if name == "swin_tiny":
        from swin import Swin

        return Swin((224, 224), 4, 96, 3, (2, 2, 6, 2), 7, 1000)
    if name == "pvt_tiny":
        from pvt import Pvt

        return Pvt((224, 224), 4, [(64, 2, 1, 8, 8), (128, 2, 2, 8, 4), (320, 2, 5, 4, 2), (512, 2, 8, 4, 1)], 1000)
    if name in ("resnet18", "resnet50"):
        from resnet import ResNet

        return ResNet(64, (2, 2, 2, 2) if name == "resnet18" else (3, 4, 6, 3), name == "resnet50", 1000)
    return PlainViT(*SIZES[name])


def build(name, want_plain):
    if name in TIMM and not want_plain:
        try:
            import timm

            return timm.create_model(TIMM[name], num_classes=1000, drop_path_rate=0.0), "timm " + timm.__version__
        except ImportError:
            pass
    return plain(name), "plain"


def storage_of(tensor):
    return tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()  # PyTorch 1.13


class Step:
    """A model with its optimizer and one fixed batch."""

    def __init__(self, arguments, batch, compiled):
        self.device = arguments.device
        model, self.source = build(arguments.model, arguments.plain)
        self.raw = model.to(self.device).train()
        self.model = torch.compile(self.raw, mode=arguments.mode) if compiled else self.raw
        fused = {"fused": True} if self.device == "cuda" else {}
        self.optimizer = torch.optim.AdamW(self.raw.parameters(), lr=1e-4, weight_decay=0.05, **fused)
        self.images = torch.randn(batch, 3, 224, 224, device=self.device)
        if arguments.channels_last:
            self.raw.to(memory_format=torch.channels_last)
            self.images = self.images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), device=self.device)
        self.bf16 = arguments.precision == "bf16"
        if self.bf16 and self.device == "cuda":  # as Mesa's come there: no step has to cast them
            self.images = self.images.to(torch.bfloat16)

    def loss(self, model=None):
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
            logits = (model or self.model)(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def saved_bytes(self):
        """Bytes of the tensors that autograd keeps, each storage once; parameters and the images are not counted."""
        known = {storage_of(t).data_ptr() for t in [*self.raw.parameters(), self.images]}
        seen = {}

        def pack(tensor):
            storage = storage_of(tensor)
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(self.raw)
        total = sum(seen.values())
        del loss
        return total


def measure(arguments, compiled):
    step = Step(arguments, arguments.batch, compiled)
    for _ in range(arguments.warmup):
        step()
    step.wait()
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(arguments.steps):
        start = time.perf_counter()
        step()
        step.wait()
        times.append(time.perf_counter() - start)
    start = time.perf_counter()  # and once without a wait between steps, as a loop that reads its losses rarely
    for _ in range(arguments.steps):
        step()
    step.wait()
    unwaited = (time.perf_counter() - start) / arguments.steps
    peak = torch.cuda.max_memory_allocated() if arguments.device == "cuda" else None

    def spread(values):
        return {"minimum": min(values), "median": statistics.median(values), "maximum": max(values)}

    return {
        "source": step.source,
        "step_ms": spread([1e3 * t for t in times]),
        "images_per_second": spread([arguments.batch / t for t in times]),
        "unwaited_images_per_second": arguments.batch / unwaited,
        "peak_bytes": peak,
        "saved_bytes": None if compiled else step.saved_bytes(),
    }


def fits(arguments, batch):
    try:
        step = Step(arguments, batch, arguments.compile == "only")
        step()
        step()
        step.wait()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        step = None
        gc.collect()  # tracebacks of what failed may hold tensors in cycles
        torch.cuda.empty_cache()


def largest_batch(arguments):
    """The largest batch (a multiple of 8) whose step fits into the given bytes."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.largest_batch / total))
    low, high = 0, 8
    while fits(arguments, high):
        low, high = high, 2 * high
    while high - low > 8:
        middle = (low + high) // 16 * 8
        if fits(arguments, middle):
            low = middle
        else:
            high = middle
    return {"largest_batch": low, "bytes": arguments.largest_batch}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="deit_small")
    parser.add_argument("--plain", action="store_true", help="the plain model though timm is installed")
    parser.add_argument("--channels-last", action="store_true", help="memory of images and convolutions in nhwc")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", nargs="?", const="only", choices=["only", "both"], help="torch.compile the model; both: eager first, then compiled")
    parser.add_argument("--mode", default="default", help="torch.compile's mode, e.g. max-autotune")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--largest-batch", type=float, metavar="BYTES", help="only search the largest batch that trains within this much memory")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = arguments.precision != "fp32"
    torch.backends.cudnn.benchmark = True  # as users of ResNets set it
    same = {"model": arguments.model, "batch": arguments.batch, "precision": arguments.precision, "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"}
    for compiled in {None: [False], "only": [True], "both": [False, True]}[arguments.compile]:
        result = largest_batch(arguments) if arguments.largest_batch else measure(arguments, compiled)
        print(json.dumps({**same, "compile": compiled, **result}), flush=True)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
