"""A model package, from images to segmentations on the disk, with nnU-Net's own prediction as the measure."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import permutations, product

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from medmamba.inference.folder import Options, run_folder
from medmamba.inference.model import export_model, load_model
from medmamba.inference.predictor.model_predictor import ModelPredictor
from medmamba.inference.presets import PRESETS
from medmamba.inference.reading import read_image


def by_nnunet(trained, values, spacing):
    """Mean of both folds by nnU-Net from the trained folder itself."""
    predictor = nnUNetPredictor(1.0, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(trained.folder), ("0", "1"), "checkpoint_final.pth")
    return predictor.predict_single_npy_array(values[None].astype(np.float32), {"spacing": list(spacing)})


def test_a_folder_is_segmented_as_nnunet_would_and_the_junk_in_it_is_reported(five, package, trained, tmp_path):
    predictor = ModelPredictor(load_model(package), step=1.0, mirrors=False)
    out = tmp_path / "out"
    assert run_folder(five, out, predictor, Options(settings=predictor.settings, say=lambda _: None)) == 3
    written = sorted(path.name for path in out.glob("*.nii.gz"))
    assert written == [f"case_{k}.nii.gz" for k in range(4)]
    image = read_image(five / "case_1.nii.gz")
    theirs = by_nnunet(trained, image.values, image.spacing_mm)
    ours = np.asarray(nibabel.load(out / "case_1.nii.gz").dataobj).transpose(2, 1, 0)
    # Random weights: logits of classes are close to each other, where nnU-Net's sums in float16 decide otherwise.
    assert (ours == theirs).mean() > 0.99
    lines = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    done = [line for line in lines if line.get("status") == "done"]
    assert {line["model"] for line in done} == {predictor.id}
    assert run_folder(five, out, predictor, Options(settings=predictor.settings, say=lambda _: None)) == 3


@pytest.mark.parametrize("fold", ["0", "1"])
def test_a_single_fold_without_mirroring_is_its_network_alone(package, write_image, tmp_path, fold):
    model = load_model(package)
    image = read_image(write_image(tmp_path / "a.nii.gz"))
    one = ModelPredictor(model, folds=(fold,), step=1.0, mirrors=False).predict([image], should_stop=lambda: False)
    both = ModelPredictor(model, step=1.0, mirrors=False).predict([image], should_stop=lambda: False)
    assert one.labels.shape == both.labels.shape == image.values.shape
    assert not np.array_equal(one.labels, both.labels)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_predicts_and_says_how(package, write_image, tmp_path, name):
    image = read_image(write_image(tmp_path / "a.nii.gz"))
    predictor = ModelPredictor(load_model(package), **asdict(PRESETS[name]))
    predicted = predictor.predict([image], should_stop=lambda: False)
    assert predicted.labels.shape == image.values.shape
    assert predictor.settings.items() >= asdict(PRESETS[name]).items()
    assert predicted.facts["tiles_computed"] == predicted.facts["tiles"] > 1
    assert predicted.facts["strips"] == 1


def test_memory_that_cannot_do_is_refused_with_the_memory_that_would(package, write_image, tmp_path):
    image = read_image(write_image(tmp_path / "a.nii.gz"))
    with pytest.raises(MemoryError, match=r"0\.001 GB .* at least .* GB are needed"):
        ModelPredictor(load_model(package), max_ram_gb=0.001).predict([image], should_stop=lambda: False)


def test_one_volume_in_all_48_orientations_has_one_segmentation(make_trained, plans_of, tmp_path, write_image):
    plans = {**plans_of("PlainConvUNet"), "image_reader_writer": "NibabelIOWithReorient"}
    trained = make_trained(tmp_path / "trained", plans=plans)
    export_model(trained.folder, tmp_path / "model")
    predictor = ModelPredictor(load_model(tmp_path / "model"), step=1.0, mirrors=False)
    first = nibabel.load(write_image(tmp_path / "first.nii.gz", at=np.eye(4)))
    expected = None
    for axes, signs in product(permutations(range(3)), product((1, -1), repeat=3)):
        turned = first.as_reoriented(np.array([[axis, sign] for axis, sign in zip(axes, signs, strict=True)]))
        nibabel.save(turned, tmp_path / "turned.nii.gz")
        image = read_image(tmp_path / "turned.nii.gz")
        labels = predictor.predict([image], should_stop=lambda: False).labels
        segmentation = nibabel.Nifti1Image(labels.transpose(2, 1, 0), turned.affine)
        back = np.asarray(nibabel.as_closest_canonical(segmentation).dataobj)
        expected = back if expected is None else expected
        assert np.array_equal(back, expected)
    assert len(np.unique(expected)) > 1
