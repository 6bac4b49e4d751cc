from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of model configs."""
    return Path(__file__).parents[2] / "configs" / "_base_" / "models"
