"""Pyramid vision transformer as the original computes it (https://arxiv.org/abs/2102.12122), written plainly."""
import torch
from torch import nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, width, heads, reduction):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        if reduction > 1:
            self.sr = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, x, grid):
        b, n, c = x.shape
        q = self.q(x).reshape(b, n, self.heads, c // self.heads).transpose(1, 2)
        y = x
        if hasattr(self, "sr"):
            y = self.norm(self.sr(x.transpose(1, 2).reshape(b, c, *grid)).flatten(2).transpose(1, 2))
        k, v = self.kv(y).reshape(b, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return self.proj((p @ v).transpose(1, 2).reshape(b, n, c))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, ratio, reduction):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, reduction)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, ratio * width)

    def forward(self, x, grid):
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), x.shape[2:]


class Pvt(nn.Module):
    """stages: (width, depth, heads, MLP ratio, reduction) each."""

    def __init__(self, image, patch, stages, classes):
        super().__init__()
        self.count = len(stages)
        channels = 3
        for i, (width, depth, heads, ratio, reduction) in enumerate(stages):
            tokens = (image[0] // patch >> i) * (image[1] // patch >> i) + (i + 1 == len(stages))
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(channels, width, 2 if i else patch))
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, tokens, width)))
            setattr(self, f"block{i + 1}", nn.ModuleList([Block(width, heads, ratio, reduction) for _ in range(depth)]))
            channels = width
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for i in range(1, self.count + 1):
            x, grid = getattr(self, f"patch_embed{i}")(x)
            if i == self.count:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            x = x + getattr(self, f"pos_embed{i}")
            for block in getattr(self, f"block{i}"):
                x = block(x, grid)
            if i < self.count:
                x = x.transpose(1, 2).reshape(len(x), -1, *grid)
        return self.head(self.norm(x)[:, 0])
