"""nnU-Net in this process: no children, no noise, no environment left behind."""

from __future__ import annotations

import importlib
import multiprocessing
import os

import pytest

from medmamba.demo.quiet import InlinePool, environment, output_to, without_child_processes


def test_variables_are_set_and_restored_also_after_an_error(monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "before")
    monkeypatch.delenv("nnUNet_results", raising=False)
    names = ("nnUNet_raw", "nnUNet_results")
    seen = []

    def fail_inside():
        with environment(dict.fromkeys(names, "inside")):
            seen.extend(map(os.environ.get, names))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert seen == ["inside", "inside"]
    assert list(map(os.environ.get, names)) == ["before", None]


def test_what_is_printed_goes_to_the_log_and_errors_pass(tmp_path, capsys):
    log = tmp_path / "log.txt"

    def fail_inside():
        with output_to(log):
            print("noise")
            raise ValueError("seen")

    with pytest.raises(ValueError, match="seen"):
        fail_inside()
    with output_to(log):
        print("more")
    assert log.read_text() == "noise\nmore\n"
    assert capsys.readouterr().out == ""


def test_the_pool_that_is_no_pool_keeps_order_and_raises_what_the_work_raises():
    with InlinePool(processes=3) as pool:
        assert pool.starmap(pow, [(2, 3), (3, 2)]) == [8, 9]
        handle = pool.starmap_async(divmod, [(7, 2)])
        assert handle.ready()
        assert handle.get() == [(3, 1)]
        with pytest.raises(ZeroDivisionError):
            pool.starmap_async(divmod, [(1, 0)])


@pytest.mark.parametrize(
    "module",
    [
        "nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor",
        "nnunetv2.preprocessing.preprocessors.default_preprocessor",
    ],
)
def test_nnunet_opens_its_pools_where_we_replace_them(module):
    """Contract with nnU-Net: both modules ask ``multiprocessing.get_context("spawn").Pool``."""
    host = importlib.import_module(module)
    assert host.multiprocessing is multiprocessing
    with without_child_processes(), host.multiprocessing.get_context("spawn").Pool(8) as pool:
        assert isinstance(pool, InlinePool)
        assert all(worker.is_alive() for worker in pool._pool)
    assert host.multiprocessing is multiprocessing


def test_nnunet_lists_files_with_a_pool_that_we_replace():
    utils = importlib.import_module("nnunetv2.utilities.utils")
    before = utils.Pool
    with without_child_processes():
        assert utils.Pool is InlinePool
    assert utils.Pool is before
