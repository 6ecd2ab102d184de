"""What every section of a recipe is made of."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PositiveFloat

from configs.duration import Duration


def _positive(length: Duration) -> Duration:
    if length.value <= 0:
        raise ValueError(f"'{length}' must be more than zero")
    return length


def ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"give the smaller bound first: [{bounds[1]}, {bounds[0]}]")
    return bounds


def default_kind(kind: str) -> BeforeValidator:
    """For a section of several kinds: the one that is meant where none is given."""

    def add(value: Any) -> Any:
        return {"kind": kind, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(add)


def exact(number: float) -> Fraction:
    """The decimal number that was written in the recipe: 0.8 is 4/5, not the binary fraction next to it."""
    return Fraction(str(number))


PositiveDuration = Annotated[Duration, AfterValidator(_positive)]
Bounds = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(ascending)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
