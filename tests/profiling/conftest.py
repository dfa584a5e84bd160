import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Estimates of the tests are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCEPSY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
