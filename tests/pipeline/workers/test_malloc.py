"""What a process keeps."""

from __future__ import annotations

import gc
import sys

from pipeline.workers.malloc import imported_for_good, keep_freed_memory


def test_freed_memory_can_be_kept_on_linux() -> None:
    assert keep_freed_memory() is sys.platform.startswith("linux")


def test_the_collector_rests_during_imports_and_skips_their_objects_later() -> None:
    kept: list[list[int]] = []
    before = gc.get_freeze_count()
    try:
        with imported_for_good("a_library_that_is_not_imported"):
            assert not gc.isenabled()
            kept.append([1])
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
        assert not any(found is kept for found in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(found is kept for found in gc.get_objects())


def test_a_library_that_is_there_already_keeps_no_garbage() -> None:
    before = gc.get_freeze_count()
    with imported_for_good("gc"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
