"""Tasks and tools as the service shows them: all fields of the seeds' examples, numbers and times as text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import takewhile
from typing import Any
from urllib.parse import quote

from batchrun.model import Parameter, Tool
from batchrun.simulator.pictures import EXTENSIONS, MEDIA_TYPES, format_of
from batchrun.simulator.prices import CPS, dynamic_price
from batchrun.simulator.tasks import SimTask
from batchrun.simulator.validate import RANGES, required_files, required_texts

USER_UUID = "15bce51f-442f-4f44-a71d-13c6374a62bd"
PROJECT_ID = "699"
FIRST_MODEL_ID = 598

#: Names that no client may use as a path (fault task-names).
HOSTILE_NAMES = (
    "../../../escape.png",
    "/etc/escape.png",
    "nul\0.png",
    "n" * 300 + ".png",
    "CON",
    "0.png",
    "0.png",
    "",
)

#: Fields of a task that hold an instant, and the status that brings it.
_TIMES = {
    "starttime": "task_start",
    "endtime": "task_end",
    "canceltime": "task_cancel",
    "assigntime": "task_assign",
    "accepttime": "task_accept",
    "preprocessstarttime": "task_preprocess_start",
    "preprocessendtime": "task_preprocess_end",
    "postprocessstarttime": "task_postprocess_start",
    "postprocessendtime": "task_postprocess_end",
}


class Views:
    """Turns tasks into the service's JSON; knows the addresses of files and the wall clock."""

    def __init__(self, *, origin: Callable[[], str], wall: Callable[[float], float], salt: str) -> None:
        self._origin = origin
        self._wall = wall
        self._salt = salt

    def task(self, task: SimTask, now: float, *, hide_parameters: bool = False) -> dict[str, Any]:
        """The task object of Task/Detail and Task/List at the ledger's `now`; counts as a look."""
        ended = task.ended_at is not None
        if ended:
            task.looks += 1
            task.noticed_at = task.noticed_at or now
        outputs = self.outputs(task)
        reached: dict[str, float] = {}
        status = ""
        for at, status in takewhile(lambda stage: stage[0] <= now, task.stages()):
            reached.setdefault(status, at)
        shown: dict[str, Any] = {
            "id": str(task.id),
            "uuid": USER_UUID,
            "name": "",
            "socketaccesstoken": task.token,
            "parameters": {} if hide_parameters else task.parameters,
            "debugoutput": "",
            "debugerror": _debug_error(task) if ended else "",
            "elapsedseconds": f"{task.elapsed_s:.4f}",
            "status": status,
            "cps": f"{CPS:.12f}",
            "totalcost": f"{task.cost_usd:.12f}",
            "guestid": None,
            "projectid": PROJECT_ID,
            "modelid": str(FIRST_MODEL_ID + sum(task.tool.slug.encode())),
            "description": "",
            "basemodelid": "0",
            "runtype": "model",
            "modelfolderid": "",
            "modelfileid": "",
            "callbackurl": task.callback_url,
            "marketplaceid": None,
            "createtime": self._seconds(task.made_at),
            "pexit": None,
            "categories": json.dumps(task.tool.categories),
            "outputs": outputs,
            "size": str(sum(int(output.get("size", "0")) for output in outputs)),
        }
        for name, brought_by in _TIMES.items():
            shown[name] = self._seconds(reached[brought_by]) if brought_by in reached else "0"
        if task.ended_at is not None:
            if status == "task_error":
                shown["endtime"] = self._seconds(task.ended_at)
            _set_exit(task, shown)
        return _odd(shown) if task.fault == "task-odd-types" else shown

    def outputs(self, task: SimTask) -> list[dict[str, Any]]:
        """The task's files as listed; empty before its end. Its pictures must have been measured."""
        if task.outputs == 0 or (task.fault == "task-late-outputs" and task.looks <= 1):
            return []
        files = [self._output(task, index) for index in range(task.outputs)]
        if task.fault == "task-raw":
            files.append({"contenttype": "raw", "content": {"prompt": "a note", "raw": "a note"}})
        return files

    def address(self, task: SimTask, index: int) -> str:
        """The present URL of an image; it changes when an address has expired."""
        name = quote(self.name(task, index), safe="") or "0"
        return f"{self._origin()}/cdn/{self.file_key(task, index)}/{name}"

    def file_key(self, task: SimTask, index: int, version: int | None = None) -> str:
        """The unguessable part of an image's address; the present one unless a version is named."""
        version = task.address_version.get(index, 0) if version is None else version
        text = f"{task.id:x}-{index}-{version}"
        return f"{text}-{hashlib.sha256(f'{self._salt}:{text}'.encode()).hexdigest()[:32]}"

    def name(self, task: SimTask, index: int) -> str:
        """The file name the service gives: the same for every task, unless hostile."""
        if task.fault == "task-names":
            return HOSTILE_NAMES[(task.id + index) % len(HOSTILE_NAMES)]
        return f"{index}.{EXTENSIONS[format_of(task.tool)]}"

    def media_type(self, task: SimTask) -> str:
        """The media type that outputs and CDN declare."""
        true = MEDIA_TYPES[format_of(task.tool)]
        if task.fault != "cdn-wrong-type":
            return true
        return "image/jpeg" if true != "image/jpeg" else "image/png"

    def _output(self, task: SimTask, index: int) -> dict[str, Any]:
        assert task.sizes_bytes is not None
        assert task.ended_at is not None
        size = task.sizes_bytes[index] + (7 if task.fault == "cdn-wrong-size" else 0)
        at = self._seconds(task.ended_at)
        number = hashlib.sha256(f"{task.token}:{index}".encode()).hexdigest()
        return {
            "id": number[:32],
            "name": self.name(task, index),
            "contenttype": self.media_type(task),
            "parentid": number[32:],
            "uuid": USER_UUID,
            "size": str(size),
            "addedtime": at,
            "modifiedtime": at,
            "accesskey": number[10:40],
            "foldercount": "0",
            "filecount": "0",
            "ispublic": 0,
            "expiretime": None,
            "url": self.address(task, index),
        }

    def _seconds(self, at: float) -> str:
        return str(int(self._wall(at)))


