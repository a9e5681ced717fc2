"""Multi-direction selective scans of volumes, read in place. Needs torch only."""

from __future__ import annotations

from .backends import BACKENDS, BackendError, choose_backend
from .inputs import BadStepError
from .ops import selective_scan, selective_scan_with_state
from .reference import selective_scan_reference
from .routes import ROUTE_SETS, Route, parse_route, resolve_routes

__all__ = [
    "BACKENDS",
    "ROUTE_SETS",
    "BackendError",
    "BadStepError",
    "Route",
    "choose_backend",
    "parse_route",
    "resolve_routes",
    "selective_scan",
    "selective_scan_reference",
    "selective_scan_with_state",
]
