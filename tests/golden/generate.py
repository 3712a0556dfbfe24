#!/usr/bin/python3
"""Writes the reference numbers of golden_test.cpp: a tiny DeiT in PyTorch (float64), its gradients, and ten AdamW steps.

Needs Debian's python3-torch (written with 1.13); the tests themselves read the files only. Run in this folder:
    /usr/bin/python3 generate.py
The models have timm's parameter names and structure: pre-norm, exact GELU, eps 1e-6, a class token and the head on norm(x)[:, 0].
mean_pool pools the patch tokens' mean and normalizes after that (fc_norm), without a class token. distilled has a second token and head, and
averages both. deit3 scales each branch by factors of its own (LayerScale), has two register tokens, and positions for patches alone.
swin (swin.py) has a picture that is not square and a second stage that windows do not tile; swin_odd one head, one picture, an odd grid
as wide as its windows; swin_even grids that need no padding. pvt (pvt.py)
has two stages and a picture that is not square; pvt_long four, of which three reduce, and one picture. resnet (resnet.py) has bottlenecks
and resnet_basic none; their pictures are odd and not square, and resnet_one has one picture. Their logits, loss and gradients are those of
training, running/ the running statistics after that pass and after/ those after ten more, and eval_logits what these statistics make.
resize has grids and what torch.nn.functional.interpolate makes of them (bicubic, corners not aligned).
Files named as arguments are written; without arguments all are.
"""
import json
import struct
import sys

import torch
from torch import nn
import torch.nn.functional as F

from pvt import Pvt
from resnet import ResNet
from swin import Swin

IMAGE, PATCH, CHANNELS, WIDTH, HEADS, CLASSES, BATCH = 16, 4, 3, 24, 3, 7, 3
LR, DECAY, CLIP, SMOOTHING = 1e-3, 0.05, 1.0, 0.1


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-2, -1) * (c // HEADS) ** -0.5).softmax(-1)
        return self.proj((p @ v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.ls1 = LayerScale() if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = Mlp()
        self.ls2 = LayerScale() if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Vit(nn.Module):
    def __init__(self, class_token, depth, distilled=False, registers=0, layer_scale=False, token_positions=True):
        super().__init__()
        patches = (IMAGE // PATCH) ** 2
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.head_dist = nn.Linear(WIDTH, CLASSES)
        if registers:
            self.reg_token = nn.Parameter(torch.zeros(1, registers, WIDTH))
        prefix = self.prefix = class_token + distilled + registers
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + (prefix if token_positions else 0), WIDTH))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.Sequential(*[Block(layer_scale) for _ in range(depth)])
        if class_token:
            self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        else:
            self.fc_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.class_token, self.distilled, self.token_positions = class_token, distilled, token_positions

    def forward(self, images):
        x = self.patch_embed(images)
        if not self.token_positions:
            x = x + self.pos_embed
        front = [getattr(self, name) for name in ("cls_token", "dist_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([token.expand(len(x), -1, -1) for token in front] + [x], 1)
        if self.token_positions:
            x = x + self.pos_embed
        x = self.blocks(x)
        if self.distilled:
            x = self.norm(x)
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(self.norm(x)[:, 0] if self.class_token else self.fc_norm(x[:, self.prefix :].mean(1)))


def save(path, tensors):
    types = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64"}
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": types[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def half_precise(x):
    """Rounded to float32, so that single and double precision start from the same numbers (and the start weights take half the space)."""
    return x.float().double()


def is_gain(name):
    return name.endswith("weight") and ("norm" in name or ".bn" in name or name.startswith("bn") or name.endswith("downsample.1.weight"))


def statistics(model):
    """Running statistics of batch norms."""
    return {name: b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def generate(path, make_model, steps, image=(IMAGE, IMAGE), batch=BATCH):
    if len(sys.argv) > 1 and path not in sys.argv[1:]:
        return
    torch.manual_seed(1234)
    model = make_model().double()
    with torch.no_grad():
        for name, p in model.named_parameters():  # nothing is at a special value: gains near one, everything else spread out
            p.copy_(half_precise(torch.randn_like(p) * 0.15 + (1.0 if is_gain(name) else 0.0)))
            if name == "bn1.bias":
                p.copy_(half_precise(p - 1.0))  # or a channel is nowhere 0 behind the pooling, and the next norm takes away what its bias does
        for name, b in model.named_buffers():
            if name.endswith("running_var"):
                b.copy_(half_precise(torch.rand_like(b) + 0.5))
            elif name.endswith("running_mean"):
                b.copy_(half_precise(torch.randn_like(b) * 0.15))
    images = torch.randn(batch, CHANNELS, *image)
    labels = torch.tensor([5, 0, 3])[:batch]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = {"weight/" + name: p.float() for name, p in start.items()}
    out.update({"weight/" + name: b.float() for name, b in statistics(model).items()})
    out.update({"images": images, "labels": labels})

    logits = model(images.double())
    loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
    loss.backward()
    out.update({"logits": logits, "loss": loss.reshape(1)})
    out.update({"gradient/" + name: p.grad.clone() for name, p in model.named_parameters()})
    out.update({"running/" + name: b.clone() for name, b in statistics(model).items()})

    without = ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table")
    plain = [p for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith(without)]
    decayed = [p for name, p in model.named_parameters() if not (p.ndim <= 1 or name.endswith(without))]  # PVT's pos_embed1.. among them
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.999))
    norms = []
    if steps == 0:
        save(path, out)
        return
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images.double()), labels, label_smoothing=SMOOTHING).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).reshape(1))
        optimizer.step()
    out["gradient_norms"] = torch.cat(norms)
    out.update({"after/" + name: p for name, p in [*model.named_parameters(), *statistics(model).items()]})
    if statistics(model):
        out["eval_logits"] = model.eval()(images.double())
    save(path, out)


