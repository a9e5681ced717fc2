"""Recipes: plain values in, one line of words for everything that is wrong."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from medmamba.command import CommandError
from medmamba.networks import create_network
from medmamba_pretrain.loop.schedule import learning_rate
from medmamba_pretrain.model import Pretraining
from medmamba_pretrain.recipe import RECIPES, Recipe, read_recipe

CHECKOUT = Path(__file__).resolve().parents[2]
VOLUMES = (100, 6_814, 100_000)
MINIMAL = """
network = "vmunet"
patch_size = [16, 16, 16]
[arguments]
strides = [[1, 1, 1], [2, 2, 2]]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    return str(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_recipe_survives_json_as_a_checkpoint_holds_it(name):
    recipe = read_recipe(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_recipe_says_what_it_costs(name):
    """As `pretrain/results/recipes.py` has measured and derived it."""
    with (CHECKOUT / "pretrain" / "results" / "recipes.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["recipe"] == name)
    disk, ingest = (" / ".join(row[f"{what}_{n}"] for n in VOLUMES) for what in ("disk_gib", "ingest_core_h"))
    training = (
        f"{row['training_cpu_h']} hours on one core"
        if row["training_cpu_h"]
        else f"{row['training_gpu_h_fast']} to {row['training_gpu_h_slow']} hours on one GPU of 60 to 150 TFLOP/s "
        "(assumed, not measured)"
    )
    text = (RECIPES / f"{name}.toml").read_text()
    assert f"# Corpus of 100 / 6,814 / 100,000 volumes: {disk} GiB, {ingest} core-hours to ingest." in text
    assert f"# Training: {training}." in text


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_a_recipe_builds_and_its_crops_have_many_units(name):
    recipe = read_recipe(name)
    network = create_network(recipe.network, 1, 2, **recipe.network_arguments)
    assert math.prod(Pretraining(network, recipe).units) >= 200


def test_an_entry_is_changed_from_the_command_line(file):
    recipe = read_recipe(
        file, ["steps=7", "lr=1", "fill=linear", "arguments.d_state=4", "normalisation.high=300", 'weights="patient"']
    )
    assert (recipe.steps, recipe.lr, recipe.fill, recipe.weights) == (7, 1.0, "linear", "patient")
    assert recipe.arguments["d_state"] == recipe.network_arguments["d_state"] == 4
    assert recipe.normalisation == {"low": -175, "high": 300, "mean": -175, "std": 425}


def test_a_variant_lies_between_the_defaults_of_the_network_and_the_arguments(file):
    recipe = read_recipe(file, ["variant=small", "arguments.d_state=5"])
    assert recipe.network_arguments["d_state"] == 5
    assert recipe.network_arguments["base_features"] == 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("step=7", "unknown entry step; known: "),
        ("steps=many", "steps is 'many'; expected int"),
        ("steps=true", "steps is True; expected int"),
        ("steps=0", "steps is 0; expected 1 or more"),
        ("lr=inf", "lr is inf"),
        ("lr=nan", "lr is nan"),
        ("mask_ratio=1", "mask_ratio is 1.0; expected between 0 and 1"),
        ("objective=simclr", "no objective 'simclr'; known: mambamim, spark, mae, autoregressive"),
        ("fill=spline", "no fill 'spline'; known: token, linear, toki, toki-paper"),
        ("precision=float16", "no precision 'float16'"),
        ("modality=pet", "no modality 'pet'; known: ct, mr"),
        ("warmup_steps=10000", "warmup_steps is 10000; expected below steps = 10000"),
        ("flips=[0.5]", "one probability for each of the 3 axes"),
        ("spacing_mm=[1, 1]", "spacing_mm is (1.0, 1.0)"),
        ("normalisation.window=3", "normalisation of ct takes no window"),
        ("normalisation.high=-400", "expected low < high"),
        ("modality", "is not NAME=VALUE"),
        ("network.name=x", "is not NAME=VALUE"),
    ],
)
def test_what_is_wrong_is_said_in_words(file, change, words):
    with pytest.raises(CommandError) as error:
        read_recipe(file, [change])
    assert words in str(error.value)


def test_mr_takes_no_window(file):
    assert read_recipe(file, ["modality=mr"]).normalisation == {}
    with pytest.raises(CommandError, match="normalisation of mr takes no low"):
        read_recipe(file, ["modality=mr", "normalisation.low=0"])


def test_a_recipe_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(CommandError, match=r"there is no recipe ct-tiny; known: .*ct-small"):
        read_recipe("ct-tiny")


@pytest.mark.parametrize(("text", "words"), [("steps = ", "cannot be read as TOML"), ("steps = 3", "is missing")])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text, words):
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(CommandError, match=words):
        read_recipe(str(tmp_path / "x.toml"))


def test_strides_must_be_given(tmp_path):
    (tmp_path / "x.toml").write_text(MINIMAL.replace("strides", "kernel_sizes"))
    with pytest.raises(CommandError, match=r"arguments\.strides is missing"):
        read_recipe(str(tmp_path / "x.toml"))


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine(recipe_of):
    recipe = recipe_of(steps=12, warmup_steps=4, lr=2.0, lr_end=0.25)
    rates = [learning_rate(step, recipe) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx((2.0 + 0.5) / 2)  # half-way down
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(12, recipe) == pytest.approx(0.5)
