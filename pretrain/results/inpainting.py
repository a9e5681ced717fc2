"""Masked voxels from visible ones without any training: what a pretraining has to beat.

``nearest``   the nearest visible voxel.
``harmonic``  the solution of Laplace's equation with the visible voxels as its border: every masked voxel is the mean
              of its neighbours. Along a line this is linear interpolation, so it is what a trilinear interpolation
              becomes where the known points lie in no grid.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.linalg import cg

_TOLERANCE = 1e-4


def nearest(image: NDArray[np.floating], visible: NDArray[np.bool_]) -> NDArray[np.floating]:
    """Every masked voxel with the value of the nearest visible one.

    Args:
        image: (D, H, W).
        visible: the same shape, at least one True.
    """
    where = ndimage.distance_transform_edt(~visible, return_distances=False, return_indices=True)
    return image[tuple(where)]


def harmonic(image: NDArray[np.floating], visible: NDArray[np.bool_]) -> NDArray[np.floating]:
    """Every masked voxel with the mean of its face neighbours, those beyond the border left out.

    Args:
        image: (D, H, W).
        visible: the same shape, at least one True.
    """
    start = nearest(image, visible).astype(np.float64)
    laplacian = _laplacian(image.shape)
    known, unknown = visible.ravel(), ~visible.ravel()
    if not unknown.any():
        return image
    matrix = laplacian[unknown]
    right = -matrix[:, known] @ image.ravel()[known].astype(np.float64)
    solved, _ = cg(matrix[:, unknown], right, x0=start.ravel()[unknown], rtol=_TOLERANCE)
    filled = start.ravel()
    filled[unknown] = solved
    filled[known] = image.ravel()[known]
    return filled.reshape(image.shape).astype(image.dtype)


def _laplacian(shape: tuple[int, ...]) -> sparse.csr_array:
    """Number of neighbours on the diagonal, -1 for each neighbour."""
    count = int(np.prod(shape))
    index = np.arange(count).reshape(shape)
    pairs = [
        (np.take(index, range(size - 1), axis).ravel(), np.take(index, range(1, size), axis).ravel())
        for axis, size in enumerate(shape)
    ]
    rows, columns = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
    links = sparse.coo_array((np.ones(len(rows)), (rows, columns)), (count, count))
    links = (links + links.T).tocsr()
    return (sparse.diags_array(links.sum(1)) - links).tocsr()
