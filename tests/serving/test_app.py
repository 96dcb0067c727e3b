"""The HTTP side, over loopback, with engines that draw nothing."""

import base64
import concurrent.futures
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from diffopt.engine import picture_record
from diffopt.errors import DiffoptError
from diffopt.serving.served_engine import ServedEngine
from diffopt.serving.settings import Settings
from tests.serving.fake_engine import SIZE, FakeEngine, Served, picture, served, wait_until

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
PICTURE = {"picture": ["RGB", list(SIZE), ""]}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(FakeEngine()) as it:
        yield it


def post(server: Served, path: str = GENERATIONS, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=20)


def generate(server: Served, **body: Any) -> Any:
    response = post(server, **{"prompt": "a cat", **body})
    assert response.status_code == 200, response.text
    return response.json()


def opened(data: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


def refusal(response: httpx.Response, status: int = 400) -> tuple[str, str | None]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"], error["param"]


def test_images_have_the_seeds_that_follow(server: Served) -> None:
    answer = generate(server, n=3, seed=254)
    assert [opened(data).getpixel((0, 0)) for data in answer["data"]] == [
        (254, 0, 7),
        (255, 0, 7),
        (0, 1, 7),
    ]
    assert [data["seed"] for data in answer["data"]] == [254, 255, 256]
    assert answer["size"] == "16x8"
    assert answer["output_format"] == "png"
    assert abs(answer["created"] - time.time()) < 10


def test_without_a_seed_images_differ(server: Served) -> None:
    seeds = [data["seed"] for _ in range(2) for data in generate(server, n=2)["data"]]
    assert len(set(seeds)) == 4


def test_a_png_says_what_made_it(server: Served, tmp_path: Any) -> None:
    (data,) = generate(server, seed=3, negative_prompt=None)["data"]
    (tmp_path / "a.png").write_bytes(base64.b64decode(data["b64_json"]))
    assert picture_record.read(tmp_path / "a.png") == {
        "prompt": "a cat",
        "seed": 3,
        "engine": "0123",
        "passes": "unroll",
        "target": "eager",
    }


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_other_formats(server: Served, name: str) -> None:
    sizes = []
    for quality in (100, 5):
        answer = generate(server, output_format=name, output_compression=quality)
        assert opened(answer["data"][0]).format == name.upper()
        sizes.append(len(answer["data"][0]["b64_json"]))
    assert sizes[0] > sizes[1]


def test_urls_are_those_of_files_in_memory() -> None:
    with served(FakeEngine(), token="secret", file_seconds=1) as server:
        headers = {"Authorization": "Bearer secret"}
        body = {"prompt": "a cat", "response_format": "url", "seed": 3}
        answer = httpx.post(server.url + GENERATIONS, json=body, headers=headers).json()
        url = answer["data"][0]["url"]
        assert url.startswith(server.url + "/v1/files/")
        response = httpx.get(url)
        assert response.headers["Content-Type"] == "image/png"
        assert Image.open(io.BytesIO(response.content)).getpixel((0, 0)) == (3, 0, 7)
        wait_until(lambda: httpx.get(url).status_code == 404)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"n": 0}, "n: Input should be greater than or equal to 1", "n"),
        ({"n": 11}, "n=11: at most 10", "n"),
        ({"n": "two"}, "n: Input should be a valid integer", "n"),
        ({"n": True}, "n: Input should be a valid integer", "n"),
        ({"prompt": 3}, "prompt: Input should be a valid string", "prompt"),
        ({"prompt": None}, "prompt: is missing", "prompt"),
        (
            {"size": "99999x99999"},
            "size=99999x99999: fake makes pictures of 16x8, or auto",
            "size",
        ),
        ({"size": "huge"}, "size=huge: fake makes pictures of 16x8, or auto", "size"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0", "seed"),
        ({"seed": 1 << 63}, f"seed: Input should be less than {1 << 63}", "seed"),
        ({"guidance_scale": 3}, "guidance_scale=3.0: 'guidance_scale' was bound to 7.5", None),
        ({"eta": 1}, "eta=1: the program was traced without 'eta'", "eta"),
        ({"self": 1}, "self=1: the program was traced without 'self'", "self"),
        ({"prompt": "refuse"}, "prompt: the engine does not like it", "prompt"),
        ({"quality": "high"}, "quality: Input should be 'auto'", "quality"),
        ({"background": "transparent"}, "background: Input should be 'auto' or 'opaque'", None),
        (
            {"output_type": "np"},
            "output_type: is always a picture; output_format has its format",
            None,
        ),
        (
            {"output_compression": 5},
            "output_compression: is for the output_format jpeg and webp",
            None,
        ),
        ({"stream": True, "n": 2}, "n=2: a stream is of one image", "n"),
        ({"partial_images": 2}, "partial_images: only with stream=true", "partial_images"),
        ({"prompt": "x" * 33_000}, "prompt: has 33000 characters, at most 32000", "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused(
    server: Served, body: dict[str, Any], message: str, param: str | None
) -> None:
    told, about = refusal(post(server, **{"prompt": "a cat", **body}))
    assert told.startswith(message)
    assert about == (param or next(iter(body)))


def test_numbers_that_are_equal_are_the_same(server: Served) -> None:
    generate(server, guidance_scale=7.5, size="16x8", user="me", quality="auto", n=None)


def test_models(server: Served) -> None:
    (model,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("fake", "model", "diffopt")
    assert httpx.get(server.url + "/v1/models/fake").json() == model
    message, param = refusal(httpx.get(server.url + "/v1/models/other"), 404)
    assert (message, param) == ("the model 'other' does not exist; there is fake", "model")


def test_several_engines_are_told_apart() -> None:
    engines = {"one": FakeEngine(), "two": FakeEngine()}
    with served(engines) as server:
        generate(server, model="two")
        assert (len(engines["one"].runs), len(engines["two"].runs)) == (0, 1)
        message, param = refusal(post(server, prompt="a cat"))
        assert (message, param) == ("model: is missing; there are one, two", "model")
        response = post(server, prompt="a cat", model="dall-e-3")
        assert refusal(response, 404)[1] == "model"
        assert response.json()["error"]["code"] == "model_not_found"


def test_requests_at_once_share_runs() -> None:
    engine = FakeEngine((1, 4))
    with served(engine, max_wait_ms=300) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda seed: generate(server, seed=seed), range(4)))
    assert [len(run) for run in engine.runs] == [4]
    assert [opened(a["data"][0]).getpixel((0, 0)) for a in answers] == [
        (seed, 0, 7) for seed in range(4)
    ]


