"""Lengths of training in the unit in which they are meant: epochs, iterations or samples."""

import math
import re
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

_PATTERN = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(k|M)?\s*(ep|it|samples)\s*$")
_MULTIPLE = {None: 1, "k": 1_000, "M": 1_000_000}


@dataclass(frozen=True)
class Duration:
    """A length of training such as ``90ep``, ``600000it`` (or ``600kit``) or ``1.2Msamples``.

    Units follow the field's use: an epoch is one pass over the training split, an iteration is one optimizer
    step on a whole batch. Validated and serialised by pydantic as the string the user wrote.
    """

    value: float
    unit: str
    text: str

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Parse ``"90ep"``; raises ValueError with the accepted forms for anything else."""
        match = _PATTERN.match(str(text))
        if match is None:
            raise ValueError(f"'{text}' is not a duration: write it as 90ep, 600000it or 1.2Msamples")
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

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, cls) else cls.parse(value),
            serialization=core_schema.plain_serializer_function_ser_schema(str),
        )
