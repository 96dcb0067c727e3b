"""What goes over the wire: OpenAI's image API, and what others have added to it.

https://platform.openai.com/docs/api-reference/images. Its arguments that an engine has no use for
may have the values that ask for nothing. Further names are arguments of the engine.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from starlette.datastructures import UploadFile

from diffopt.errors import printable

OutputFormat = Literal["png", "jpeg", "webp"]


def _expect_text(text: str) -> str:
    """Raise a `ValueError` for half of a surrogate pair, which JSON can name and no text has."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_expect_text)]


def _expect_file(value: Any) -> Any:
    if not isinstance(value, UploadFile):
        raise ValueError("must be a file, which has a file name in the form")
    return value


File = Annotated[
    Any, AfterValidator(_expect_file), WithJsonSchema({"type": "string", "format": "binary"})
]
OF_THE_ENGINE = ("negative_prompt", "guidance_scale", "num_inference_steps")


class ImageRequest(BaseModel):
    """What both endpoints take. An argument that is null is left out."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Text | None = Field(None, description="What to make.")
    model: Text | None = Field(None, description="Of /v1/models; may be left out if there is one.")
    n: Annotated[int, Field(ge=1, description="How many images.")] | None = None
    size: Text | None = Field(None, description="The engine's own, as 512x512; or auto.")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="The quality of jpeg and webp, 100 by default."
    )
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="Nothing is moderated.")
    user: str | None = Field(None, description="Not looked at.")
    safety_identifier: str | None = Field(None, description="Not looked at.")
    stream: bool | None = Field(None, description="Send events; with n=1.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="How many previews are sent, with stream."
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = Field(
        None, description="Of the first image; the others count up. By default a random one."
    )
    negative_prompt: Text | None = Field(None, description="What to stay away from.")
    guidance_scale: float | None = Field(None, description="How much the prompt counts.")
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None

    def for_the_engine(self) -> dict[str, Any]:
        """Return the arguments that the engine's call has a say in, but for prompt and seed."""
        named = {name: getattr(self, name) for name in OF_THE_ENGINE}
        return {k: v for k, v in (named | self.others()).items() if v is not None}

    def others(self) -> dict[str, Any]:
        """Return the arguments that are not OpenAI's."""
        return dict(self.model_extra or {})


class GenerationRequest(ImageRequest):
    """The body of `/v1/images/generations`."""

    model_config = ConfigDict(strict=True)


class EditRequest(ImageRequest):
    """The form of `/v1/images/edits`, in which everything is a text."""

    image: File = Field(None, description="The picture to begin with.")
    mask: File = Field(
        None, description="What to paint anew: white, or transparent as in OpenAI's."
    )

    def others(self) -> dict[str, Any]:
        """Return the arguments that are not OpenAI's, as the JSON that their texts may be."""
        texts = super().others().items()
        return {name: _value(text) for name, text in texts if isinstance(text, str)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class ImageData(BaseModel):
    """One image: its contents or its address, and the seed that it was made with."""

    b64_json: str | None = None
    url: str | None = None
    seed: int | None = None


class TokenDetails(BaseModel):
    """Of `Usage`."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """What OpenAI bills, which is nothing here."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()


class ImagesResponse(BaseModel):
    """The images of a request."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str


class ImageEvent(BaseModel):
    """An event of a stream: a preview, or the image."""

    type: str
    b64_json: str
    partial_image_index: int | None = None
    seed: int | None = None
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage | None = None


class ModelData(BaseModel):
    """An engine."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "diffopt"


class ModelList(BaseModel):
    """The engines."""

    object: Literal["list"] = "list"
    data: list[ModelData]


class Health(BaseModel):
    """Whether requests are taken, and how many images wait for each engine."""

    status: Literal["ok", "draining"]
    waiting: dict[str, int]


class ErrorDetail(BaseModel):
    """What was wrong, and with which argument."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error as OpenAI's clients read it."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers: dict[str, str] = {}
        kind = "server_error" if status >= 500 else "invalid_request_error"
        detail = ErrorDetail(message=printable(message), type=kind, param=param, code=code)
        if param is not None:
            detail.param = printable(param)
        self.body = ErrorBody(error=detail).model_dump()
