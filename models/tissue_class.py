"""A tissue class: the one type for it in model cards, data sets, stored maps, run records, pages and viewers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_serializer
from pydantic.dataclasses import dataclass

Byte = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Byte, Byte, Byte]
"""Red, green, blue."""

Role = Literal["tissue", "background"]


def _plain(name: str) -> str:
    if ":" in name or name != name.strip() or not name.isprintable():
        raise ValueError(f"class name {name!r} must be printable, without ':' and without space around it")
    return name


ClassName = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_plain)]
"""A valid name of a tissue class. QuPath reads "a: b" as a class derived from another one."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TissueClass:
    """One class of a model. Raises pydantic's ValidationError, which is a ValueError, for a bad name or color."""

    name: ClassName
    color: Color
    role: Role = "tissue"
    """"background" marks a class that is not tissue, such as glass."""

    @model_serializer
    def as_json(self) -> dict[str, object]:
        """Return the class as JSON values. The default role is left out, so older files keep their bytes."""
        role = {} if self.role == "tissue" else {"role": self.role}
        return {"name": self.name, "color": list(self.color), **role}
