"""Tests marked `gpu` are skipped without a GPU, as in the product's tests."""

from conftest import pytest_collection_modifyitems

__all__ = ["pytest_collection_modifyitems"]
