"""The file that carries an encoder from pretraining to a dataset, and the way into a network."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from medmamba.networks import NETWORKS, create_network
from medmamba.weights import EncoderDescription, WeightsError, load_encoder, read_encoder, write_encoder
from medmamba.weights.encoder import METADATA, stem_key

STRIDES = {
    ("native", 3): [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
    ("faithful", 3): [[1, 1, 1], [2, 4, 4], [2, 2, 2]],
    ("native", 2): [[1, 1], [2, 2], [2, 2]],
    ("faithful", 2): [[1, 1], [4, 4], [2, 2]],
}
CASES = [(name, *case) for name in NETWORKS for case in STRIDES]


def arguments(geometry: str = "native", ndim: int = 3) -> dict:
    tiny = {"base_features": 8, "depths": 1, "decoder_depths": 1}
    return {**tiny, "geometry": geometry, "strides": STRIDES[geometry, ndim]}


def describe(network: str = "vmunet", geometry: str = "native", ndim: int = 3, **values) -> EncoderDescription:
    content = {
        "network": network,
        "arguments": arguments(geometry, ndim),
        "input_channels": 1,
        "patch_size": [32] * ndim,
        "spacing_mm": [1.5] * ndim,
        "axes": "SAR"[-ndim:],
        "reader": "NibabelIOWithReorient",
        "modality": "ct",
        "normalisation": {"scheme": "CTNormalization", "low": -175, "high": 250, "mean": -175, "std": 425},
        "corpus": {"hash": "5eed", "volumes": 3},
        "training": {"objective": "mim", "steps": 10},
        "citation": ["A paper (2024)"],
        "version": "0.1",
    }
    return EncoderDescription.from_json({**content, **values})


def build(description: EncoderDescription, channels: int = 1, classes: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_network(description.network, channels, classes, **description.arguments)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "encoder.safetensors"


@pytest.fixture
def written(path):
    """The file of a small encoder."""
    description = describe()
    write_encoder(path, build(description).encoder, description)
    return path


@pytest.mark.parametrize(("name", "geometry", "ndim"), CASES)
def test_every_tensor_of_every_network_arrives(path, name, geometry, ndim):
    description = describe(name, geometry, ndim)
    source, target = build(description), build(description, classes=4, seed=1)
    write_encoder(path, source.encoder, description)
    read, tensors = read_encoder(path)
    decoder = {key: value.clone() for key, value in target.decoder.state_dict().items()}
    report = load_encoder(target, tensors, read)
    expected = source.encoder.state_dict()
    assert read == description
    assert len(tensors) == len(report.loaded) == len(expected)
    assert (report.adapted, report.unused) == ({}, {})
    assert all(torch.equal(value, expected[key]) for key, value in target.encoder.state_dict().items())
    assert all(torch.equal(value, decoder[key]) for key, value in target.decoder.state_dict().items())
    assert set(report.missing) == {f"decoder.{key}" for key in decoder}


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize(("name", "geometry", "ndim"), CASES)
def test_equal_channels_of_an_image_give_the_response_to_one(name, geometry, ndim, channels):
    description = describe(name, geometry, ndim)
    source, target = build(description).double().eval(), build(description, channels, seed=1).double().eval()
    report = load_encoder(target, source.encoder.state_dict(), description)
    assert len(report.adapted) == 1
    assert len(report.loaded) == len(source.encoder.state_dict()) - 1
    image = torch.randn(1, 1, *[16] * ndim, dtype=torch.float64)
    with torch.no_grad():
        expected, found = source.encoder(image), target.encoder(image.repeat(1, channels, *[1] * ndim))
    # The first "feature" of the faithful MSVM-UNet is the image.
    pairs = [(one, many) for one, many in zip(expected, found, strict=True) if one is not image]
    assert len(pairs) >= 2
    for one, many in pairs:
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-9)


def test_a_file_is_float32_on_the_cpu_and_plain(written):
    _, tensors = read_encoder(written)
    assert {(value.dtype, value.device.type) for value in tensors.values()} == {(torch.float32, "cpu")}
    description = describe()
    write_encoder(written, build(description).double().encoder, description)
    assert {value.dtype for value in read_encoder(written)[1].values()} == {torch.float32}


@pytest.mark.gpu
def test_an_encoder_that_is_written_on_a_gpu_is_read_without_one(path):
    description = describe()
    network = build(description)
    expected = {name: value.clone() for name, value in network.encoder.state_dict().items()}
    write_encoder(path, network.cuda().encoder, description)
    _, tensors = read_encoder(path)
    assert all(value.device.type == "cpu" and torch.equal(value, expected[name]) for name, value in tensors.items())


class TwoNames(nn.Module):
    """A network whose decoder lists the encoder a second time, as nnU-Net's PlainConvUNet does."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.encoder, self.decoder = network.encoder, nn.Module()
        self.decoder.encoder = network.encoder


