"""The picture: written whole, of the planned size, with the structures where they are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medmamba.demo.dataset import read_dataset
from medmamba.demo.volumes import read_volume
from medmamba.inference.picture import MAX_NAMED, Panel, draw_picture
from medmamba.palette import COLOURS

STRUCTURES = {"shell": 1, "core": 2}


def make_panel(shape=(16, 20, 24), spacing=(1.0, 1.0, 1.0), *, reference=True, prediction=True) -> Panel:
    rng = np.random.default_rng(0)
    distance = np.sqrt(((np.indices(shape) - np.array(shape).reshape(3, 1, 1, 1) / 2) ** 2).sum(0))
    labels = (distance < 6).astype(np.uint8) + (distance < 3)
    image = labels * 50 + rng.normal(0, 10, shape)
    return Panel("case", image, labels * reference, labels * prediction, spacing)


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def coloured_share(array: np.ndarray, colour: str) -> float:
    """Share of pixels whose hue is near a structure's colour (it is blended with a grey image)."""
    target = np.array(to_rgb(colour)) - np.mean(to_rgb(colour))
    values = array / 255 - (array / 255).mean(-1, keepdims=True)
    strength = np.linalg.norm(values, axis=-1)
    cosine = (values @ target) / (np.linalg.norm(target) * np.maximum(strength, 1e-6))
    return float(((strength > 0.1) & (cosine > 0.97)).mean())


@pytest.mark.parametrize("num_panels", [1, 2, 3])
def test_the_picture_grows_with_the_number_of_volumes(tmp_path, num_panels):
    path = tmp_path / "demo.png"
    draw_picture(path, [make_panel()] * num_panels, STRUCTURES, {}, dpi=100)
    height, width, _ = pixels(path).shape
    assert 950 < width < 1100
    assert 150 * num_panels < height < 350 * num_panels + 120
    assert [file.name for file in tmp_path.iterdir()] == ["demo.png"]


def test_reference_and_prediction_show_every_structure_and_the_image_shows_none(tmp_path):
    path = tmp_path / "demo.png"
    draw_picture(path, [make_panel()], STRUCTURES, {}, dpi=100)
    planes = pixels(path)[40:-60]
    thirds = np.array_split(planes, 3, axis=1)
    for colour in COLOURS[:2]:
        image, reference, prediction = (coloured_share(third, colour) for third in thirds)
        assert image == 0
        assert reference > 0.01
        assert prediction == pytest.approx(reference, rel=0.2)


@pytest.mark.parametrize(("reference", "prediction"), [(True, False), (False, True), (False, False)])
def test_empty_label_maps_are_drawn_as_images(tmp_path, reference, prediction):
    path = tmp_path / "demo.png"
    draw_picture(path, [make_panel(reference=reference, prediction=prediction)], STRUCTURES, {}, dpi=100)
    planes = pixels(path)[40:-60]
    _, second, third = np.array_split(planes, 3, axis=1)
    assert (coloured_share(second, COLOURS[0]) > 0) == reference
    assert (coloured_share(third, COLOURS[0]) > 0) == prediction


def test_planes_have_the_shape_of_the_volume_in_millimetres(tmp_path):
    """A ball in mm, sampled every 4 mm from slice to slice, is round in every plane."""
    spacing = (4.0, 1.0, 1.0)
    grid = np.indices((12, 48, 48)) - np.array([6, 24, 24]).reshape(3, 1, 1, 1)
    ball = np.sqrt(((grid * np.array(spacing).reshape(3, 1, 1, 1)) ** 2).sum(0)) < 18
    panel = Panel("ball", np.zeros(ball.shape), ball.astype(np.uint8), np.zeros(ball.shape, np.uint8), spacing)
    path = tmp_path / "demo.png"
    draw_picture(path, [panel], {"ball": 1}, {}, dpi=100)
    reference = np.array_split(pixels(path)[40:-60], 3, axis=1)[1]
    mask = np.abs(reference / 255 - np.array(to_rgb(COLOURS[0])) * 0.62).max(-1) < 0.05
    blobs = _blobs(mask)
    assert len(blobs) == 3
    heights, widths = zip(*blobs, strict=True)
    # The outermost slice of 4 mm may be missed on either side.
    assert max(heights + widths) / min(heights + widths) < 36 / 28


def _blobs(mask: np.ndarray) -> list[tuple[int, int]]:
    from scipy import ndimage

    labels, _ = ndimage.label(mask)
    boxes = ndimage.find_objects(labels)
    sizes = [(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in boxes]
    return [size for size in sizes if min(size) > 10]


def test_a_constant_image_is_drawn(tmp_path):
    panel = make_panel()
    flat = Panel(panel.title, np.full_like(panel.image, 7.0), panel.reference, panel.prediction, panel.spacing_mm)
    draw_picture(tmp_path / "demo.png", [flat], STRUCTURES, {}, dpi=50)
    assert pixels(tmp_path / "demo.png").any()


def test_many_structures_do_not_cover_the_picture_with_their_names(tmp_path):
    few, many = {f"s{i}": i + 1 for i in range(MAX_NAMED)}, {f"s{i}": i + 1 for i in range(60)}
    sizes = []
    for name, structures in (("few.png", few), ("many.png", many)):
        draw_picture(tmp_path / name, [make_panel()], structures, {}, dpi=50)
        sizes.append(pixels(tmp_path / name).shape)
    assert sizes[0] == sizes[1]


def test_a_real_volume_is_turned_so_that_its_head_is_up(tmp_path):
    case = read_dataset().unseen[0]
    plain, turned = read_volume(case.label), read_volume(case.label, oriented=True)
    # The files run to the right, the front and the head: two axes turn round, none is exchanged.
    assert np.array_equal(turned.array, plain.array[:, ::-1, ::-1])
    # Anterior lies in front of posterior: smaller indices along H, which runs to the back.
    anterior, posterior = (np.nonzero(turned.array == label)[1].mean() for label in (1, 2))
    assert anterior < posterior


def test_shapes_that_differ_are_refused_and_nothing_is_written(tmp_path):
    panel = make_panel()
    wrong = Panel("case", panel.image[1:], panel.reference, panel.prediction, panel.spacing_mm)
    with pytest.raises(ValueError, match="differ in shape"):
        draw_picture(tmp_path / "demo.png", [wrong], STRUCTURES, {})
    with pytest.raises(ValueError, match="at least one volume"):
        draw_picture(tmp_path / "demo.png", [], STRUCTURES, {})
    assert list(tmp_path.iterdir()) == []
