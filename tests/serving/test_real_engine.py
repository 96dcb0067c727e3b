"""A trained model behind OpenAI's own client: what it makes is what the engine makes."""

import base64
import concurrent.futures
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import diffopt
from diffopt.engine import picture_record
from diffopt.serving.batcher import Batcher, Batching, Job
from tests.serving.fake_engine import Served, served
from tests.serving.test_hostile_requests import BODIES, JSON, refused
from tests.zoo import CASES

PROMPTS = ("ankle boot", "dress", "sneaker", "coat", "bag", "sandal", "shirt", "trouser")


@pytest.fixture(scope="module")
def engine(fashion: Path) -> Any:
    return diffopt.load(fashion)


@pytest.fixture(scope="module")
def server(engine: Any) -> Iterator[Served]:
    with served({"fashion": engine}, max_wait_ms=100) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)


def opened(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def distance(one: Image.Image, other: Image.Image) -> int:
    """Return by how many of 255 two pictures differ at most."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_an_image_is_the_engines(client: openai.OpenAI, engine: Any, tmp_path: Path) -> None:
    answer = client.images.generate(
        prompt="ankle boot", model="fashion", size="32x32", n=2, extra_body={"seed": 5}
    )
    for data, seed in zip(answer.data, (5, 6), strict=True):
        alone = engine(prompt="ankle boot", seed=seed, output_type="pil").images[0]
        assert distance(opened(data.b64_json), alone) <= 1
    (tmp_path / "a.png").write_bytes(base64.b64decode(answer.data[1].b64_json))
    told = picture_record.read(tmp_path / "a.png")
    assert (told["prompt"], told["seed"]) == ("ankle boot", 6)
    assert told["engine"] == engine.digest()
    assert told["passes"] == engine.manifest["passes"]


def test_images_of_shared_runs_are_those_of_runs_alone(
    client: openai.OpenAI, engine: Any, server: Served
) -> None:
    def ask(seed: int) -> Any:
        prompt = PROMPTS[seed]
        return client.images.generate(prompt=prompt, model="fashion", extra_body={"seed": seed})

    before = runs(server)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert 2 <= runs(server) - before < 8
    for seed, answer in enumerate(answers):
        alone = engine(prompt=PROMPTS[seed], seed=seed, output_type="pil").images[0]
        assert distance(opened(answer.data[0].b64_json), alone) <= 1


def runs(server: Served) -> float:
    text = httpx.get(server.url + "/metrics").text
    (line,) = [row for row in text.splitlines() if row.startswith("diffopt_batch_size_count")]
    return float(line.split()[-1])


def test_urls(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="dress", response_format="url")
    response = httpx.get(answer.data[0].url)
    assert Image.open(io.BytesIO(response.content)).size == (32, 32)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fashion"]
    assert client.models.retrieve("fashion").owned_by == "diffopt"


def test_a_stream(client: openai.OpenAI, engine: Any) -> None:
    stream = client.images.generate(
        prompt="dress", stream=True, partial_images=2, extra_body={"seed": 1}
    )
    *previews, last = stream
    assert last.type == "image_generation.completed"
    alone = engine(prompt="dress", seed=1, output_type="pil").images[0]
    assert distance(opened(last.b64_json), alone) <= 1
    assert last.usage.total_tokens == 0
    if getattr(engine, "steps", 0):
        assert [event.partial_image_index for event in previews] == [0, 1]
        assert all(opened(event.b64_json).size == (32, 32) for event in previews)
    else:
        assert previews == []


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ({"size": "1024x1024"}, "size", "size=1024x1024: fashion makes pictures of 32x32, or auto"),
        (
            {"extra_body": {"num_inference_steps": 50}},
            "num_inference_steps",
            "num_inference_steps=50: 'num_inference_steps' was bound to 3 at capture; trace again"
            " with this value, or with dynamic=('num_inference_steps',)",
        ),
        (
            {"extra_body": {"eta": 0.5}},
            "eta",
            "eta=0.5: 'eta' was left out at capture, which means 0.0; trace again with this value",
        ),
    ],
)
def test_what_the_engine_refuses(
    client: openai.OpenAI, arguments: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="dress", **arguments)
    assert caught.value.param == param
    assert caught.value.body["message"] == message


def test_what_the_engine_was_built_with_is_taken(client: openai.OpenAI) -> None:
    assert client.images.generate(prompt="dress", extra_body={"num_inference_steps": 3}).data


def test_errors_are_those_of_the_client(client: openai.OpenAI, server: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="dress", model="dall-e-3")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="use generations"):
        client.images.edit(prompt="dress", image=io.BytesIO(b"x"))


@pytest.mark.skipif(not hasattr(diffopt.Engine, "cancel"), reason="needs Engine.cancel")
def test_a_run_that_nobody_waits_for_ends_after_its_step(engine: Any) -> None:
    taken: list[int] = []
    queue = Batcher(engine.serve, Batching(1, 4), end=engine.cancel)

    def leave(step: Any, place: int) -> None:
        taken.append(step.index)
        queue.cancel([job])

    job = Job({"prompt": "dress", "seed": 1, "output_type": "pil"}, leave)
    queue.submit([job])
    with pytest.raises(diffopt.Cancelled, match="after step 1 of 3"):
        job.result.result(10)
    assert taken == [1]
    again = Job(job.arguments)
    queue.submit([again])
    alone = engine(**job.arguments).images[0]
    assert distance(again.result.result(10).images[0], alone) == 0
    queue.close()


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_hostile_bodies(server: Served, body: bytes) -> None:
    url = server.url + "/v1/images/generations"
    refused(httpx.post(url, content=body, headers=JSON))


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


def test_any_argument_of_any_value(engine: Any, server: Served) -> None:
    """The engine's own and others, of any type: an image or a refusal."""
    host = engine.host
    names = sorted({*host.schema, *host.defaults, "self", "on_step", "eta", "target_size", ""})

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    def run(more: dict[str, Any]) -> None:
        body = {"prompt": "x", **more}
        response = httpx.post(
            server.url + "/v1/images/generations", content=json.dumps(body), headers=JSON
        )
        if response.status_code != 200:
            refused(response)

    run()


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    shape = (32, 32, 3) if mode == "RGB" else (32, 32)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def edited(tmp_path: Path, name: str, **pictures: Image.Image) -> Any:
    """Return an engine of a tiny pipeline that takes pictures."""
    pipe = CASES[name].build()
    arguments = {"prompt": "a", "num_inference_steps": 2, "strength": 0.9, "output_type": "pil"}
    generator = torch.Generator().manual_seed(0)
    size = {} if "img2img" in name else {"height": 32, "width": 32}
    program = diffopt.trace(pipe, **arguments, **pictures, **size, generator=generator)
    return diffopt.build(program, "eager", tmp_path / "edit.engine")


def as_file(image: Image.Image, path: Path) -> Path:
    image.save(path)
    return path


def test_an_image_of_an_image(tmp_path: Path) -> None:
    engine = edited(tmp_path, "sd-img2img", image=picture(0))
    file = as_file(picture(1), tmp_path / "image.png")
    wanted = engine(prompt="dress", image=picture(1), seed=4).images[0]
    assert distance(wanted, engine(prompt="dress", image=picture(2), seed=4).images[0])
    with served(engine) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
        for more in ({}, {"strength": 0.9}):
            answer = client.images.edit(
                prompt="dress", image=file, size="auto", extra_body={"seed": 4, **more}
            )
            assert distance(opened(answer.data[0].b64_json), wanted) == 0
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(prompt="dress", image=[file], extra_body={"strength": 0.5})
        assert caught.value.param == "strength"


def test_an_image_with_a_mask(tmp_path: Path) -> None:
    engine = edited(tmp_path, "sd-inpaint", image=picture(0), mask_image=picture(1, "L"))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    hole = picture(2).convert("RGBA")
    hole.putalpha(Image.eval(mask, lambda value: 255 - value))
    wanted = engine(prompt="dress", image=picture(2), mask_image=mask, seed=4).images[0]
    with served(engine) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
        image = as_file(picture(2), tmp_path / "image.png")
        transparent = as_file(hole, tmp_path / "hole.png")
        white = as_file(mask, tmp_path / "mask.png")
        for files in (
            {"image": image, "mask": white},
            {"image": image, "mask": transparent},
            {"image": transparent},
        ):
            answer = client.images.edit(prompt="dress", **files, extra_body={"seed": 4})
            assert distance(opened(answer.data[0].b64_json), wanted) == 0
