"""Lengths of training in the unit in which they are meant, epochs, iterations or samples; and times by the clock."""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import GetCoreSchemaHandler, PlainSerializer, PlainValidator
from pydantic_core import core_schema

_NUMBER = r"^\s*([0-9]+(?:\.[0-9]+)?)\s*"
_LENGTH = re.compile(_NUMBER + r"(k|M)?\s*(ep|it|samples)\s*$")
_TIME = re.compile(_NUMBER + r"(s|min|h)\s*$")
_MULTIPLE = {None: 1, "k": 1_000, "M": 1_000_000}
_SECONDS = {"s": 1, "min": 60, "h": 3600}


class _Written(ABC):
    """Validated and serialised by pydantic as the string the user wrote."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self: ...

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.parse(value),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )


@dataclass(frozen=True)
class Duration(_Written):
    """A length of training such as ``90ep``, ``600000it`` (or ``600kit``) or ``1.2Msamples``.

    Units follow the field's use: an epoch is one pass over the training split, an iteration is one optimizer
    step on a whole batch.
    """

    value: float
    unit: str
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``"90ep"``; raises ValueError with the accepted forms for anything else."""
        match = _LENGTH.match(str(text))
        if match is None:
            clock = " (not by the clock, which differs from machine to machine)" if _TIME.match(str(text)) else ""
            raise ValueError(f"'{text}' is not a duration: write it as 90ep, 600000it or 1.2Msamples{clock}")
        number, multiple, unit = match.groups()
        return cls(float(number) * _MULTIPLE[multiple], unit, "".join(str(text).split()))

    def samples(self, batch_size: int, num_samples: int) -> float:
        """This length in samples, for a batch of `batch_size` and a training split of `num_samples`."""
        factor = {"ep": num_samples, "it": batch_size, "samples": 1}[self.unit]
        return self.value * factor

    def steps(self, batch_size: int, num_samples: int) -> int:
        """The number of optimizer steps after which this length has been reached (rounded up)."""
        # The tolerance keeps 0.1ep of 1000 samples at 100 samples, not 100.00000000000001 -> one step more.
        return math.ceil(self.samples(batch_size, num_samples) / batch_size - 1e-9)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class WallTime(_Written):
    """A time by the clock such as ``90s``, ``30min`` or ``1.5h``: a type of its own, because what decides a result
    must not depend on how fast the machine is."""

    seconds: float
    text: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``"30min"``; raises ValueError with the accepted forms for anything else, and for zero."""
        match = _TIME.match(str(text))
        if match is None:
            raise ValueError(f"'{text}' is not a time: write it as 90s, 30min or 2h")
        number, unit = match.groups()
        if float(number) == 0:
            raise ValueError(f"'{text}' must be more than zero")
        return cls(float(number) * _SECONDS[unit], "".join(str(text).split()))

    def __str__(self) -> str:
        return self.text


def _interval(value: Any, forms: str = "1ep, 500it, 1.2Msamples or 30min") -> Duration | WallTime:
    if isinstance(value, Duration | WallTime):
        return value
    if _TIME.match(str(value)):
        return WallTime.parse(value)
    if not _LENGTH.match(str(value)):
        raise ValueError(f"'{value}' is not an interval: write it as {forms}")
    length = Duration.parse(value)
    if length.value == 0:
        raise ValueError(f"'{value}' must be more than zero")
    return length


def _interval_or_auto(value: Any) -> Duration | WallTime | Literal["auto"]:
    return "auto" if value == "auto" else _interval(value, "1ep, 500it, 1.2Msamples, 30min or auto")


Interval = Annotated[Duration | WallTime, PlainValidator(_interval), PlainSerializer(str)]
"""A length of training or a time by the clock; more than zero."""

IntervalOrAuto = Annotated[
    Duration | WallTime | Literal["auto"], PlainValidator(_interval_or_auto), PlainSerializer(str)
]
"""An interval, or `auto`: chosen while the run goes on."""
