"""Reference results of the layout cases, computed once for all jobs."""

import pytest

from tests.distributed import layout_cases


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    directory = tmp_path_factory.mktemp("references")
    layout_cases.write_references(directory)
    return directory
