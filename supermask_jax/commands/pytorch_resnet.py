import torch
from torch import nn


class Block(nn.Module):
    """Convolutions with BatchNorm, and the shortcut around them.

    A basic block is 3x3 (with the stride), 3x3; a bottleneck 1x1, 3x3 (with the stride), 1x1. Where input and output
    differ in shape, the shortcut is a 1x1 convolution with BatchNorm, or, without weights, every stride-th pixel and
    zeros as added channels.
    """

    def __init__(self, channels: int, widths: list[int], stride: int, projects: bool, affine: bool):
        super().__init__()
        self.stride, self.added, self.depth = stride, widths[-1] - channels, len(widths)
        self.projects = projects and (stride != 1 or self.added != 0)
        if self.projects:
            self.shortcut = nn.Conv2d(channels, widths[-1], 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(widths[-1], affine=affine)
        sizes, strided = ([3, 3], 0) if len(widths) == 2 else ([1, 3, 1], 1)
        for i, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            step = stride if i == strided else 1
            self.add_module(f"conv_{i}", nn.Conv2d(channels, width, size, step, size // 2, bias=False))
            self.add_module(f"norm_{i}", nn.BatchNorm2d(width, affine=affine))
            channels = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.projects:
            shortcut = self.shortcut_norm(self.shortcut(x))
        else:
            shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        for i in range(self.depth):
            x = torch.relu(x) if i else x
            x = self.get_submodule(f"norm_{i}")(self.get_submodule(f"conv_{i}")(x))
        return torch.relu(x + shortcut)


class ResNet(nn.Module):
    """ResNet; [n, c, h, w] -> [n, classes] logits.

    A large one has projections as shortcuts, and its first convolution is 7x7 with stride 2 and a max-pool, unless it
    is made for small images. Otherwise the first convolution is 3x3, and shortcuts have no weights.
    """

    def __init__(
        self,
        image_channels: int,
        classes: int,
        blocks: list[int],
        width: int,
        inner: int,
        expansion: int,
        large: bool,
        affine: bool,
        small_images: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        shrinks = large and not small_images
        size, stride = (7, 2) if shrinks else (3, 1)
        self.conv = nn.Conv2d(image_channels, width, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(width, affine=affine)
        self.pool = nn.MaxPool2d(3, 2, 1) if shrinks else nn.Identity()
        self.blocks = [f"stage_{stage}_block_{i}" for stage, count in enumerate(blocks) for i in range(count)]
        channels = width
        for name in self.blocks:
            _, stage, _, i = name.split("_")
            out = width * expansion * 2 ** int(stage)
            inside = inner * 2 ** int(stage)
            widths = [inside, out] if expansion == 1 else [inside, inside, out]
            stride = 2 if stage != "0" and i == "0" else 1
            self.add_module(name, Block(channels, widths, stride, large, affine))
            channels = out
        self.dense = nn.Linear(channels, classes, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return self.dense(x.mean((2, 3)))
