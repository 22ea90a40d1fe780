"""How work in another process ended, as a value that travels."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from pipeline.errors import PipelineError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Outcome(Generic[Value]):
    """How a task ended. Errors travel as values, each with those it was raised from, which a raised one would lose."""

    value: Value | None = None
    errors: tuple[Exception, ...] = ()

    @classmethod
    def by(cls, error: Exception) -> Self:
        """The end of a task that raised this."""
        return cls(errors=tuple(_travelling(e) for e in _chain(error)))

    def result(self) -> Value:
        """The task's value; raises its error."""
        for error, cause in itertools.pairwise(self.errors):
            error.__cause__ = cause
        if self.errors:
            raise self.errors[0]
        assert self.value is not None
        return self.value


def _chain(error: BaseException | None) -> Iterator[Exception]:
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _travelling(error: Exception) -> Exception:
    """The error, or what it says where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - whatever its class does
        return PipelineError(f"{type(error).__name__}: {error}")
    return error