def test_both_names_of_an_encoder_have_the_new_values(written):
    description, tensors = read_encoder(written)
    network = TwoNames(build(description, seed=1))
    assert load_encoder(network, tensors, description).loaded.keys() == {f"encoder.{name}" for name in tensors}
    state = network.state_dict()
    for name, value in tensors.items():
        assert torch.equal(state[f"encoder.{name}"], value)
        assert torch.equal(state[f"decoder.encoder.{name}"], value)


FIRST = "stem.conv.weight"


def spoil(change: str, tensors: dict) -> dict:
    """The tensors with one thing wrong."""
    wrong = {
        "missing": {name: value for name, value in tensors.items() if name != FIRST},
        "surplus": {**tensors, "stages.9.weight": torch.zeros(1)},
        "shape": {**tensors, FIRST: torch.zeros(7, 5)},
        "nan": {**tensors, FIRST: torch.full_like(tensors[FIRST], math.nan)},
        "none": {},
    }
    return wrong[change]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", f"{FIRST} is missing; build the network with the arguments"),
        ("surplus", r"stages.9.weight has no place in the network"),
        ("shape", rf"{FIRST} has the shape \(7, 5\), the network has \("),
        ("nan", f"{FIRST} holds values that are not finite"),
        ("none", "there are no tensors to load"),
    ],
)
def test_tensors_that_do_not_fit_leave_the_network_as_it_was(written, change, message):
    description, tensors = read_encoder(written)
    network = build(description, seed=1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(WeightsError, match=message):
        load_encoder(network, spoil(change, tensors), description)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_another_network_and_no_network_are_refused(written):
    description, tensors = read_encoder(written)
    with pytest.raises(WeightsError, match=r"and [0-9]+ more; build the network with the arguments"):
        load_encoder(build(describe("mednext")), tensors, description)
    with pytest.raises(WeightsError, match="a Linear has no encoder to load into"):
        load_encoder(nn.Linear(2, 2), tensors, description)


def test_an_encoder_that_is_not_the_described_one_is_not_written(path):
    with pytest.raises(WeightsError, match="are not those of this encoder"):
        write_encoder(path, build(describe("mednext")).encoder, describe("vmunet"))
    network = build(describe())
    nn.init.constant_(network.encoder.stem.conv.weight, math.inf)
    with pytest.raises(WeightsError, match="values that are not finite"):
        write_encoder(path, network.encoder, describe())
    unknown = describe(arguments={**arguments(), "d_stat": 3})
    with pytest.raises(WeightsError, match=r"names arguments that vmunet refuses .*'d_stat'"):
        write_encoder(path, build(describe()).encoder, unknown)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99, 1.0], ids=str)
