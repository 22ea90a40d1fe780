"""Errors that come back from another process."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from models.errors import NonFiniteOutputError
from pipeline.errors import UnpicklableError
from pipeline.workers.outcome import Outcome
from wsi.errors import SlideReadError


def received(error: Exception) -> Exception:
    """Return what another process raises if this error is raised here."""
    outcome: Outcome[Any] = pickle.loads(pickle.dumps(Outcome.failed(error)))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        outcome.result()
    assert isinstance(caught.value, Exception)
    return caught.value


def test_an_error_arrives_with_its_class_and_its_causes() -> None:
    error = SlideReadError("a.svs: cannot be read")
    error.__cause__ = NonFiniteOutputError("segmenter", [3, 5])
    there = received(error)
    assert (type(there), str(there)) == (SlideReadError, "a.svs: cannot be read")
    cause = there.__cause__
    assert isinstance(cause, NonFiniteOutputError)
    assert (cause.network, cause.indices, str(cause)) == ("segmenter", (3, 5), str(error.__cause__))


def test_a_network_error_is_picklable_without_the_pickling_support_of_another_library() -> None:
    # `distributed` makes every exception picklable in the processes that import it.
    error = NonFiniteOutputError("classifier", [1])
    kind, arguments = error.__reduce__()[:2]
    assert str(kind(*arguments)) == str(error)


def test_an_error_that_cannot_be_pickled_arrives_as_its_message() -> None:
    error = KeyError("reader")
    vars(error)["lock"] = threading.Lock()
    there = received(error)
    assert (type(there), str(there)) == (UnpicklableError, "KeyError: 'reader'")