def test_max_batch() -> None:
    engine = FakeEngine((1, 4))
    with served(engine, max_batch=2) as server:
        generate(server, n=4)
    assert [len(run) for run in engine.runs] == [2, 2]
    with pytest.raises(DiffoptError) as caught:
        ServedEngine("x", FakeEngine((2, 4)), Settings(max_batch=1))
    assert str(caught.value) == ("fake.engine: runs 2 to 4 requests at once, and --max-batch is 1")


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = FakeEngine(None)
    engine.gate.clear()
    with served(engine, max_queue=2) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(generate, server)
        wait_until(lambda: engine.runs)
        second = pool.submit(generate, server, n=2)
        wait_until(lambda: server.service.engines["fake"].batcher.count_waiting() == 2)
        response = post(server, prompt="a cat")
        assert refusal(response, 503)[0] == "2 images wait already, and 2 may; try again later"
        assert int(response.headers["Retry-After"]) >= 1
        assert refusal(post(server, prompt="a cat", n=3))[1] == "n"  # never
        engine.gate.set()
        assert len(first.result()["data"] + second.result()["data"]) == 3


def test_a_client_that_goes_away_leaves_the_queue() -> None:
    engine = FakeEngine(None)
    engine.gate.clear()
    with served(engine) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        batcher = server.service.engines["fake"].batcher
        first = pool.submit(generate, server, seed=1)
        wait_until(lambda: engine.runs)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + GENERATIONS, json={"prompt": "x", "n": 3}, timeout=0.3)
        wait_until(lambda: batcher.count_waiting() == 0)
        engine.gate.set()
        first.result()
        wait_until(lambda: batcher.is_idle)
        assert len(engine.runs) == 1
        assert 'path="/v1/images/generations",status="499"} 1.0' in metrics(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_run(stream: bool) -> None:
    engine = FakeEngine((1, 4))
    engine.gate.clear()
    with served(engine) as server:
        body = {"prompt": "x", "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + GENERATIONS, json=body, timeout=0.3)
        time.sleep(0.2)
        engine.gate.set()
        wait_until(lambda: engine.ended == 1)
        assert len(generate(server)["data"]) == 1


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_has_previews_and_the_image(server: Served) -> None:
    response = post(server, prompt="a cat", stream=True, partial_images=3, seed=3)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    *previews, (name, last) = events(response.text)
    assert [name for name, _ in previews] == ["image_generation.partial_image"] * 3
    assert [data["partial_image_index"] for _, data in previews] == [0, 1, 2]
    assert [opened(data).getpixel((0, 0)) for _, data in previews] == [
        (0, step, 0) for step in (1, 2, 3)
    ]
    assert {opened(data).size for _, data in previews} == {SIZE}
    assert name == last["type"] == "image_generation.completed"
    assert opened(last).getpixel((0, 0)) == (3, 0, 7)
    assert last["usage"]["total_tokens"] == 0


def test_previews_are_spread_over_the_steps() -> None:
    with served(FakeEngine(steps=10)) as server:
        for count, steps in [(0, []), (1, [5]), (2, [4, 7]), (3, [3, 5, 8])]:
            response = post(server, prompt="x", stream=True, partial_images=count)
            told = [opened(data).getpixel((0, 0))[1] for _, data in events(response.text)[:-1]]
            assert told == steps


def test_a_stream_that_fails_says_so(server: Served) -> None:
    ((name, data),) = events(post(server, prompt="fail", stream=True).text)
    assert name == "error"
    assert data["error"]["type"] == "server_error"
    assert refusal(post(server, prompt="refuse", stream=True))[1] == "prompt"


def test_a_run_that_fails_is_a_500_without_details(server: Served) -> None:
    message, _ = refusal(post(server, prompt="fail"), 500)
    assert message == "the engine failed; the server's log has the reason"


def test_what_only_a_run_can_see_is_refused_all_the_same(server: Served) -> None:
    told = refusal(post(server, prompt="long"))
    assert told == ("prompt: has more tokens than the traced one", "prompt")


def test_an_engine_without_a_prompt() -> None:
    with served(FakeEngine(schema={})) as server:
        assert len(post(server, seed=1).json()["data"]) == 1
        assert len(post(server, prompt="").json()["data"]) == 1
        told = refusal(post(server, prompt="a cat"))
        assert told == ("prompt: fake takes none; leave it out", "prompt")


def test_an_engine_that_draws_nothing() -> None:
    with served(FakeEngine(draws=False)) as server:
        assert "seed" not in generate(server)["data"][0]
        assert refusal(post(server, prompt="a cat", n=2))[1] == "n"


def file(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def edit(server: Served, files: dict[str, bytes], **form: Any) -> httpx.Response:
    data = {"prompt": "a cat", **form}
    return httpx.post(server.url + EDITS, data=data, files=files, timeout=20)


def test_edits() -> None:
    engine = FakeEngine(
        schema={"prompt": {"value": "x"}, "image": PICTURE, "strength": {"value": 1.0}}
    )
    with served(engine) as server:
        response = edit(server, {"image": file(picture(9))}, n="2", seed="4", strength="1")
        assert [data["seed"] for data in response.json()["data"]] == [4, 5]
        call = engine.runs[0][0]
        assert (call["image"].getpixel((0, 0)), call["strength"]) == ((9, 0, 7), 1.0)
        assert type(call["strength"]) is float
        assert edit(server, {"image[]": file(picture(9))}).status_code == 200
        assert refusal(edit(server, {}, n="2")) == ("image: is missing", "image")
        image = {"image": file(picture(9))}
        assert refusal(edit(server, image | {"mask": file(picture(9))}))[1] == "mask"
        assert refusal(edit(server, image | {"other": b"x"}))[1] == "other"
        assert refusal(edit(server, image | {"image[]": file(picture(1))}))[1] == "image"
        assert refusal(edit(server, image, n="x"))[1] == "n"
        assert refusal(edit(server, image, eta="[1"))[0].startswith("eta=[1: ")
        large = file(Image.new("RGB", (64, 64)))
        told = refusal(edit(server, {"image": large}))
        assert told == ("image: is 64x64, the engine takes 16x8", "image")
        told = refusal(edit(server, {"image": b"GIF89a"}))
        assert told == ("image: is no intact PNG, JPEG or WebP file", "image")
        truncated = file(Image.effect_noise(SIZE, 9))[:90]
        assert refusal(edit(server, {"image": truncated}))[1] == "image"
        assert refusal(post(server, prompt="x")) == (
            "fake makes images of another one: use edits, at /v1/images",
            "model",
        )
        events_ = events(edit(server, image, stream="true", partial_images="1").text)
        assert [name for name, _ in events_] == ["image_edit.partial_image", "image_edit.completed"]


def test_edits_of_an_engine_that_takes_no_picture(server: Served) -> None:
    assert refusal(edit(server, {"image": file(picture(1))})) == (
        "fake makes images of a prompt alone: use generations, at /v1/images",
        "model",
    )


def test_masks_are_white_or_transparent() -> None:
    schema = {
        "prompt": {"value": "x"},
        "image": PICTURE,
        "mask_image": {"picture": ["L", list(SIZE), ""]},
    }
    engine = FakeEngine(schema=schema)
    clear = picture(1).convert("RGBA")
    clear.putpixel((2, 3), (0, 0, 0, 0))
    white = Image.new("L", SIZE)
    white.putpixel((2, 3), 255)
    image = file(picture(1))
    with served(engine) as server:
        for files in (
            {"image": image, "mask": file(white)},
            {"image": image, "mask": file(clear)},
            {"image": file(clear)},
        ):
            assert edit(server, files).status_code == 200
            call = engine.runs[-1][0]
            assert call["mask_image"].tobytes() == white.tobytes()
            assert call["image"].mode == "RGB"
        told = refusal(edit(server, {"image": image}))
        assert told == ("mask: is missing, and nothing of the image is transparent", "mask")


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            {"picture_sizes": []},
            "fake.engine: makes no pictures, and so cannot be served",
        ),
        (
            {"picture_sizes": [SIZE] * 4},
            "fake.engine: makes 4 pictures in a call, and one that is served makes one: build it"
            " without a fixed --batch, or with --batch 1..4",
        ),
        (
            {"schema": {"control_image": PICTURE}},
            "fake.engine: takes a picture as 'control_image', for which requests have no place",
        ),
    ],
)
def test_engines_that_cannot_be_served(engine: dict[str, Any], message: str) -> None:
    fake = FakeEngine(schema=engine.get("schema"))
    if "picture_sizes" in engine:
        fake.picture_sizes = lambda: engine["picture_sizes"]
    with pytest.raises(DiffoptError) as caught:
        ServedEngine("x", fake, Settings())
    assert str(caught.value) == message


