"""Images are whole files in three formats that say what was asked, of the size that was asked."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from batchrun.simulator.drawing import draw
from batchrun.simulator.pictures import Picture
from tests.simulator.wire import LORA, OUTPAINT, PORTRAIT, STORY, simulated


def a_picture(**changes) -> Picture:
    facts = {
        "tool": "instant-id",
        "prompt": "a cat, 猫 and é",
        "seed": "7",
        "index": 0,
        "width_px": 64,
        "height_px": 64,
        "format": "png",
        "request": "abc",
    }
    return Picture(**{**facts, **changes})


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_an_image_is_whole_names_prompt_and_seed_and_is_the_same_each_time(format, real) -> None:
    picture = a_picture(format=format)
    content = draw(picture, real=real)
    assert content == draw(picture, real=real)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert (image.format, image.size) == (format.upper(), (64, 64))
        text = " ".join(str(value) for value in image.info.values())
    assert "instant-id" in text
    for words in ("a cat, 猫 and é", "Seed: 7"):
        assert words in text or words.encode() in content or format == "png"
    if format == "png":
        assert image.info["Description"] == "a cat, 猫 and é"
        assert image.info["Seed"] == "7"


@pytest.mark.parametrize("change", [{"index": 1}, {"request": "abd"}, {"seed": "8"}])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_another_index_or_request_is_another_file(change, format) -> None:
    assert draw(a_picture(format=format), real=False) != draw(a_picture(format=format, **change), real=False)


@pytest.mark.parametrize("prompt", ["", "x" * 70_000, "\0 \ud800", "| # \n\n"])
@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_any_prompt_can_be_drawn(prompt, format) -> None:
    for real in (False, True):
        content = draw(a_picture(prompt=prompt, format=format, width_px=200, height_px=120), real=real)
        with Image.open(io.BytesIO(content)) as image:
            image.load()


@pytest.mark.parametrize(
    ("tool", "body", "size", "media_type"),
    [
        (LORA, {"width": 300, "height": "200", "samples": 1}, (300, 200), "image/png"),
        (LORA, {"samples": 1}, (512, 512), "image/png"),  # the tool's default
        (OUTPAINT, {"inputImageUrl": "http://x", "width": 128, "height": 64}, (128, 64), "image/jpeg"),
        (PORTRAIT, {"inputImageUrl": "http://x"}, (1024, 1024), "image/webp"),  # the tool names no size
    ],
)
async def test_real_images_have_the_size_asked_for(tool, body, size, media_type) -> None:
    async with simulated(images="real") as wire:
        (output,) = (await wire.detail(await wire.run(tool, **body)))["outputs"]
        _, headers, content = await wire.get(output["url"])
        assert headers["Content-Type"] == media_type
        assert len(content) == int(output["size"])
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == size


async def test_a_story_has_one_image_for_each_line_that_shows_the_line() -> None:
    async with simulated() as wire:
        task = await wire.run(
            STORY, prompt="img, a man", generalPrompt="wakes up | [NC]the sun # dawn || eats"
        )
        outputs = (await wire.detail(task))["outputs"]
        shown = []
        for output in outputs:
            with Image.open(io.BytesIO((await wire.get(output["url"]))[2])) as image:
                shown.append(image.info["Description"])
        assert shown == ["img, a man, wakes up", "img, a man, [NC]the sun # dawn", "img, a man, eats"]
