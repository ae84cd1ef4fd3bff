"""One page of a list, as the API shows it."""

from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class Page(msgspec.Struct, Generic[T], frozen=True):
    """Each list's own page inherits it, with its elements' type: the OpenAPI document names schemas after structs.

    `total`: how many there are on all pages.
    """

    items: list[T]
    page: int
    limit: int
    total: int
