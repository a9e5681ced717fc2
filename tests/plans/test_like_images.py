"""What nnU-Net sees under plans like an encoder is what its corpus held."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from medmamba.inference.reading import read_image
from medmamba_plans.derive import Request
from medmamba_plans.like import Encoder, derive_like
from medmamba_pretrain.corpus.prepare import prepare
from medmamba_pretrain.corpus.settings import Settings

SPACING_MM = (3.0, 2.5, 2.0)
AFFINE = np.array([[2.0, 0, 0, -20], [0, 2.5, 0, 7], [0, 0, 3.0, 100], [0, 0, 0, 1]])
DATASET_JSON = {
    "channel_names": {"0": "CT"},
    "labels": {"background": 0, "organ": 1},
    "file_ending": ".nii.gz",
}


def body() -> np.ndarray:
    """(x, y, z) int16 HU: a box of tissue off the centre of air, no two axes or sides alike; beyond both ends of the
    window."""
    hu = np.full((30, 26, 22), -1000, np.int16)
    inside = np.random.default_rng(0).integers(-300, 600, (21, 19, 18))
    hu[4:25, 5:24, 1:19] = np.maximum(inside, -450)
    return hu


@pytest.fixture
def preprocess(load_plans, make_encoder):
    """nnU-Net's preprocessing of one image, under plans like an encoder of CTs of the given spacing."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    encoder = Encoder.read(make_encoder(modality="ct", spacing_mm=list(SPACING_MM)))
    plans = derive_like(load_plans("anisotropic"), encoder, Request(network="vmunet", name="Mine"), DATASET_JSON)
    manager = PlansManager(json.loads(json.dumps(plans)))
    configuration = manager.get_configuration("3d_fullres")

    def run(path):
        worker = configuration.preprocessor_class(verbose=False)
        return worker.run_case([str(path)], None, manager, configuration, DATASET_JSON)

    return run


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "ASR", "IPL", "PRI"])
def test_nnunet_sees_the_stored_volume_in_every_orientation(axes, tmp_path, preprocess):
    orientation = nibabel.orientations.axcodes2ornt(axes)
    back = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), orientation)
    turned = nibabel.Nifti1Image(body(), AFFINE).as_reoriented(back)
    assert "".join(nibabel.orientations.aff2axcodes(turned.affine)) == axes
    nibabel.save(turned, tmp_path / "image.nii.gz")
    stored = prepare(read_image(tmp_path / "image.nii.gz"), Settings(spacing_mm=SPACING_MM))
    (seen,), _, properties = preprocess(tmp_path / "image.nii.gz")

    # The corpus cuts out the body, nnU-Net what is not zero: where the one begins in the other.
    of_image = np.linalg.inv(properties["nibabel_stuff"]["reoriented_affine"]) @ stored.affine
    assert np.allclose(of_image[:3, :3], np.eye(3), atol=1e-6)
    first = [low for low, _ in properties["bbox_used_for_cropping"]]
    start = np.rint(of_image[2::-1, 3]).astype(int) - first
    place = tuple(slice(at, at + size) for at, size in zip(start, stored.values.shape, strict=True))
    expected = (np.clip(stored.values, -175, 250) + 175) / 425
    np.testing.assert_allclose(seen[place], expected, atol=1e-6)
    assert min(stored.values.shape) >= 18
    assert (expected == 0).any()
    assert (expected == 1).any()
