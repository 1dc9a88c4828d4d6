"""Shared fixtures. `shared_data` is the folder of real tokenizers, templates and datasets that may lie beside the checkout;
tests that need it skip without it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real test data (../shared/data) is not here")
    return folder
