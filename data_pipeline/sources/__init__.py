"""Where images come from."""

from data_pipeline.sources.base import Item, Listing, Source
from data_pipeline.sources.opening import open_source

__all__ = ["Item", "Listing", "Source", "open_source"]
