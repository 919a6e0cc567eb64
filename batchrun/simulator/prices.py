"""What tasks cost: published prices (`dynamicprice`) by tool, and the bill of a finished task.

Sums are exact decimals of twelve digits, as the service writes them. A tool without a published price costs
elapsed seconds times `CPS`, known only afterwards (wiro-api.md, "Tools"). The figures are ours, the methods
the service's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

#: USD per second of a tool without a published price; the figure of the seeds' example.
CPS = Decimal("0.000585")
_PIXELS_A_PART = 1_048_576
_TWELVE_DIGITS = Decimal("0.000000000001")

PRICES: dict[str, list[dict[str, Any]]] = {
    "text-to-image-sd-lora": [{"inputs": {}, "price": "0.0035", "priceMethod": "cpo"}],
    "instant-id": [{"inputs": {}, "price": "0.02", "priceMethod": "cpr"}],
    "outpainting-sdxl-advanced": [
        {"inputs": {}, "price": "0.008", "priceExtra": "0.004", "priceMethod": "cp-pixel"},
    ],
    "story-diffusion-advanced": [
        {"inputs": {}, "price": "0.008", "priceMethod": "cpo"},
        {"inputs": {"styleName": "Comic book"}, "price": "0.0105", "priceMethod": "cpo"},
    ],
}


def dynamic_price(slug: str) -> str:
    """The tool's price list as JSON text; empty when it has none."""
    return json.dumps(PRICES[slug]) if slug in PRICES else ""


def bill(
    slug: str, parameters: Mapping[str, Any], *, images: int, pixels: int, elapsed_s: Decimal
) -> Decimal:
    """The USD charged for a task that made `images` files of `pixels` each in `elapsed_s` seconds."""
    entry = _entry(slug, parameters)
    if entry is None:
        return (CPS * elapsed_s).quantize(_TWELVE_DIGITS)
    price = Decimal(entry["price"])
    match entry["priceMethod"]:
        case "cpo":
            price *= images
        case "cps":
            price *= elapsed_s
        case "cp-pixel":
            further = max(0, -(-pixels // _PIXELS_A_PART) - 1)
            price = (price + further * Decimal(entry["priceExtra"])) * images
    return price.quantize(_TWELVE_DIGITS)


def _entry(slug: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry that counts: the one with the most inputs among those that all hold."""
    fitting = [
        entry
        for entry in PRICES.get(slug, ())
        if all(parameters.get(name) == value for name, value in entry["inputs"].items())
    ]
    return max(fitting, key=lambda entry: len(entry["inputs"]), default=None)
