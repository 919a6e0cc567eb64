"""From what a row gives to what is sent: the tool's whole set of parameters.

Everything a tool takes is sent, as in its own sample request, so that an image's metadata tells the whole
story. Defaults that are samples are not: nobody should be billed for the picture a page shows off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

from batchrun.model import LocalImage, Parameter, Tool, Value
from batchrun.tools.values import RANDOM, default_value, is_image, is_seed, takes_many

#: Where an option's own number goes: into the prompt as `<lora:ID:VALUE>`, the one form seen in use, or
#: beside it as a parameter of its own.
LoraScale = Literal["prompt", "parameter"]

#: Texts whose default is a sample but which a row need not give.
_SAMPLES = frozenset({"extraEventPrompts"})


class Sender:
    """Makes request bodies for one tool."""

    def __init__(self, tool: Tool, lora_scale: LoraScale) -> None:
        self._template = {parameter.name: _unasked(parameter) for parameter in tool.parameters}
        self._lists = [name for name, value in self._template.items() if isinstance(value, list)]
        self._seeds = {p.name: p.type == "number" for p in tool.parameters if is_seed(p)}
        #: Whether a number under no parameter's name goes into the prompt.
        self._scale_in_prompt = lora_scale == "prompt" and "prompt" in self._template

    def body(
        self, given: Mapping[str, Value | LocalImage], *, uploads: Mapping[str, str], seed_key: str
    ) -> dict[str, Value]:
        """The parameters to send, in the tool's order; an option's own numbers, if sent, come last.

        `uploads` holds the address of each local image by its SHA-256; a missing one is a KeyError. Random
        seeds are drawn from `seed_key`, the same ones for the same key.
        """
        body: dict[str, Value] = dict(self._template)
        for name in self._lists:
            body[name] = []
        scales: list[str] = []
        for name, value in given.items():
            if isinstance(value, LocalImage):
                address = uploads[value.sha256]
                body[name] = [address] if name in self._lists else address
            elif value == RANDOM and name in self._seeds:
                seed = drawn_seed(name, seed_key)
                body[name] = seed if self._seeds[name] else str(seed)
            elif self._scale_in_prompt and name not in self._template:
                scales.append(name)
            else:
                body[name] = list(value) if isinstance(value, list) else value
        for name in scales:
            if f"<lora:{name}:" not in str(body["prompt"]):
                body["prompt"] = f"{body['prompt']} <lora:{name}:{given[name]}>"
        return body


def drawn_seed(name: str, seed_key: str) -> int:
    """A seed from 1 to 2**31 - 1, the same one for the same parameter and key."""
    digest = hashlib.sha256(f"{name}\0{seed_key}".encode()).digest()
    return 1 + int.from_bytes(digest[:8]) % (2**31 - 1)


def _unasked(parameter: Parameter) -> Value:
    """What is sent when a row does not give the parameter: the default, unless that is a sample."""
    if takes_many(parameter):
        return []
    if parameter.required or parameter.name in _SAMPLES or is_image(parameter):
        return ""
    return default_value(parameter)