def test_a_file_that_is_cut_short_is_refused(written, part):
    content = written.read_bytes()
    written.write_bytes(content[: min(int(part * len(content)), len(content) - 1)])
    with pytest.raises(
        WeightsError, match=r"encoder\.safetensors cannot be read as safetensors \(.+\); it is cut short"
    ):
        read_encoder(written)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_flipped_bit_anywhere_is_refused(written, place, bit):
    content = bytearray(written.read_bytes())
    flipped = written.with_name("flipped.safetensors")
    content[int(place * len(content))] ^= 1 << bit
    flipped.write_bytes(content)
    with pytest.raises(WeightsError):
        read_encoder(flipped)


def test_a_file_of_another_kind_is_refused(path):
    with pytest.raises(WeightsError, match="is no file; give an encoder"):
        read_encoder(path)
    torch.save({"network_weights": {"a": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        read_encoder(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(1)}, path, metadata)
        with pytest.raises(WeightsError, match="has no description of an encoder"):
            read_encoder(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has a description that is not JSON"),
        ("[" * 100_000, "has a description that is not JSON"),
        ("[]", "has the format None, expected 1"),
        (json.dumps({"format": 2, "new": 3}), "has format 2, this version of medmamba reads up to 1; update medmamba"),
        (json.dumps({"format": 0}), "has the format 0, expected 1"),
        (json.dumps({"format": 1}), "the description of the encoder has no network, no arguments"),
        (json.dumps({"format": 1, **describe().to_json(), "colour": 1}), "an unknown colour"),
        (
            json.dumps({"format": 1, **describe().to_json(), "spacing_mm": "1.5"}),
            r"safetensors: spacing_mm .* is '1.5'",
        ),
    ],
    ids=["torn", "deep", "list", "newer", "older", "empty", "unknown", "type"],
)
def test_a_description_that_cannot_be_read_is_named(path, text, message):
    save_file({"a": torch.zeros(1)}, path, {METADATA: text})
    with pytest.raises(WeightsError, match=message):
        read_encoder(path)


def test_a_description_without_tensors_is_refused(path):
    save_file({}, path, {METADATA: json.dumps({"format": 1, **describe().to_json()})})
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_encoder(path)


ZSCORE = {"scheme": "ZScoreNormalization"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "vmnet"}, "no network 'vmnet'; known: .*install the version"),
        ({"network": 3}, "network of an encoder is 3; expected a text"),
        ({"arguments": [1]}, "arguments .* expected a mapping of plain JSON"),
        ({"arguments": {"strides": {1, 2}}}, "arguments .* expected a mapping of plain JSON"),
        ({"arguments": {}}, "arguments.strides of an encoder is None"),
        ({"arguments": {"strides": [[1, 1, 1], [2, 2, 0]]}}, "arguments.strides .* expected a list of whole numbers"),
        ({"arguments": {"strides": [[1, 1], [2, 2]]}}, "patch size and strides .* 3 spatial axes"),
        ({"arguments": {**arguments(), "num_classes": 3}}, "hold num_classes, which the dataset decides"),
        ({"input_channels": True}, "input_channels of an encoder is True"),
        ({"patch_size": [32, 32.0, 32]}, "patch_size .* expected whole numbers of 1 or more"),
        ({"patch_size": [32, 32, 33]}, r"not divisible by the network's total stride \(2, 4, 4\)"),
        ({"spacing_mm": [1.5, 1.5]}, "spacing_mm .* expected 3 numbers"),
        ({"spacing_mm": [1.5, 1.5, -1.5]}, "spacing_mm .* expected numbers above 0"),
        ({"spacing_mm": [1.5, 1.5, math.nan]}, "spacing_mm .* expected numbers above 0"),
        ({"axes": "SA"}, "axes of an encoder is 'SA'; expected 3 letters"),
        ({"axes": "SIR"}, "axes of an encoder is 'SIR'"),
        ({"axes": "sar"}, "axes of an encoder is 'sar'"),
        ({"modality": "pet"}, "modality of an encoder is 'pet'; expected ct or mr"),
        ({"normalisation": {"scheme": "RescaleTo01"}}, "normalisation .* expected CTNormalization with"),
        ({"normalisation": {"scheme": ["a"]}}, "normalisation .* expected CTNormalization with"),
        ({"normalisation": {**ZSCORE, "mean": 1}}, "normalisation .* expected CTNormalization with"),
        ({"normalisation": {"scheme": "CTNormalization"}}, "normalisation .* expected CTNormalization with"),
        ({"normalisation": {**describe().normalisation, "std": 0}}, "normalisation .* expected CTNormalization with"),
        ({"corpus": {"hash": "5eed"}}, "corpus .* expected a hash and a number of volumes"),
        ({"training": {"loss": math.nan}}, "training .* expected a mapping of plain JSON values"),
        ({"citation": "A paper"}, "citation of an encoder is 'A paper'; expected texts"),
        ({"version": ""}, "version of an encoder is ''"),
    ],
    ids=str,
)
def test_descriptions_are_checked(values, message):
    with pytest.raises(WeightsError, match=message):
        describe(**values)


