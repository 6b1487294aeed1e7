"""Every fault of tests/reliability/faults.py is found, named, and survived."""

import os
import pathlib
import shutil

import pytest

from tests.reliability import damage, faults

SMALL_DISKS = pytest.mark.skipif(
    not faults.small_disks(), reason="this machine gives a program no disk of its own"
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return faults.two_checkpoints(folder), folder


@pytest.fixture
def saved(two, tmp_path):
    pipe, folder = two
    return pipe, pathlib.Path(shutil.copytree(folder, tmp_path / "saved"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    return faults.make_images(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> pathlib.Path:
    return faults.whole_run(images, tmp_path_factory.mktemp("whole"))


def test_whole_checkpoints_are_taken(saved):
    assert faults.restored(*saved) == (5, [])


@pytest.mark.parametrize("harm", damage.ACCIDENTS)
def test_an_accident(saved, harm):
    assert faults.damaged(*saved, damage.ACCIDENTS[harm])


@pytest.mark.parametrize("harm", damage.STRANGERS)
def test_what_a_stranger_made_fit(saved, harm):
    assert faults.damaged(*saved, damage.STRANGERS[harm])


@pytest.mark.parametrize("check", faults.CHECKPOINTS.values())
def test_other_checkpoints(saved, check):
    assert check(*saved)


@pytest.mark.parametrize("fault", faults.STAGES)
def test_stages(fault):
    said = str(faults.STAGES[fault]())
    assert said.endswith("[1, 1, 1]") if "skip" in fault else "mini-batch 5" in said


@SMALL_DISKS
def test_a_disk_that_is_full_while_saving(images, whole, tmp_path):
    assert "step-000000010 whole" in faults.full_while_saving(images, whole, tmp_path)


@pytest.mark.slow
@SMALL_DISKS
def test_a_disk_that_is_full_at_the_end(images, whole, tmp_path):
    assert "cannot be written (No space left on device)" in faults.full_at_the_end(
        images, whole, tmp_path
    )


@pytest.mark.skipif(
    os.geteuid() == 0 and not faults.small_disks(), reason="root may read everything"
)
def test_an_image_that_may_not_be_read(images, whole, tmp_path):
    assert "3.png cannot be read (Permission denied)" in faults.image_unreadable(
        images, whole, tmp_path
    )


def test_a_data_set_that_has_gone(images, whole, tmp_path):
    assert "there is no such folder" in faults.data_gone(images, whole, tmp_path)
