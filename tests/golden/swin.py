"""Swin transformer as timm computes it, written plainly: every window, mask and bias is laid out."""
import torch
from torch import nn
import torch.nn.functional as F


class WindowAttention(nn.Module):
    def __init__(self, width, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        y, x = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
        y, x = y.flatten(), x.flatten()
        dy, dx = y[:, None] - y[None] + window[0] - 1, x[:, None] - x[None] + window[1] - 1
        self.register_buffer("index", dy * (2 * window[1] - 1) + dx, persistent=False)

    def forward(self, x, mask):  # windows [B W, n, C], mask [W, n, n] or None
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self.relative_position_bias_table[self.index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.reshape(-1, len(mask), self.heads, n, n) + mask[:, None]).reshape(b, self.heads, n, n)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c))


def partition(x, window):
    b, h, w, c = x.shape
    x = x.reshape(b, h // window[0], window[0], w // window[1], window[1], c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window[0] * window[1], c)


def reverse(windows, window, h, w):
    x = windows.reshape(-1, h // window[0], w // window[1], window[0], window[1], windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, windows.shape[-1])


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, grid, window, shifted):
        super().__init__()
        self.window = [min(extent, window) for extent in grid]
        self.shift = [window // 2 if shifted and extent > window else 0 for extent in grid]
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, self.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.register_buffer("mask", self.make_mask([extent + -extent % side for extent, side in zip(grid, self.window)]), persistent=False)

    def make_mask(self, grid):
        if not any(self.shift):
            return None
        image = torch.zeros(1, *grid, 1)
        (wh, ww), (sy, sx) = self.window, self.shift
        for i, rows in enumerate([slice(0, -wh), slice(-wh, -sy), slice(-sy, None)]):
            for j, columns in enumerate([slice(0, -ww), slice(-ww, -sx), slice(-sx, None)]):
                image[:, rows, columns] = 3 * i + j
        regions = partition(image, self.window)[..., 0]
        return torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)

    def attend(self, x):  # [B, H, W, C]
        h, w = x.shape[1:3]
        x = torch.roll(x, [-self.shift[0], -self.shift[1]], (1, 2))
        x = F.pad(x, (0, 0, 0, -w % self.window[1], 0, -h % self.window[0]))
        padded = x.shape[1:3]
        x = reverse(self.attn(partition(x, self.window), self.mask), self.window, *padded)[:, :h, :w]
        return torch.roll(x, self.shift, (1, 2))

    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    def __init__(self, width, heads, grid, window, depth, merges):
        super().__init__()
        if merges:
            self.downsample = PatchMerging(width // 2)
        self.blocks = nn.Sequential(*[Block(width, heads, grid, window, i % 2 == 1) for i in range(depth)])

    def forward(self, x):
        return self.blocks(self.downsample(x) if hasattr(self, "downsample") else x)


class PatchEmbed(nn.Module):
    def __init__(self, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Head(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(x.mean((1, 2)))


class Swin(nn.Module):
    def __init__(self, image, patch, width, heads, depths, window, classes):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        grid = [extent // patch for extent in image]
        stages = []
        for i, depth in enumerate(depths):
            stages.append(Stage(width, heads, [extent >> i for extent in grid], window, depth, i > 0))
            if i + 1 < len(depths):
                width, heads = 2 * width, 2 * heads
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(width)
        self.head = Head(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.layers(self.patch_embed(x))))
