"""What a training iteration holds in memory, counted without data.

An iteration with fake tensors, which have a shape but no data, tells which tensors autograd keeps for the backward
pass, and how many bytes are alive at the worst moment. That takes a second or two for any network and patch, ours or
nnU-Net's, and no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medmamba.mixers import RoutedScan
from medmamba_kernels.backends import assume_backend

#: Where a training runs: on GPUs in bfloat16 with the Triton scan; on CPUs in float32 with the scan of this machine.
DEVICES = ("cpu", "cuda")

#: What CUDA's autocast computes in float32 and the CPU's does not (torch 2.8 to 2.13; those that networks use).
_FLOAT32_ON_CUDA = frozenset(
    {
        *("layer_norm", "group_norm", "norm", "cosine_similarity", "cross_entropy"),
        *("softmax", "log_softmax", "softplus", "exp", "expm1", "log", "log1p", "pow", "rsqrt", "reciprocal"),
        *("sum", "cumsum", "cumprod", "prod"),
    }
)


@dataclass(frozen=True)
class Footprint:
    """What one training iteration holds per sample of the batch, and the number of weights.

    Attributes:
        kept: bytes that autograd keeps for the backward pass, and the image.
        peak: bytes alive at the worst moment, without weights, their copies in half precision and their gradients.
        parameters: number of parameters.
        kept_by_scans: the part of ``kept`` that the scans and their projections keep.
    """

    kept: int
    peak: int
    parameters: int
    kept_by_scans: int = 0


def footprint(network: nn.Module, input_channels: int, patch_size: Sequence[int], *, device: str = "cuda") -> Footprint:
    """Count what one training iteration of a network holds, with nnU-Net's kind of loss.

    Args:
        network: (1, C, *patch) -> logits, or a list of logits with deep supervision. It may lie on any device, also on
            torch's meta device; its weights are not read. What it recomputes in the backward pass
            (``torch.utils.checkpoint``) is recomputed here too.
        input_channels: C.
        patch_size: voxels per axis.
        device: one of ``DEVICES``; it need not exist here.

    Raises:
        ValueError: an unknown device, or a patch that the network refuses.
    """
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    on_gpu = device == "cuda"
    was_training = network.training
    with FakeTensorMode(allow_non_fake_inputs=True), assume_backend("triton" if on_gpu else None), torch.enable_grad():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*network.named_parameters(), *network.named_buffers())
        }
        for weight in weights.values():
            if weight.requires_grad:  # gradients do not grow with the batch: they are counted as bytes per parameter
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
        alive = _Alive(weights.values(), scans_expand_steps=on_gpu)
        kept = _Kept(network, alive.weights)
        network.train()
        try:
            with alive:
                image = torch.empty(1, input_channels, *patch_size)
                named = {f"network.{name}": weight for name, weight in weights.items()}
                counted, by_scans = functional_call(_Iteration(network), named, (image, kept, on_gpu))
        finally:
            network.train(was_training)
            kept.close()
    return Footprint(counted, alive.peak, sum(p.numel() for p in network.parameters()), by_scans)


class _Iteration(nn.Module):
    """Forward and backward in one call: what is recomputed in the backward pass needs the weights of the call too."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, kept: _Kept, on_gpu: bool) -> tuple[int, int]:
        kept.pack(image)
        with _CudaPrecision() if on_gpu else nullcontext():
            with (
                torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor),
                torch.autocast("cpu", torch.bfloat16, enabled=on_gpu),
            ):
                loss = segmentation_loss(self.network(image))
            counted = kept.bytes()
            # loss.backward() is a call through the mode, within which the mode is off; what is recomputed needs it.
            engine: Any = torch.autograd.Variable._execution_engine
            seed = (torch.ones_like(loss),)
            engine.run_backward((loss,), seed, False, False, (), allow_unreachable=True, accumulate_grad=True)
        return counted


def segmentation_loss(outputs: Tensor | Iterable[Tensor]) -> Tensor:
    """Cross entropy and soft Dice of every output against class 0: as nnU-Net's loss in what it computes and keeps."""
    total = torch.zeros(())
    for logits in [outputs] if isinstance(outputs, Tensor) else outputs:
        target = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long, device=logits.device)
        classes = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        classes.scatter_(1, target.unsqueeze(1), True)
        shares = F.softmax(logits, 1)
        overlap, size = (shares * classes).sum(), shares.sum() + classes.sum()
        total = total.to(logits.device) + F.cross_entropy(logits, target) - 2 * overlap / size
    return total


class _Kept:
    """What autograd packs away for the backward pass, and which of it inside a scan."""

    def __init__(self, network: nn.Module, weights: dict[int, Tensor]) -> None:
        self.weights = weights
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.by_scans: set[int] = set()
        self.running: list[nn.Module] = []
        self.hooks = []
        for module in network.modules():
            if isinstance(module, RoutedScan):
                self.hooks.append(module.register_forward_pre_hook(lambda scan, _: self.running.append(scan)))
                self.hooks.append(module.register_forward_hook(lambda *_: self.running.clear()))

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # a view keeps the whole storage, and shares it with other views
        key = storage._cdata
        if key not in self.weights and key not in self.storages:
            self.storages[key] = storage
            if self.running:
                self.by_scans.add(key)
        return tensor

    def bytes(self) -> tuple[int, int]:
        """All, and those of the scans. Lets go of the tensors: autograd frees them one by one."""
        sizes = {key: storage.nbytes() for key, storage in self.storages.items()}
        self.storages.clear()
        return sum(sizes.values()), sum(sizes[key] for key in self.by_scans)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Alive(TorchDispatchMode):
    """Bytes of all tensors that operations make, while they live; weights and autocast's copies of them aside.

    Args:
        weights: that operations read.
        scans_expand_steps: the scan multiplies low-rank step sizes out, in float32, and makes their gradient so, as
            on GPUs; this happens inside one operation, and would not be seen.
    """

    def __init__(self, weights: Iterable[Tensor], *, scans_expand_steps: bool) -> None:
        super().__init__()
        self.weights = {weight.untyped_storage()._cdata: weight for weight in weights}
        self.scans_expand_steps = scans_expand_steps
        self.now = self.peak = 0
        self.watched: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            self.weights[result.untyped_storage()._cdata] = result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.now + self._inside(func, args))
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.weights or key in self.watched:
            return

        def forget(_: object) -> None:
            del self.watched[key]
            self.now -= size

        self.watched[key] = weakref.ref(storage, forget)
        self.now += size

    def _inside(self, func: Any, args: Sequence[Any]) -> int:
        """Bytes that a scan holds beside its arguments and results."""
        first, copies = _STEP_SIZES.get(func, (0, 0))
        if not copies or not self.scans_expand_steps or args[first + 6] is None:
            return 0
        dt, dt_weight = args[first], args[first + 6]
        return copies * 4 * dt.shape[:3].numel() * dt_weight.shape[1]


#: Position of dt in the arguments (dt_weight is six further on), and copies of the size of all step sizes.
_STEP_SIZES = {
    torch.ops.medmamba.selective_scan.default: (1, 1),
    torch.ops.medmamba.selective_scan_backward.default: (4, 2),
}


class _CudaPrecision(TorchFunctionMode):
    """Turns the CPU's autocast into that of CUDA: some operations get float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _FLOAT32_ON_CUDA:
            args = tuple(arg.float() if _is_half(arg) else arg for arg in args)
            kwargs = {name: arg.float() if _is_half(arg) else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
