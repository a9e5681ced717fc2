"""The published 2D networks in plain PyTorch, small, with the published names: their state dicts are the checkpoints.

Written for these tests from the published names and formulas, and slow: a scan is a loop over its tokens. They share no
code with the package.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rows(h: int, w: int) -> Tensor:
    return torch.arange(h * w)


def columns(h: int, w: int) -> Tensor:
    return torch.arange(h * w).view(h, w).T.flatten()


def snake(h: int, w: int) -> Tensor:
    lines = torch.arange(h * w).view(h, w)
    return torch.cat([line.flip(0) if i % 2 else line for i, line in enumerate(lines)])


def snake_of_columns(h: int, w: int) -> Tensor:
    return columns(h, w)[snake(w, h)]


def diagonals(h: int, w: int) -> Tensor:
    order = []
    for total in range(h + w - 1):
        line = [(i, total - i) for i in range(h) if 0 <= total - i < w]
        order += line if total % 2 else line[::-1]
    return torch.tensor([i * w + j for i, j in order])


def spiral(h: int, w: int) -> Tensor:
    grid, order = torch.arange(h * w).view(h, w), []
    while grid.numel():
        order.append(grid[0])
        grid = grid[1:].T.flip(0)
    return torch.cat(order)


def mirrored(order: Callable[[int, int], Tensor], axis: int) -> Callable[[int, int], Tensor]:
    return lambda h, w: torch.arange(h * w).view(h, w).flip(axis).flatten()[order(h, w)]


def raster_routes(h: int, w: int) -> list[Tensor]:
    """VMamba's order: both rasters, then both reversed."""
    return [rows(h, w), columns(h, w), rows(h, w).flip(0), columns(h, w).flip(0)]


PATTERNS = {
    "C": (snake, snake_of_columns),
    "X": (diagonals, mirrored(diagonals, 1)),
    "S": (spiral, mirrored(spiral, 0)),
    "Z": (rows, columns),
}


def head_routes(pattern: str) -> Callable[[int, int], list[Tensor]]:
    """MHS-VM's order: every route followed by its reverse."""
    return lambda h, w: [o for route in PATTERNS[pattern] for o in (route(h, w), route(h, w).flip(0))]


class Scans(nn.Module):
    """The four scans of a map, with their published names; (B, E, H, W) -> (B, 4, E, H * W) in the order of the map."""

    def __init__(self, width: int, states: int, rank: int):
        super().__init__()
        self.x_proj_weight = nn.Parameter(torch.empty(4, rank + 2 * states, width))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, width, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, width))
        self.A_logs = nn.Parameter(torch.empty(4 * width, states))
        self.Ds = nn.Parameter(torch.empty(4 * width))

    def scan(self, x: Tensor, orders: Sequence[Tensor]) -> Tensor:
        flat, results = x.flatten(2), []
        states, rank = self.A_logs.shape[1], self.dt_projs_weight.shape[2]
        for k, order in enumerate(orders):
            u = flat[:, :, order]
            r, b, c = (self.x_proj_weight[k] @ u).split([rank, states, states], 1)
            dt = F.softplus(self.dt_projs_weight[k] @ r + self.dt_projs_bias[k, :, None])
            a = -self.A_logs.view(4, -1, states)[k].exp()
            state, y = torch.zeros(*u.shape[:2], states, dtype=u.dtype), torch.empty_like(u)
            for t in range(u.shape[2]):
                step = dt[:, :, t, None]
                state = (step * a).exp() * state + step * u[:, :, t, None] * b[:, None, :, t]
                y[:, :, t] = (state * c[:, None, :, t]).sum(-1)
            y = y + self.Ds.view(4, -1)[k, :, None] * u
            results.append(torch.empty_like(y).index_copy(2, order, y))
        return torch.stack(results, 1)


def rank_of(width: int) -> int:
    return -(-width // 16)


class SS2D(Scans):
    """Channels last."""

    def __init__(self, width: int, *, states: int, expand: int, gate: bool, conv_bias: bool):
        inner = expand * width
        super().__init__(inner, states, rank_of(width))
        self.in_proj = nn.Linear(width, 2 * inner if gate else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, *z = self.in_proj(x).chunk(2 if self.in_proj.out_features > self.out_norm.weight.numel() else 1, -1)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2)))
        y = self.scan(u, raster_routes(*u.shape[2:])).sum(1)
        y = self.out_norm(y.mT.reshape(*x.shape[:3], -1))
        return self.out_proj(y * F.silu(z[0]) if z else y)


class Engine(Scans):
    def __init__(self, width: int, states: int):
        super().__init__(width, states, rank_of(width))