WHOLE = st.integers(1, 10**6)
REAL = st.floats(1e-3, 1e3)
PLAIN = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(
    training=PLAIN,
    corpus=PLAIN,
    volumes=WHOLE,
    spacing=st.tuples(REAL, REAL, REAL),
    patch=st.tuples(WHOLE, WHOLE, WHOLE),
    low=REAL,
    citation=st.lists(st.text(min_size=1), max_size=3),
    texts=st.tuples(st.text(min_size=1), st.text(min_size=1)),
)
def test_a_description_comes_back_from_json_as_it_was(training, corpus, volumes, spacing, patch, low, citation, texts):
    description = replace(
        describe(),
        training=training,
        corpus={**corpus, "hash": texts[0], "volumes": volumes},
        spacing_mm=spacing,
        patch_size=tuple(size * 4 for size in patch),
        normalisation={"scheme": "CTNormalization", "low": -low, "high": low, "mean": 0.0, "std": low},
        citation=tuple(citation),
        reader=texts[1],
    )
    assert EncoderDescription.from_json(json.loads(json.dumps(description.to_json()))) == description


def test_values_of_python_are_stored_as_json_has_them():
    description = replace(describe(), arguments={**arguments(), "strides": ((1, 1, 1), (2, 2, 2))})
    assert description.arguments["strides"] == [[1, 1, 1], [2, 2, 2]]


def test_a_full_disk_leaves_the_old_file(written):
    """The operating system refuses to write: a limit on the size of files of a child process."""
    before = written.read_bytes()
    code = f"""
        import resource, signal, sys
        sys.path[:0] = {sys.path!r}
        from medmamba.weights import read_encoder, write_encoder
        from medmamba.networks import create_network
        description, _ = read_encoder({str(written)!r})
        network = create_network(description.network, 1, 2, **description.arguments)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_encoder({str(written)!r}, network.encoder, description)
        except OSError as error:
            print("refused", error.errno)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert child.stdout.startswith("refused"), child.stderr
    assert [file.name for file in written.parent.iterdir()] == [written.name]
    assert written.read_bytes() == before


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path):
    description = describe()
    with pytest.raises(OSError, match="No such file"):
        write_encoder(tmp_path / "nowhere" / "encoder.safetensors", build(description).encoder, description)
    assert list(tmp_path.iterdir()) == []


class OutOfOrder(nn.Module):
    """Lists the convolution that runs second before the one that sees the image."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Conv3d(4, 4, 1), nn.Conv3d(1, 4, 1)

    def forward(self, x):
        return [self.second(self.first(x))]


def test_the_first_convolution_is_the_one_that_runs_first():
    encoder = OutOfOrder()
    assert stem_key(encoder) == "first.weight"
    assert not encoder.first._forward_pre_hooks
    assert stem_key(nn.Sequential(nn.Flatten(), nn.Linear(1, 2))) is None
