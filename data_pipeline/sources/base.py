"""What a source of images is."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Item:
    """One image to ingest.

    Attributes:
        split: "train" or "val".
        label: index into the classes of the listing.
        key: its name for people, unique in the source.
        path: where `Source.read` finds it.
        size: bytes in the source, or an estimate; shards are cut by it.
    """

    split: str
    label: int
    key: str
    path: str
    size: int


@dataclass(frozen=True)
class Listing:
    """Everything in a source: `classes` in the order of labels, `items` in an order that depends on nothing else."""

    classes: list[str]
    items: list[Item]


class Source(Protocol):
    """A set of images. It can be pickled, so that several processes may read parts of it.

    Attributes:
        name: of the data set, for people.
        sequential: whether an image cannot be read without its neighbours in the listing, so that shards that follow
            its order are read many times faster than shards of items from everywhere.
    """

    name: str
    sequential: bool

    def listing(self) -> Listing:
        """What is there; raises LonghaulError where it cannot be listed."""
        ...

    def read(self, items: list[Item]) -> Iterator[bytes | OSError]:
        """The encoded images of some of the listing's items, in order; an error in the place of one that cannot be
        read. Raises LonghaulError where the source itself is gone."""
        ...
