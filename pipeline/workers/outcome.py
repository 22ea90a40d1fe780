"""The outcome of work in another process, as a value that can be pickled."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from pipeline.errors import UnpicklableError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """The value or the errors of a task. The first error was raised; each further one is the cause of the one before.

    Exceptions are returned as values because pickling a raised exception drops its causes.
    """

    value: Value | None = None
    errors: tuple[Exception, ...] = ()

    @classmethod
    def failed(cls, error: Exception) -> Self:
        """Return the outcome of a task that raised this error."""
        return cls(errors=tuple(_picklable(one) for one in _with_causes(error)))

    @property
    def error(self) -> Exception | None:
        """Return the error of the task with its causes, or None if the task has a value."""
        for error, cause in itertools.pairwise(self.errors):
            error.__cause__ = cause
        return self.errors[0] if self.errors else None

    def result(self) -> Value:
        """Return the value of the task, or raise its error."""
        if (error := self.error) is not None:
            raise error
        assert self.value is not None
        return self.value


def _with_causes(error: BaseException | None) -> Iterator[Exception]:
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _picklable(error: Exception) -> Exception:
    """Return the error, or an UnpicklableError with its message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - the class of the error may raise anything
        return UnpicklableError(f"{type(error).__name__}: {error}")
    return error
