"""The tiny detector in the place of the small preset."""

import pytest
from helpers import detection_runs


@pytest.fixture
def tiny_network():
    with detection_runs.tiny_network():
        yield


@pytest.fixture(scope="session")
def scenes():
    return detection_runs.dataset()
