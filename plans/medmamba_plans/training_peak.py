"""Peak memory of a few training iterations, in a process of its own: ``python -m medmamba_plans.training_peak JSON``.

Memory that an earlier training freed is kept by the allocators and would hide what the next one needs. The answer is
one line of JSON on standard output. Light; torch is imported when it runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from pydoc import locate
from typing import Any

MIB = 2**20
#: The optimizer's state exists from the second iteration on; GPUs try several algorithms before they settle.
ITERATIONS = {"cpu": 2, "cuda": 4}


def train(job: Mapping[str, Any]) -> dict[str, float]:
    """Train on noise and return the peak.

    Args:
        job: ``block`` (architecture block of a plans file), ``input_channels``, ``num_classes``, ``patch_size``,
            ``batch_size``, ``device`` ("cpu", or "cuda" in bfloat16), ``is_compiled`` (through ``torch.compile``).

    Returns:
        ``peak_mib``, and on GPUs ``allocated_mib`` and ``context_mib``. CPU: resident set above that of the process
        before the network was built. GPU: what torch reserved, plus what the device holds besides (the context; so
        nobody else may use the GPU).
    """
    import torch

    from medmamba.nnunet.architecture import build_network

    device = torch.device(job["device"])
    tiny = {**job, "input_channels": 1, "patch_size": [8] * len(job["patch_size"]), "is_compiled": False}
    layer = torch.nn.Conv3d if len(job["patch_size"]) == 3 else torch.nn.Conv2d
    # Libraries that are loaded and threads that are started on the way would count as the network's.
    locate(job["block"]["network_class_name"])
    _iterate(layer(1, 2, 3, padding=1, device=device), tiny, device)
    before = _start(device)
    network = build_network(job["block"], job["input_channels"], job["num_classes"]).to(device)
    _iterate(network, job, device)
    return _finish(device, before)


def _start(device: Any) -> float:
    import torch

    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnU-Net's trainer
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    return _resident("VmRSS")


def _finish(device: Any, before: float) -> dict[str, float]:
    import torch

    if device.type == "cpu":
        return {"peak_mib": round(_resident("VmHWM") - before, 1)}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    return {
        "peak_mib": round((torch.cuda.max_memory_reserved() + context) / MIB, 1),
        "allocated_mib": round(torch.cuda.max_memory_allocated() / MIB, 1),
        "context_mib": round(context / MIB, 1),
    }


def _resident(field: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) / 1024


def _iterate(network: Any, job: Mapping[str, Any], device: Any) -> None:
    """Forward, loss, backward, clipping and SGD with momentum, as nnU-Net's trainer does them."""
    import torch

    from medmamba.diagnostics.footprint import segmentation_loss

    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.99, nesterov=True, weight_decay=3e-5)
    model = torch.compile(network) if job["is_compiled"] else network
    size = (job["batch_size"], job["input_channels"], *job["patch_size"])
    for _ in range(ITERATIONS[device.type]):
        images = torch.randn(size, device=device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            outputs = model(images)
            loss = segmentation_loss(outputs)
        del outputs
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
        optimizer.step()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(train(json.loads(sys.argv[1]))) + "\n")
