"""The endpoints under /v1 and the CDN: what each does to the world, and the faults that strike there."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import takewhile
from typing import Any

from aiohttp import BodyPartReader, web

from batchrun.model import Tool
from batchrun.simulator import auth, cdn, views
from batchrun.simulator.envelope import (
    KEY_REFUSED,
    LIMIT_REACHED,
    NOT_FOUND,
    SIGNATURE_REFUSED,
    TROUBLE,
    VALIDATION,
    Refusal,
    answer,
    page,
    refused,
)
from batchrun.simulator.faults import Fault
from batchrun.simulator.pictures import size_px
from batchrun.simulator.tasks import SimTask, fingerprint
from batchrun.simulator.validate import image_count, validate
from batchrun.simulator.weather import spoil
from batchrun.simulator.world import World

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Given = dict[str, Any]

#: The largest file that is taken (wiro-api.md names no figure; the project's own limit).
MAX_UPLOAD_BYTES = 100 * 1024 * 1024
_LARGEST_PAGE = 100


class Api:
    """The service's routes over one world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def routes(self) -> list[web.RouteDef]:
        """All routes of API and CDN."""
        return [
            web.post("/v1/Run/{owner}/{tool}", self._guarded("run", self._run)),
            web.post("/v1/Task/Detail", self._guarded("detail", self._detail)),
            web.post("/v1/Task/List", self._guarded("list", self._list)),
            web.post("/v1/Task/Cancel", self._guarded("cancel", self._stop)),
            web.post("/v1/Task/Kill", self._guarded("kill", self._stop)),
            web.post("/v1/File/Upload", self._guarded("upload", self._upload)),
            web.post("/v1/Tool/Detail", self._guarded("tool", self._tool)),
            web.post("/v1/Tool/List", self._guarded("tool", self._tools)),
            web.get("/v1/File/{code}/{name}", self._file),
            web.get("/cdn/{key}/{name:.*}", self._image),
        ]

    def _guarded(self, name: str, handler: Handler) -> Handler:
        """The handler behind the firewall and the key check; its refusals become answers."""
        world = self._world

        async def guarded(request: web.Request) -> web.StreamResponse:
            world.requests[name] += 1
            if not auth.welcome(request.headers):
                return page(403, "Forbidden", "This User-Agent is not welcome: send one of your own.")
            if world.options.latency_s:
                await asyncio.sleep(world.options.latency_s)
            try:
                auth.check(request.headers, key=world.options.key, secret=world.options.secret)
                return await handler(request)
            except Refusal as refusal:
                return self._refused(refusal)

        return guarded

    def _refused(self, refusal: Refusal) -> web.Response:
        self._world.refusals[refusal.code] += 1
        return refused(refusal)

    async def _spoiled(
        self, request: web.Request, fault: Fault | None, act: Callable[[], Awaitable[web.Response]]
    ) -> web.StreamResponse:
        """What the client gets of `act` when `fault`, one of the wire, strikes."""
        if fault is None:
            return await act()
        given: web.Response | None = None
        if fault.acts:
            try:
                given = await act()
            except Refusal as refusal:
                given = self._refused(refusal)
        return await spoil(fault.kind, request, given, self._world.weather)

    # --- submitting ------------------------------------------------------------------------------

    async def _run(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        tool = world.tool(f"{request.match_info['owner']}/{request.match_info['tool']}")
        fault = world.plan.strike("run", tool=tool.slug if tool else None)
        if fault is not None and fault.kind == "refused":
            return await self._spoiled(request, fault, _nothing)
        given = await self._given(request)
        if fault is not None and fault.kind == "limit-odd":
            limit = world.ledger.limit or max(1, world.ledger.active)
            words = world.ledger.limit_reached(limit).message
            world.refusals[LIMIT_REACHED] += 1
            return web.json_response({"errors": [{"code": str(LIMIT_REACHED), "msg": words}]})
        if fault is not None and (refusal := self._run_refusal(fault.kind)) is not None:
            raise refusal
        if fault is not None and fault.kind == "no-id":
            self._make(tool, given)
            return answer()

        async def act() -> web.Response:
            task = self._make(tool, given)
            return answer(taskid=str(task.id), socketaccesstoken=task.token)

        return await self._spoiled(request, fault, act)

    def _make(self, tool: Tool | None, given: Given) -> SimTask:
        world = self._world
        if tool is None:
            raise Refusal(NOT_FOUND, "There is no tool with this name.")
        parameters = validate(tool, given)
        world.ledger.admit()
        images = image_count(tool, parameters)
        fault = world.plan.strike("task", tool=tool.slug, key=fingerprint(tool, parameters))
        task = world.ledger.make(
            tool,
            parameters,
            images=images,
            size_px=size_px(tool, parameters, real=world.studio.real),
            fault=fault.name if fault else None,
            callback_url=str(given.get("callbackUrl", "")),
        )
        world.studio.begin(task)
        return task

    def _run_refusal(self, kind: str) -> Refusal | None:
        ledger = self._world.ledger
        match kind:
            case "code0":
                return Refusal(TROUBLE, "An unexpected error occurred, please try again later.")
            case "validation":
                return Refusal(VALIDATION, "Request parameters are invalid.")
            case "notfound":
                return Refusal(NOT_FOUND, "There is no tool with this name.")
            case "limit":
                # As if somebody else held the slots: the number is the true limit where there is one.
                return ledger.limit_reached(ledger.limit or max(1, ledger.active))
            case "limit-nonumber":
                return Refusal(LIMIT_REACHED, "You have reached the limit of concurrent tasks.")
            case "balance":
                return ledger.balance_exhausted()
            case "401":
                return Refusal(KEY_REFUSED, "Your API key is not valid.", status=401)
            case "98":
                return Refusal(KEY_REFUSED, "Your API key is not valid.")
            case "99":
                return Refusal(SIGNATURE_REFUSED, "Your signature is not valid.")
        return None

    # --- tracking --------------------------------------------------------------------------------

    async def _detail(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        given = await self._given(request)
        task = world.ledger.find(number=_text(given, "taskid"), token=_text(given, "tasktoken"))
        fault = world.plan.strike("detail", tool=task.tool.slug)
        if fault is not None and fault.kind == "empty":
            return answer(total="0", tasklist=[])
        if fault is not None and fault.kind == "unknown":
            raise Refusal(NOT_FOUND, "There is no task yet.")
        return await self._spoiled(request, fault, lambda: self._shown([task], total=1))

    async def _shown(
        self, tasks: list[SimTask], *, total: int, hide_parameters: bool = False
    ) -> web.Response:
        world = self._world
        # Real images are awaited, and meanwhile further tasks may end.
        while unmeasured := [task for task in tasks if task.outputs and task.sizes_bytes is None]:
            for task in unmeasured:
                await world.measure(task)
        now = world.ledger.now
        shown = [world.views.task(task, now, hide_parameters=hide_parameters) for task in tasks]
        return answer(total=str(total), tasklist=shown)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        given = await self._given(request)
        fault = world.plan.strike("list")
        kind = fault.kind if fault is not None else ""
        if kind == "off":
            raise Refusal(NOT_FOUND, "There is no such endpoint.", status=404)
        world.ledger.advance()
        tasks = self._named(_text(given, "modelName"))
        shown = len(tasks) - (self._young(tasks) if kind == "late" else 0)
        start = _number(given, "start", 0)
        places = range(start, min(shown, start + min(_number(given, "limit", _LARGEST_PAGE), _LARGEST_PAGE)))
        if _text(given, "order").upper() == "ASC":
            chosen = [tasks[place] for place in places]
        else:
            chosen = [tasks[shown - 1 - place] for place in places]
        if kind == "empty":
            chosen, shown = [], 0
        hide = kind == "no-parameters"
        if kind in ("late", "empty", "no-parameters"):
            fault = None
        return await self._spoiled(
            request, fault, lambda: self._shown(chosen, total=shown, hide_parameters=hide)
        )

    def _named(self, name: str) -> Sequence[SimTask]:
        """All tasks, or those of the tool of this name ("owner/name" or "name"), oldest first."""
        ledger, wanted = self._world.ledger, name.lower()
        if not wanted:
            return ledger.tasks
        for tool in self._world.tools:
            if wanted in (tool.slug.lower(), tool.run_path.removeprefix("/Run/").lower()):
                return ledger.made_by(tool)
        return ()

    def _young(self, tasks: Sequence[SimTask]) -> int:
        """How many of the newest tasks Task/List does not show yet when it is late."""
        since = self._world.ledger.now - self._world.options.late_s
        return sum(1 for _ in takewhile(lambda task: task.made_at > since, reversed(tasks)))

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        given = await self._given(request)
        kill = request.path.endswith("/Kill")
        token = _text(given, "tasktoken") or _text(given, "socketaccesstoken")
        task = world.ledger.find(number=_text(given, "taskid"), token=token)
        fault = world.plan.strike("stop", tool=task.tool.slug)
        ignored = fault is not None and fault.kind == "ignored"

        async def act() -> web.Response:
            if not ignored:
                world.ledger.stop(task, assigned=kill)
            return await self._shown([task], total=1)

        return await self._spoiled(request, None if ignored else fault, act)

    # --- files and tools -------------------------------------------------------------------------

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        fault = world.plan.strike("upload")
        if not request.content_type.startswith("multipart/"):
            raise Refusal(VALIDATION, "Request files [file] required")

        async def act() -> web.Response:
            kept = [upload async for _, upload in self._parts(request) if isinstance(upload, cdn.Upload)]
            if not kept:
                raise Refusal(VALIDATION, "Request files [file] required")
            at = str(int(world.wall(world.ledger.now)))
            return answer(
                list=[
                    views.file_entry(
                        number=upload.sha256[:32],
                        name=upload.name,
                        media_type=upload.media_type,
                        size_bytes=upload.size_bytes,
                        url=world.url(upload),
                        at=at,
                    )
                    for upload in kept
                ]
            )

        return await self._spoiled(request, fault, act)

    async def _tool(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        given = await self._given(request)
        tool = world.tool(f"{_text(given, 'slugowner')}/{_text(given, 'slugproject')}")
        fault = world.plan.strike("tool", tool=tool.slug if tool else None)
        if tool is None or (fault is not None and fault.kind == "off"):
            raise Refusal(NOT_FOUND, "There is no tool with this name.")
        world.ledger.advance()

        async def act() -> web.Response:
            return answer(total="1", tool=[views.tool(tool, world.ledger.made_by(tool))])

        return await self._spoiled(request, fault, act)

    async def _tools(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        given = await self._given(request)
        words = _text(given, "search").lower()
        shown = [
            views.tool_summary(tool)
            for tool in world.tools
            if words in tool.title.lower() or words in tool.description.lower()
        ]
        start, limit = _number(given, "start", 0), _number(given, "limit", _LARGEST_PAGE)

        async def act() -> web.Response:
            return answer(total=str(len(shown)), tool=shown[start : start + limit])

        fault = world.plan.strike("tool")
        if fault is not None and fault.kind == "off":
            raise Refusal(NOT_FOUND, "There is no such endpoint.")
        return await self._spoiled(request, fault, act)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        self._world.requests["file"] += 1
        file = self._world.files.get(request.path)
        return page(404, "Not Found") if file is None else cdn.answer(request, file)

    async def _image(self, request: web.Request) -> web.StreamResponse:
        world = self._world
        world.requests["cdn"] += 1
        world.ledger.advance()
        found = self._addressed(request.match_info["key"])
        if found is None:
            return page(404, "Not Found")
        task, index = found
        if task.gone:
            return page(410, "Gone")
        if request.match_info["key"] != world.views.file_key(task, index):
            return page(403, "Forbidden", "Request has expired")
        if request.query_string == cdn.LOOP:
            return cdn.redirect(request, cdn.LOOP)
        content = await world.studio.file(task, index)
        file = cdn.File(content, world.views.media_type(task), cdn.etag(content, world.options.etag))
        fault = None
        if "Range" in request.headers:
            fault = world.plan.strike("cdn-range", tool=task.tool.slug, key=(task.id, index))
        if fault is None:
            fault = world.plan.strike("cdn", tool=task.tool.slug, key=(task.id, index))
        if fault is None:
            sent = cdn.answer(request, file)
            task.fetched[index] = task.fetched.get(index, 0) + (sent.status == 200)
            return sent
        if fault.kind == "403":
            task.address_version[index] = task.address_version.get(index, 0) + 1
        if fault.kind == "gone":
            task.gone = True
            world.ledger.tell(task)
        return await cdn.spoiled(request, file, fault.kind, stall=world.weather.stall)

    def _addressed(self, key: str) -> tuple[SimTask, int] | None:
        """The task and index that an address, fresh or expired, stands for."""
        world = self._world
        number, _, rest = key.partition("-")
        index, _, rest = rest.partition("-")
        version, _, _ = rest.partition("-")
        try:
            task = world.ledger.find(number=str(int(number, 16)))
        except (Refusal, ValueError):
            return None
        if not (index.isdecimal() and version.isdecimal() and int(index) < task.images and task.succeeded):
            return None
        return (task, int(index)) if world.views.file_key(task, int(index), int(version)) == key else None

    # --- bodies ----------------------------------------------------------------------------------

    async def _given(self, request: web.Request) -> Given:
        """The parameters of a request: a JSON object, or the fields and files of a form; raises Refusal."""
        if request.content_type.startswith("multipart/") and "boundary=" in request.headers["Content-Type"]:
            given: Given = {}
            async for name, part in self._parts(request):
                given[name] = self._world.url(part) if isinstance(part, cdn.Upload) else part
            return given
        # The seeds' own samples send JSON under a multipart header without a boundary.
        try:
            body = json.loads(await request.read() or b"{}")
        except ValueError:
            raise Refusal(VALIDATION, "Request parameters are invalid.") from None
        if not isinstance(body, dict):
            raise Refusal(VALIDATION, "Request parameters are invalid.")
        return body

    async def _parts(self, request: web.Request) -> AsyncIterator[tuple[str, str | cdn.Upload]]:
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                continue
            content = bytes(await part.read())
            if len(content) > MAX_UPLOAD_BYTES:
                raise Refusal(VALIDATION, f"Request files [{part.name}] must not be larger than 100 MB")
            if part.filename is None:
                yield part.name or "", content.decode("utf-8", "replace")
            else:
                yield part.name or "", self._keep(part, content)

    def _keep(self, part: BodyPartReader, content: bytes) -> cdn.Upload:
        world = self._world
        digest = hashlib.sha256(content).hexdigest()
        stem = re.sub(r"\W", "", part.name or "", flags=re.ASCII) or "file"
        suffix = re.search(r"\.[A-Za-z0-9]{1,5}$", part.filename or "")
        path = f"/v1/File/{digest[:30]}/{stem}-{len(world.uploads) + 1}{suffix[0] if suffix else ''}"
        media_type = part.headers.get("Content-Type", "application/octet-stream")
        upload = cdn.Upload(path, part.filename or "", media_type, digest, len(content))
        world.keep(upload, content)
        return upload


async def _nothing() -> web.Response:
    return web.Response()


def _text(given: Given, name: str) -> str:
    value = given.get(name)
    return "" if value is None else str(value)


def _number(given: Given, name: str, otherwise: int) -> int:
    text = _text(given, name)
    return int(text) if text.isdecimal() else otherwise
