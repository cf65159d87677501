"""Sentences made of what libraries say."""

import pytest

from nnunet_lgms.files import one_line


@pytest.mark.parametrize("folder", ["/data/a_long_name_of_a_patient/" * 8, "C:\\scans\\" * 20])
def test_no_path_is_cut_in_a_message_of_a_library(folder: str):
    """Half a path names another file."""
    path = f"{folder}image.nii.gz"
    assert path in one_line(f"ITK ERROR: could not read\n  {path}: " + "no reason at all " * 100)
    assert path in one_line(f"{'what came before ' * 12} {path}")


def test_what_is_cut_ends_with_a_word():
    assert one_line("one\n two") == "one two"
    assert one_line("word " * 100, longest=12) == "word word word ..."
    assert one_line("x" * 500) == "x" * 500