def file_entry(
    *, number: str, name: str, media_type: str, size_bytes: int, url: str, at: str
) -> dict[str, Any]:
    """An uploaded file as File/Upload lists it."""
    return {
        "id": number,
        "name": name,
        "contenttype": media_type,
        "parentid": "",
        "uuid": USER_UUID,
        "size": str(size_bytes),
        "addedtime": at,
        "modifiedtime": at,
        "accesskey": number,
        "foldercount": "0",
        "filecount": "0",
        "ispublic": 0,
        "expiretime": None,
        "url": url,
    }


def tool(tool: Tool, made: Sequence[SimTask]) -> dict[str, Any]:
    """A tool as Tool/Detail shows it; averages are over `made`, the tasks of this tool."""
    succeeded = [task for task in made if task.succeeded]
    count = max(1, len(succeeded))
    cost = sum((task.cost_usd for task in succeeded), Decimal(0)) / count
    seconds = sum((task.elapsed_s for task in succeeded), Decimal(0)) / count
    failed = sum(task.ended_at is not None and not task.succeeded for task in made)
    return {
        **tool_summary(tool),
        "parameters": [
            {"title": "Parameters", "note": "", "items": [_item(tool, p) for p in tool.parameters]}
        ],
        "dynamicprice": dynamic_price(tool.slug),
        "cps": f"{CPS:.12f}",
        "approximatelycost": f"{cost:.12f}",
        "computingtime": f"{seconds:.4f}",
        "taskstat": {
            "runcount": str(len(made)),
            "successcount": str(len(succeeded)),
            "errorcount": str(failed),
        },
    }


def tool_summary(tool: Tool) -> dict[str, Any]:
    """A tool as Tool/List shows it."""
    _, _, owner, project = tool.run_path.split("/")
    return {
        "id": str(FIRST_MODEL_ID + sum(tool.slug.encode())),
        "title": tool.title,
        "slugowner": owner,
        "slugproject": project,
        "description": tool.description,
        "categories": list(tool.categories),
    }


def _item(tool: Tool, parameter: Parameter) -> dict[str, Any]:
    low, high = RANGES.get(parameter.name, ("", ""))
    needed = (*required_texts(tool), *required_files(tool))
    return {
        "id": parameter.name,
        "type": parameter.type,
        "label": parameter.label,
        "required": parameter.name in needed,
        "default": parameter.default,
        "options": [{"label": option.label, "value": option.value} for option in parameter.options or ()],
        "min": str(low),
        "max": str(high),
        "step": "1" if parameter.type == "number" else "",
    }


def _debug_error(task: SimTask) -> str:
    if task.succeeded:
        return "warning: half precision is slow on this device" if task.id % 7 == 0 else ""
    return "" if task.stopped else "RuntimeError: CUDA out of memory"


def _set_exit(task: SimTask, shown: dict[str, Any]) -> None:
    match task.fault:
        case "task-pexit-null":
            shown["pexit"] = None
        case "task-pexit-empty":
            shown["pexit"] = ""
        case "task-pexit-number":
            shown["pexit"] = 0
        case "task-pexit-absent":
            del shown["pexit"]
        case _:
            shown["pexit"] = "0" if task.succeeded else "1"


def _odd(shown: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts in neighbouring JSON types."""
    odd = {
        name: int(value) if name.endswith("time") or name == "id" else value for name, value in shown.items()
    }
    odd["parameters"] = json.dumps(shown["parameters"])
    odd["elapsedseconds"] = float(shown["elapsedseconds"])
    odd["categories"] = json.loads(shown["categories"])
    odd["outputs"] = [{**output, "size": int(output["size"])} for output in shown["outputs"]] or None
    del odd["debugerror"], odd["description"]
    return odd
