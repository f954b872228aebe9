"""One trained run for all tests of reports."""

import folders
import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    return folders.trained_run(tmp_path_factory.mktemp("report") / "tiny")