generate("deit.safetensors", lambda: Vit(True, depth=2), steps=10)
generate("mean_pool.safetensors", lambda: Vit(False, depth=1), steps=0)  # forward and gradients only: the files stay small
generate("distilled.safetensors", lambda: Vit(True, depth=1, distilled=True), steps=0)
generate("deit3.safetensors", lambda: Vit(True, depth=1, registers=2, layer_scale=True, token_positions=False), steps=10)
generate("registers.safetensors", lambda: Vit(False, depth=1, registers=2), steps=0)
generate("swin.safetensors", lambda: Swin((24, 32), 2, 8, 2, (2, 2), 4, CLASSES), steps=10, image=(24, 32))
generate("swin_odd.safetensors", lambda: Swin((20, 12), 2, 8, 1, (2, 2), 3, CLASSES), steps=0, image=(20, 12), batch=1)
generate("swin_even.safetensors", lambda: Swin((16, 16), 2, 12, 3, (2,), 4, CLASSES), steps=0)
generate("pvt.safetensors", lambda: Pvt((16, 24), 4, [(8, 1, 1, 2, 2), (12, 2, 3, 2, 1)], CLASSES), steps=10, image=(16, 24))
LONG = [(4, 1, 1, 2, 8), (8, 1, 2, 2, 4), (8, 1, 1, 2, 2), (12, 1, 3, 2, 1)]
generate("pvt_long.safetensors", lambda: Pvt((32, 32), 2, LONG, CLASSES), steps=0, image=(32, 32), batch=1)

generate("resnet.safetensors", lambda: ResNet(4, (1, 2), True, CLASSES), steps=10, image=(45, 35))
generate("resnet_basic.safetensors", lambda: ResNet(6, (2, 1), False, CLASSES), steps=10, image=(37, 50), batch=2)
generate("resnet_one.safetensors", lambda: ResNet(4, (1, 1, 1), False, CLASSES), steps=0, image=(51, 40), batch=1)


def resize(path, sizes):
    if len(sys.argv) > 1 and path not in sys.argv[1:]:
        return
    torch.manual_seed(7)
    out = {}
    for height, width, to_height, to_width in sizes:
        grid = torch.randn(2, height, width)
        name = f"{height}x{width}to{to_height}x{to_width}"
        out["from/" + name] = grid.permute(1, 2, 0).reshape(-1, 2)
        larger = F.interpolate(grid[None].double(), (to_height, to_width), mode="bicubic", align_corners=False)[0]
        out["to/" + name] = larger.permute(1, 2, 0).reshape(-1, 2)
    save(path, out)


resize("resize.safetensors", [(3, 3, 5, 5), (7, 5, 4, 9), (13, 13, 23, 23), (14, 14, 7, 10), (1, 1, 3, 2), (2, 4, 2, 4)])
