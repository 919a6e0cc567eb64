"""A caller that speaks to the simulator by hand, so that these tests share nothing with the client."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from batchrun.model import Option, Parameter, Setting, Tool
from batchrun.simulator.server import Simulator

AGENT = "simulator-tests/1"
#: Long enough that no test sees the end of a task that takes so long.
FOREVER_S = 10_000


def _tool(slug: str, *parameters: Parameter, owner: str = "wiro") -> Tool:
    return Tool(slug, f"/Run/{owner}/{slug}", f"{owner}/{slug}", f"Makes {slug}.", ("tool",), parameters)


_SIZE = (Parameter("width", "number", "512"), Parameter("height", "number", "512"))
_LORA = Option("62", "Happy", settings=(Setting("Happy-v1.0", "number", None, None, "5"),))

LORA = _tool(
    "text-to-image-sd-lora",
    Parameter("selectedModel", "select", "1", options=(Option("850", "Lykon/DreamShaper-XL"),)),
    Parameter("selectedModelPrivate", "select", "", options=()),
    Parameter("selectedLoraModel", "multiselect", "61", options=(_LORA,)),
    Parameter("prompt", "textarea", "a sample"),
    Parameter("samples", "number", "4"),
    Parameter("steps", "number", "30"),
    Parameter("scale", "float", "7.5"),
    Parameter("seed", "text", "123456"),
    *_SIZE,
)
CARTOON = _tool(
    "Retro-Cartoons",
    Parameter("prompt", "textarea", "a sample"),
    Parameter("samples", "number", "4"),
    *_SIZE,
    owner="retroAIx",
)
PORTRAIT = _tool(
    "instant-id",
    Parameter("inputImageUrl", "text", ""),
    Parameter("prompt", "textarea", "a sample"),
    Parameter("samples", "number", "1"),
)
OUTPAINT = _tool("outpainting-sdxl-advanced", Parameter("inputImageUrl", "text", ""), *_SIZE)
STORY = _tool(
    "story-diffusion-advanced",
    Parameter("prompt", "textarea", "img, a sample"),
    Parameter("generalPrompt", "textarea", "wake up | have breakfast"),
    Parameter("styleName", "select", "Comic book", options=(Option("Comic book", "Comic book"),)),
    Parameter("seed", "number", "123456 "),
    *_SIZE,
)
TOOLS = (LORA, CARTOON, PORTRAIT, OUTPAINT, STORY)


class Caller:
    """Sends signed requests to one simulator and takes the answers apart."""

    def __init__(self, sim: Simulator, session: aiohttp.ClientSession) -> None:
        self.sim = sim
        self.session = session

    def headers(
        self, *, nonce: str = "1", key: str | None = None, secret: str | None = None
    ) -> dict[str, str]:
        """Signed headers; the nonce is as old as can be."""
        key, secret = key or self.sim.key, secret or self.sim.secret
        headers = {"User-Agent": AGENT, "x-api-key": key}
        if secret is None:
            return headers
        signature = hmac.new(key.encode(), (secret + nonce).encode(), hashlib.sha256).hexdigest()
        return {**headers, "x-nonce": nonce, "x-signature": signature}

    @asynccontextmanager
    async def post(self, path: str, **body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """A signed POST of a JSON object, as it is answered."""
        url = self.sim.base_url + path
        async with self.session.post(url, json=body, headers=self.headers()) as response:
            yield response

    async def call(self, path: str, **body: Any) -> dict[str, Any]:
        """The envelope that a POST is answered with."""
        async with self.post(path, **body) as response:
            return await response.json()

    async def refusal(self, path: str, **body: Any) -> tuple[int, str]:
        """(code, message) of a call that is refused, with HTTP 200."""
        async with self.post(path, **body) as response:
            assert response.status == 200
            envelope = await response.json()
        assert envelope["result"] is False
        (error,) = envelope["errors"]
        return error["code"], error["message"]

    async def run(self, tool: Tool = LORA, **body: Any) -> str:
        """The id of a task just made."""
        body = {"prompt": "a cat", **body}
        envelope = await self.call(tool.run_path, **body)
        assert envelope["result"] is True, envelope
        return envelope["taskid"]

    async def detail(self, task: str) -> dict[str, Any]:
        """The task object as Task/Detail shows it."""
        (shown,) = (await self.call("/Task/Detail", taskid=task))["tasklist"]
        return shown

    async def get(self, url: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of a plain GET that follows no redirect."""
        async with self.session.get(url, headers=headers, allow_redirects=False) as response:
            return response.status, dict(response.headers), await response.read()


@asynccontextmanager
async def simulated(*faults: str, **options: Any) -> AsyncIterator[Caller]:
    """A simulator whose tasks end at once, unless told otherwise, and a caller for it."""
    options = {"seconds": 0, "tools": TOOLS, "faults": faults, **options}
    async with Simulator(**options) as sim, aiohttp.ClientSession() as session:
        yield Caller(sim, session)
