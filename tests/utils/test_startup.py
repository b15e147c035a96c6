"""Imports without garbage collection."""

import gc

import pytest

from hfvit.utils.startup import fast_imports


@pytest.fixture
def restored():
    yield
    gc.enable()


def failing_import():
    with fast_imports():
        assert not gc.isenabled()
        import hfvit.no_such_module  # noqa: F401


@pytest.mark.parametrize("enabled", [True, False])
def test_fast_imports_restores_the_garbage_collection(enabled, restored):
    if not enabled:
        gc.disable()
    frozen = gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        failing_import()
    assert gc.isenabled() == enabled
    assert gc.get_freeze_count() == frozen  # nothing was imported