class Head(nn.Module):
    def __init__(self, width: int, states: int, pattern: str, threshold: float):
        super().__init__()
        self.pattern, self.threshold = pattern, threshold
        self.mambaeng = Engine(width, states)
        self.scanning = nn.Module()
        self.scanning.seq2seq_engine = self.mambaeng

    def forward(self, x: Tensor) -> Tensor:
        y = self.mambaeng.scan(x, head_routes(self.pattern)(*x.shape[2:]))
        variation = y.std(1) / ((y - y.min(1, keepdim=True).values).mean(1) + 1e-5)
        return y.sum(1) * F.relu(variation - self.threshold)


class MHSM(nn.Module):
    def __init__(self, width: int, states: int, patterns: str, threshold: float):
        super().__init__()
        self.patterns, self.part = patterns, width // len(patterns)
        joined = self.part * len(patterns)
        self.x_ssproj = nn.Linear(width, joined, bias=False)
        self.x_ssproj_W = self.x_ssproj.weight
        for pattern in patterns:
            setattr(self, f"scanhead_{pattern}", Head(self.part, states, pattern, threshold))
        self.cat_norm = nn.LayerNorm(joined)
        self.y_proj = nn.Linear(joined, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.einsum("bdhw,cd->bchw", x, self.x_ssproj_W).split(self.part, 1)
        y = torch.cat([getattr(self, f"scanhead_{p}")(u) for p, u in zip(self.patterns, parts, strict=True)], 1)
        return self.y_proj(self.cat_norm(y.mT)).view(x.shape[0], *x.shape[2:], -1)


class GatedHeads(nn.Module):
    def __init__(self, width: int, states: int, patterns: str, threshold: float):
        super().__init__()
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.conv2d = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.mhs = MHSM(width, states, patterns, threshold)
        self.out_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, -1)
        return self.out_norm(self.mhs(F.silu(self.conv2d(u.permute(0, 3, 1, 2))))) * F.silu(z)


