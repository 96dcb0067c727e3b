"""Requests that no client sends: an answer in OpenAI's shape, and never a 500."""

import functools
import io
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from diffopt.serving.protocol import EditRequest
from tests.serving.fake_engine import SIZE, FakeEngine, Served, served

GENERATIONS = "/v1/images/generations"
EDITS = "/v1/images/edits"
ENGINES = {
    "text": {"prompt": {"value": "x"}, "guidance_scale": {"value": 7.5}},
    "edit": {"prompt": {"value": "x"}, "image": {"picture": ["RGB", list(SIZE), ""]}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    engines = {name: FakeEngine(schema=schema) for name, schema in ENGINES.items()}
    with served(engines, body_seconds=1.0, max_upload_mb=0.5, max_body_mb=0.1) as it:
        yield it


def refused(response: httpx.Response, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"3",
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "x", "eta": "\\ud800"}',
    b'{"prompt": "x", "\\ud800": 1}',
    b'{"prompt": "x", "guidance_scale": NaN}',
    b'{"prompt": "x", "guidance_scale": 1e999}',
    b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b"[" * 90_000,
    b'{"a":' * 15_000,
    b'{"prompt": {"a": 1}}',
    b'{"prompt": "x", "latents": [[1, 2], [3]]}',
    b'{"prompt": "x", "": 1}',
    b'{"prompt": "x", "output_type": "pt"}',
    b'{"prompt": "x", "on_step": 3}',
    b'{"prompt": "x", "generator": 3}',
]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies(server: Served, body: bytes) -> None:
    if body.startswith(b'{"prompt"'):
        body = body.replace(b"{", b'{"model": "text", ', 1)
    refused(httpx.post(server.url + GENERATIONS, content=body, headers=JSON))


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data", ""])
def test_other_types_of_content(server: Served, kind: str) -> None:
    body = b'{"prompt": "x", "model": "text"}'
    for path in (GENERATIONS, EDITS):
        refused(httpx.post(server.url + path, content=body, headers={"Content-Type": kind}))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data; boundary=x", b"--x\r\nnonsense"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nwithout a name\r\n--x--\r\n"),
        ("multipart/form-data; boundary=", b""),
        (
            "multipart/form-data; boundary=x; charset=nothing",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--x--\r\n',
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\xff\r\n--x--\r\n',
        ),
        ("application/x-www-form-urlencoded", b"prompt=%ff%fe&model=edit"),
        ("application/x-www-form-urlencoded", b"&=&=%"),
    ],
)
def test_forms(server: Served, kind: str, body: bytes) -> None:
    refused(httpx.post(server.url + EDITS, content=body, headers={"Content-Type": kind}))


def test_paths_and_methods(server: Served) -> None:
    assert refused(httpx.get(server.url + "/v1/nothing"), 404) == "Not Found"
    assert refused(httpx.get(server.url + GENERATIONS), 405) == "Method Not Allowed"
    assert refused(httpx.delete(server.url + "/v1/models/text"), 405)
    assert refused(httpx.get(server.url + "/v1/models/%00%ff"), 404)
    assert refused(httpx.get(server.url + "/v1/files/..%2f..%2fetc"), 404)


def test_a_prompt_of_ten_megabytes(server: Served) -> None:
    body = {"prompt": "x" * 10_000_000, "model": "text"}
    message = refused(httpx.post(server.url + GENERATIONS, json=body, timeout=20), 413)
    assert message == "the request is larger than 0.1 MB"
    files = {"image": b"x" * 1_000_000}
    response = httpx.post(server.url + EDITS, files=files, data={"model": "edit"})
    assert refused(response, 413) == "the request is larger than 0.5 MB"


def talk(server: Served, *parts: bytes, apart: float = 0.0) -> bytes:
    """Send parts, some time apart, and return what comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(apart)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


def test_a_body_that_arrives_slowly(server: Served) -> None:
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    began = time.monotonic()
    answer = talk(server, head, b'{"prompt":')
    assert 0.9 < time.monotonic() - began < 5
    assert answer.startswith(b"HTTP/1.1 408 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["message"] == "the request did not arrive within 1 s"


def test_slow_clients_do_not_hold_up_others(server: Served) -> None:
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(head)
    body = {"prompt": "x", "model": "text"}
    assert httpx.post(server.url + GENERATIONS, json=body, timeout=5).status_code == 200
    for connection in slow:
        connection.close()


@pytest.mark.parametrize("host", ["[", "a b", "x:99999999", "", "\xff"])
def test_a_host_that_is_none(server: Served, host: str) -> None:
    body = b'{"prompt": "x", "model": "text", "response_format": "url"}'
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = talk(server, head.encode("latin-1") + body)
    assert answer[9:12] in (b"200", b"400")


def test_a_server_that_was_sent_nonsense_still_serves(server: Served) -> None:
    for nonsense in (b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n"):
        talk(server, nonsense + b"\r\n\r\n")
    assert httpx.get(server.url + "/health").status_code == 200


CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
)
FIELDS = EditRequest.model_fields.keys() - {"num_inference_steps", "negative_prompt", "mask"}
READ = ("/v1/models", "/v1/models/{name}", "/v1/files/{name}", "/health")


def fuzz(server: Served, path: str, method: str, mode: GenerationMode, call: Any) -> None:
    """Call with many cases of what the server's own description allows, or does not."""
    description = httpx.get(server.url + "/openapi.json").json()
    if mode.is_negative:  # which schemathesis cannot make of files
        for name in ("image", "mask"):
            del description["components"]["schemas"]["EditRequest"]["properties"][name]
    operation = schemathesis.openapi.from_dict(description)[path][method]

    @settings(
        max_examples=100 if method == "POST" else 20,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def run(case: Any) -> None:
        call(case)

    run()


@pytest.mark.parametrize("path", READ)
def test_reading_fuzzed(server: Served, path: str) -> None:
    call = functools.partial(
        schemathesis.Case.call_and_validate, base_url=server.url, checks=CHECKS
    )
    fuzz(server, path, "GET", GenerationMode.POSITIVE, call)


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_what_the_description_does_not_allow(server: Served, path: str) -> None:
    more = (*CHECKS, openapi_checks.negative_data_rejection)
    call = functools.partial(schemathesis.Case.call_and_validate, base_url=server.url, checks=more)
    fuzz(server, path, "POST", GenerationMode.NEGATIVE, call)


@pytest.mark.parametrize(("path", "name"), [(GENERATIONS, "text"), (EDITS, "edit")])
def test_what_the_description_allows(server: Served, path: str, name: str) -> None:
    """As it is, and in part with what gets past the first look: few texts are a model's name."""
    file = io.BytesIO()
    Image.new("RGB", SIZE).save(file, "PNG")
    known = {"model": name, "prompt": "x", "size": "auto"}
    known |= {"image": file.getvalue()} if name == "edit" else {}
    statuses = set()

    def call(case: Any) -> None:
        case.call_and_validate(server.url, checks=CHECKS)
        if isinstance(case.body, dict):
            for more in ({}, known, {**known, "guidance_scale": None, "n": None, "seed": None}):
                case.body = case.body | more
                statuses.add(case.call_and_validate(server.url, checks=CHECKS).status_code)
            kept = {k: v for k, v in case.body.items() if k in FIELDS and v is not None}
            case.body = kept | known
            statuses.add(case.call_and_validate(server.url, checks=CHECKS).status_code)

    fuzz(server, path, "POST", GenerationMode.POSITIVE, call)
    assert statuses >= {200, 400}
