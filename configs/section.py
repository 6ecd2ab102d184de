"""What every section of a recipe is made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveFloat

from configs.duration import Duration


def _positive(length: Duration) -> Duration:
    if length.value <= 0:
        raise ValueError(f"'{length}' must be more than zero")
    return length


def ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"give the smaller bound first: [{bounds[1]}, {bounds[0]}]")
    return bounds


PositiveDuration = Annotated[Duration, AfterValidator(_positive)]
Bounds = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(ascending)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