def test_the_token() -> None:
    with served(FakeEngine(), token="secret") as server:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
                response = httpx.get(server.url + path, headers=headers)
                assert refusal(response, 401)[0] == "a bearer token is needed"
                assert response.headers["WWW-Authenticate"] == "Bearer"
            headers = {"Authorization": "Bearer secret"}
            assert httpx.get(server.url + path, headers=headers).status_code == 200
        for path in ("/", "/health"):
            assert httpx.get(server.url + path).status_code == 200
        assert refusal(httpx.get(server.url + "/v1/files/x"), 404)


def metrics(server: Served) -> str:
    return httpx.get(server.url + "/metrics").text


def test_metrics() -> None:
    engine = FakeEngine((1, 4))
    with served(engine) as server:
        generate(server, n=3)
        post(server, n=0)
        httpx.get(server.url + "/nothing/here")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        wait_until(lambda: 'status="499"' in metrics(server))
        lines = metrics(server).splitlines()
    expected = [
        'diffopt_requests_total{path="/v1/images/generations",status="200"} 1.0',
        'diffopt_requests_total{path="/v1/images/generations",status="400"} 1.0',
        'diffopt_requests_total{path="other",status="404"} 1.0',
        'diffopt_requests_total{path="other",status="499"} 1.0',
        'diffopt_request_seconds_count{path="/v1/images/generations"} 2.0',
        'diffopt_images_total{model="fake"} 3.0',
        'diffopt_batch_size_bucket{le="2.0",model="fake"} 0.0',
        'diffopt_batch_size_bucket{le="3.0",model="fake"} 1.0',
        'diffopt_queue_images{model="fake"} 0.0',
    ]
    assert not set(expected) - set(lines)


def test_the_page(server: Served) -> None:
    response = httpx.get(server.url)
    assert "<form" in response.text
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_health_and_refusals_while_it_drains() -> None:
    engine = FakeEngine((1, 4))
    engine.gate.clear()
    with (
        served(engine, drain_seconds=60) as server,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        assert httpx.get(server.url + "/health").json() == {"status": "ok", "waiting": {"fake": 0}}
        first = pool.submit(generate, server)
        wait_until(lambda: engine.runs)
        server.service.engines["fake"].batcher.close()  # what a signal does; see test_signals
        assert refusal(post(server, prompt="x"), 503)[0] == "the server is shutting down"
        engine.gate.set()
        assert len(first.result()["data"]) == 1


def test_a_port_that_is_taken(server: Served) -> None:
    from diffopt.serving import server as serving

    with pytest.raises(DiffoptError) as caught:
        serving.listen("127.0.0.1", server.port)
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{server.port}: Address already in use"
    )
    with socket.create_connection(("127.0.0.1", server.port)):
        pass
