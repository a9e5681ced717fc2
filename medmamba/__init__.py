"""3D Mamba U-Nets for nnU-Net v2. Research use only, not a medical device.

The package is light: torch is imported when a network is asked for, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medmamba.networks import create_network

    __version__: str

__all__ = ["__version__", "create_network", "list_networks"]


def list_networks() -> list[str]:
    """Names of the networks that :func:`create_network` builds, sorted."""
    from medmamba.networks import NETWORKS

    return sorted(NETWORKS)


def __getattr__(name: str) -> object:
    if name == "create_network":
        from medmamba.networks import create_network

        return create_network
    if name == "__version__":
        from importlib.metadata import version

        return version("medmamba")
    raise AttributeError(f"module 'medmamba' has no attribute {name!r}")