class OldBlock(nn.Module):
    """VMamba's first block, channels last; ``ln_1`` and ``self_attention``."""

    def __init__(self, width: int, operator: Callable[[int], nn.Module]):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.self_attention = operator(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attention(self.ln_1(x))


class Merge(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        neighbours = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class Expand(nn.Module):
    def __init__(self, width: int, out: int, scale: int):
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(width, scale * scale * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(shuffled(self.expand(x), self.scale))


def shuffled(x: Tensor, scale: int) -> Tensor:
    """(B, H, W, scale * scale * C) -> (B, H * scale, W * scale, C), channels ordered (row, column, c)."""
    b, h, w, _ = x.shape
    return x.view(b, h, w, scale, scale, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h * scale, w * scale, -1)


class Embed(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, 4, 4)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], **resample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, module in resample.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample(x) if hasattr(self, "upsample") else x
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class Classifier(nn.Module):
    """VMamba's first form: patches, stages, and a head for 1000 classes that segmentation leaves aside."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], operator: Callable[[int], nn.Module]):
        super().__init__()
        self.patch_embed = Embed(3, widths[0])
        last = len(widths) - 1
        self.layers = nn.ModuleList(
            Stage(
                [OldBlock(width, operator) for _ in range(depth)], **({"downsample": Merge(width)} if i < last else {})
            )
            for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        self.norm = nn.LayerNorm(widths[-1])
        self.head = nn.Linear(widths[-1], 1000)

    def features(self, x: Tensor) -> list[Tensor]:
        """Input of every stage, and the output of the last."""
        x, found = self.patch_embed(x), []
        for layer in self.layers:
            found.append(x)
            x = layer(x)
        return [*found, x]


class VSSM(Classifier):
    def __init__(self, widths, depths, decoder_depths, operator, classes):
        super().__init__(widths, depths, operator)
        del self.norm, self.head
        self.layers_up = nn.ModuleList(
            Stage(
                [OldBlock(width, operator) for _ in range(depth)],
                **({"upsample": Expand(2 * width, width, 2)} if i else {}),
            )
            for i, (width, depth) in enumerate(zip(widths[::-1], decoder_depths, strict=True))
        )
        self.final_up = Expand(widths[0], widths[0] // 4, 4)
        self.final_conv = nn.Conv2d(widths[0] // 4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.features(x)
        for i, layer in enumerate(self.layers_up):
            x = layer(x + skips[-i] if i else x)
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))


class VMUNet(nn.Module):
    """VM-UNet and MHS-VM: the same U around another operator. Grey images are repeated to three channels."""

    def __init__(self, operator, classes=2, widths=(8, 16, 32, 64), depths=(1, 2, 1, 2), decoder_depths=(2, 1, 2, 1)):
        super().__init__()
        self.vmunet = VSSM(widths, depths, decoder_depths, operator, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.vmunet(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MultiScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.dw_convs = nn.ModuleList(
            nn.Conv2d(width, width, k, padding=k // 2, groups=width, bias=False) for k in (1, 3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 3, 1, 2)
        return x + sum(conv(y) for conv in self.dw_convs).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    def __init__(self, width: int, multiscale: bool):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        if multiscale:
            self.multiscale_conv = MultiScale(4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(self.multiscale_conv(x) if hasattr(self, "multiscale_conv") else x)


class NewBlock(nn.Module):
    """VMamba's second block; channels first outside, one state, no gate, a feed-forward part."""

    def __init__(self, width: int, multiscale: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.op = SS2D(width, states=1, expand=1, gate=False, conv_bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, multiscale)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.op(self.norm(x))
        return (x + self.mlp(self.norm2(x))).permute(0, 3, 1, 2)


def stem(channels: int, width: int) -> list[nn.Module]:
    def half(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, 2, 1), nn.Identity(), LayerNorm2d(b)]

    return [*half(channels, width // 2), nn.Identity(), nn.GELU(), *half(width // 2, width)]


def down(width: int) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Identity(), LayerNorm2d(2 * width))


def new_stage(width: int, depth: int, *, multiscale: bool = False, **resample: nn.Module) -> nn.Sequential:
    blocks = nn.Sequential(*(NewBlock(width, multiscale) for _ in range(depth)))
    return nn.Sequential(OrderedDict(blocks=blocks, **resample))


class NewClassifier(nn.Module):
    """VMamba's second form (s1l8), with its classifier."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int]):
        super().__init__()
        last = len(widths) - 1
        self.patch_embed = nn.Sequential(*stem(3, widths[0]))
        self.layers = nn.ModuleList(
            new_stage(width, depth, downsample=down(width) if i < last else nn.Identity())
            for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        self.classifier = nn.Sequential(OrderedDict(norm=LayerNorm2d(widths[-1]), head=nn.Linear(widths[-1], 1000)))


class MSVMEncoder(nn.Module):
    def __init__(self, widths: Sequence[int], depths: Sequence[int]):
        super().__init__()
        modules = stem(3, widths[0])
        self.layer0, self.layer1 = nn.Sequential(*modules[:5]), nn.Sequential(*modules[5:])
        self.layers = nn.ModuleList(new_stage(width, depth) for width, depth in zip(widths, depths, strict=True))
        self.downsamples = nn.ModuleList([*(down(width) for width in widths[:-1]), nn.Identity()])

    def forward(self, x: Tensor) -> list[Tensor]:
        x, found = self.layer1(self.layer0(x)), []
        for layer, downsample in zip(self.layers, self.downsamples, strict=True):
            found.append(layer(x))
            x = downsample(found[-1])
        return found


class LargeKernelExpand(nn.Module):
    def __init__(self, width: int, out: int, scale: int, classes: int | None = None):
        super().__init__()
        wide, self.scale = out * scale * scale, scale
        self.expand = nn.Sequential(
            nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 3, 1, 1, groups=wide)
        )
        self.norm = nn.LayerNorm(out)
        if classes is not None:
            self.out = nn.Conv2d(out, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(shuffled(self.expand(x).permute(0, 2, 3, 1), self.scale)).permute(0, 3, 1, 2)
        return self.out(x) if hasattr(self, "out") else x


class UpBlock(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.up = LargeKernelExpand(2 * width, width, 2)
        self.concat_layer = nn.Linear(2 * width, width)
        self.vss_layer = new_stage(width, depth, multiscale=True)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([self.up(x), skip], 1).permute(0, 2, 3, 1)
        return self.vss_layer(self.concat_layer(x).permute(0, 3, 1, 2))


class MSVMUNet(nn.Module):
    def __init__(self, classes: int = 2, widths=(8, 16, 32, 64), depths=(1, 1, 2, 1), decoder_depth: int = 1):
        super().__init__()
        self.encoder = MSVMEncoder(widths, depths)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(UpBlock(width, decoder_depth) for width in widths[-2::-1])
        self.decoder.out_layers = nn.Sequential(LargeKernelExpand(widths[0], widths[0], 4, classes))

    def forward(self, x: Tensor) -> Tensor:
        *skips, x = self.encoder(x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x)
        for layer, skip in zip(self.decoder.layers, skips[::-1], strict=True):
            x = layer(x, skip)
        return self.decoder.out_layers(x)


def gated_scan(states: int) -> Callable[[int], nn.Module]:
    return lambda width: SS2D(width, states=states, expand=2, gate=True, conv_bias=True)


def heads(states: int, patterns: str, threshold: float = 0.3) -> Callable[[int], nn.Module]:
    return lambda width: GatedHeads(width, states, patterns, threshold)


STATES = 3
BUILD: dict[str, Callable[[], nn.Module]] = {
    "vmunet": lambda: VMUNet(gated_scan(STATES)),
    "msvmunet": MSVMUNet,
    "mhsvm": lambda: VMUNet(heads(STATES, "CXSZ")),
    "mhsvm with three heads": lambda: VMUNet(heads(STATES, "CXS")),
    "vmamba": lambda: Classifier((8, 16, 32, 64), (1, 2, 3, 2), gated_scan(STATES)),
    "vmamba2": lambda: NewClassifier((8, 16, 32, 64), (1, 1, 3, 1)),
}
#: Parts as the released modules were called for the numbers in ``tests/data/golden``.
PARTS: dict[str, Callable[[], nn.Module]] = {
    "SS2D": lambda: SS2D(16, states=16, expand=2, gate=True, conv_bias=True),
    "embed": lambda: Embed(3, 16),
    "merge": lambda: Merge(16),
    "expand": lambda: Expand(32, 16, 2),
    "final": lambda: Expand(16, 4, 4),
    "MSVSS": lambda: new_stage(16, 1, multiscale=True),
    "LKPE": lambda: LargeKernelExpand(16, 8, 2),
    "MHSM": lambda: MHSM(16, 16, "CXS", 0.0),
}
#: The published sizes, for counting on torch's meta device.
FULL: dict[str, Callable[[], nn.Module]] = {
    "vmunet": lambda: VMUNet(gated_scan(16), 1, (96, 192, 384, 768), (2, 2, 2, 2), (2, 2, 2, 1)),
    "mhsvm": lambda: VMUNet(heads(16, "CXSZ"), 1, (96, 192, 384, 768), (2, 2, 2, 2), (2, 2, 2, 1)),
    "mhsvm with three heads": lambda: VMUNet(heads(16, "CXS"), 1, (96, 192, 384, 768), (2, 2, 2, 2), (2, 2, 2, 1)),
    "msvmunet": lambda: MSVMUNet(9, (96, 192, 384, 768), (2, 2, 8, 2), 2),
    "vmamba": lambda: Classifier((96, 192, 384, 768), (2, 2, 27, 2), gated_scan(16)),
    "vmamba2": lambda: NewClassifier((96, 192, 384, 768), (2, 2, 8, 2)),
}
#: Arguments with which ours has the shape of ``BUILD``.
OURS: dict[str, dict[str, object]] = {
    "vmunet": {"depths": [1, 2, 1, 2], "decoder_depths": [1, 2, 1, 2], "d_state": STATES},
    "mhsvm": {"depths": [1, 2, 1, 2], "decoder_depths": [1, 2, 1, 2], "d_state": STATES, "gate_threshold": 0.3},
    "msvmunet": {"depths": [1, 1, 2, 1], "decoder_depths": 1, "expand_norm": "batch"},
}
for arguments in OURS.values():
    arguments.update(geometry="faithful", base_features=8, auxiliary_heads=False)
OURS["mhsvm with three heads"] = {**OURS["mhsvm"], "routes": ["C", "X", "S"]}


@torch.no_grad()
def randomised(network: nn.Module) -> nn.Module:
    """Float64 in eval mode, no parameter at a value that hides a mistake (norms at 1, biases at 0, tied routes)."""
    torch.manual_seed(0)
    network = network.double().eval()
    for name, p in (*network.named_parameters(), *network.named_buffers()):
        if name.endswith("A_logs"):
            p.normal_(0.5, 0.3)
        elif name.endswith("dt_projs_bias"):
            p.normal_(-2.0, 0.5)
        elif name.endswith("running_var"):
            p.uniform_(0.5, 2.0)
        elif p.dim() > 1:
            p.normal_(0, p[0].numel() ** -0.5)
        elif p.is_floating_point():
            p.normal_(1.0 if name.endswith(("weight", "Ds")) else 0.0, 0.3)
    return network


@pytest.fixture(scope="session")
def published() -> SimpleNamespace:
    """Published networks: ``build(name)`` small and with random weights, ``full(name)`` of the published size without
    memory; ``ours`` are the arguments of ours for the small ones, ``segmented(name)`` their logits for ``image``."""
    built: dict[str, nn.Module] = {}

    def build(name: str) -> nn.Module:
        """Shared between tests; nobody changes it."""
        if name not in built:
            built[name] = randomised(BUILD[name]())
        return built[name]

    logits: dict[str, Tensor] = {}

    def segmented(name: str) -> Tensor:
        """Logits of ``image`` by the small published network."""
        if name not in logits:
            with torch.no_grad():
                logits[name] = build(name)(image)
        return logits[name]

    torch.manual_seed(2)
    image = torch.randn(2, 3, 32, 64, dtype=torch.float64)

    def full(name: str) -> nn.Module:
        with torch.device("meta"):
            return FULL[name]()

    return SimpleNamespace(build=build, full=full, ours=OURS, image=image, segmented=segmented, parts=PARTS)
