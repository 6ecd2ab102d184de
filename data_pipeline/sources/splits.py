"""Splits by their customary names, and what is held out where there is none."""

from collections.abc import Collection
from dataclasses import replace

from data_pipeline.sources.base import Item

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "valid", "test")  # the first that is there


def choose_splits(found: Collection[str]) -> dict[str, str]:
    """The split that each name in lower case stands for; empty where `found` has no training split.

    A test set is held out only where there is no validation set: its images are otherwise no more to be looked at.
    """
    if not set(found) & set(TRAIN_NAMES):
        return {}
    held_out = [name for name in VAL_NAMES if name in found][:1]
    return dict.fromkeys(TRAIN_NAMES, "train") | dict.fromkeys(held_out, "val")


def hold_out(items: list[Item], share: float) -> list[Item]:
    """Where there is no held-out split: keep `share` of every class, evenly spread over its items, for one."""
    if not share or any(item.split == "val" for item in items):
        return items
    seen: dict[int, int] = {}
    result = []
    for item in items:
        index = seen.get(item.label, 0)
        seen[item.label] = index + 1
        held = int((index + 1) * share + 1e-9) > int(index * share + 1e-9)
        result.append(replace(item, split="val") if held else item)
    return result


def unique_keys(items: list[Item], where: list[str]) -> list[Item]:
    """The items, with their place in the source added to every key that an earlier one has."""
    seen: set[str] = set()
    result = []
    for item, place in zip(items, where, strict=True):
        unique = item if item.key not in seen else replace(item, key=f"{item.key} ({place})")
        seen.add(unique.key)
        result.append(unique)
    return result
