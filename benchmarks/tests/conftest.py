"""Tests marked `gpu` are skipped without a GPU, as in the product's tests, and one of their fixtures."""

from conftest import pytest_collection_modifyitems, verify_in_threads

__all__ = ["pytest_collection_modifyitems", "verify_in_threads"]
