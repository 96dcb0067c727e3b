"""What Python computes of pictures and arrays follows new ones, or these are refused."""

import copy
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps

import diffopt
from diffopt.capture.perturbation import separated
from diffopt.capture.verification import differences
from diffopt.errors import CaptureError, DiffoptError
from diffopt.host.array_expressions import evaluate
from diffopt.ir.program import Program
from tests.capture.random_samplers import picture
from tests.capture.test_arguments import expect_equal, expect_equal_from_file, refusal, sampler


def bright(image):
    return np.asarray(image, dtype=np.float32) / 255


def masked(image):
    array = bright(image)
    array[array < 0.5] = 0
    array[array >= 0.5] = 1
    return 1 - array


def in_place(image):
    array = np.array(image)
    array //= 2
    array[1:, ..., 0] = array[:-1, ..., 1]
    return array.astype(np.float32) * 0.5


def framed(image):
    frame = Image.new("RGB", (12, 10), (9, 8, 7))
    frame.paste(image.resize((4, 4)), (2, 3))
    return np.array(frame)


def layered(image):
    red, green, _ = image.split()
    other = Image.merge("RGB", (green, red, red)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(Image.blend(image, other, 0.25))


def through_bytes(image):
    array = (bright(image).mean(-1) * 255).round().astype("uint8")
    return np.array(Image.fromarray(array, mode="L").convert("RGB").crop((1, 1, 5, 4)))


def gathered(image):
    parts = [
        np.array(image)[None],
        np.array(image.rotate(90, expand=True).resize(image.size))[None],
    ]
    return np.concatenate(parts).transpose(0, 3, 1, 2)[:, ::-1]


def scaled(image):
    array = bright(image)
    return (array - array.min()) / np.maximum(array.max() - array.min(), 1e-6)


def rows_one_by_one(image):
    return np.stack([row.sum(axis=0) for row in bright(image)])


FUNCTIONS = {
    "masked": masked,
    "in place": in_place,
    "framed": framed,
    "layered": layered,
    "through bytes": through_bytes,
    "gathered": gathered,
    "scaled": scaled,
    "row by row": rows_one_by_one,
    "blurred": lambda image: np.array(image.filter(ImageFilter.GaussianBlur(1.5)).convert("L")),
    "upright": lambda image: np.array(ImageOps.exif_transpose(image).convert("RGB")),
    "fitted": lambda image: np.array(ImageOps.fit(image, (5, 5), Image.Resampling.BILINEAR)),
    "padded": lambda image: np.pad(np.array(image), ((1, 2), (0, 0), (0, 0)), mode="edge"),
    "copied": lambda image: np.array(copy.copy(copy.deepcopy([image])[0]).reduce(2)),
    "where": lambda image: np.where(np.array(image) > 100, np.float32(1), np.float32(-1)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("entry", ["from_numpy", "tensor", "as_tensor"])
def test_pictures(name, entry, tmp_path):
    def function(parts, image):
        array = FUNCTIONS[name](image)
        return getattr(torch, entry)(np.ascontiguousarray(array)) * 1

    pipe = sampler(function)
    source = random.Random(1)
    program = diffopt.trace(pipe, image=picture(source, (8, 6)))
    expect_equal_from_file(pipe, program, tmp_path, image=picture(source, (8, 6)))


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_arrays(dtype):
    def function(parts, array):
        return torch.from_numpy(np.stack([array * 2, array[::-1]])).float()

    pipe = sampler(function)
    values = [np.random.default_rng(s).integers(0, 99, (3, 4)).astype(dtype) for s in (0, 1)]
    program = diffopt.trace(pipe, array=values[0])
    expect_equal(pipe, program, array=values[1])


def test_lists_of_pictures():
    def function(parts, images):
        return torch.tensor(np.array([np.array(image) for image in images]))

    pipe = sampler(function)
    source = random.Random(1)
    program = diffopt.trace(pipe, images=[picture(source), picture(source)])
    expect_equal(pipe, program, images=[picture(source), picture(source)])


# What Python reads


def of_a_sort(parts, image):
    array = np.array(image)
    if array.max() > 128:
        return torch.from_numpy(array) * 2
    return torch.from_numpy(array) + 1


def region(parts, image):
    box = image.convert("L").point(lambda v: 255 if v > 10 else 0).getbbox()
    return torch.from_numpy(np.array(image.crop(box)))


def first_row(parts, image):
    array = np.array(image.convert("L"))
    top = 0
    while top < len(array) - 1 and (array[top] == 0).all():
        top += 1
    return torch.from_numpy(np.array(image)[top])


def flat(level, size=(4, 4)):
    return Image.new("RGB", size, (level, level, level))


def test_a_branch_on_pixels():
    pipe = sampler(of_a_sort)
    program = diffopt.trace(pipe, image=flat(200))
    expect_equal(pipe, program, image=flat(180))
    program.retrace = None
    assert "what Python reads of image is False and was True at capture" in refusal(
        program, image=flat(20)
    )


@pytest.mark.parametrize("function", [region, first_row])
def test_a_place_that_pixels_tell(function):
    pipe = sampler(function)
    source = random.Random(2)
    given = [picture(source, (6, 6)) for _ in range(3)]
    given[2].paste((0, 0, 0), (0, 0, 6, 2))
    program = diffopt.trace(pipe, image=given[0])
    program.retrace = None
    expect_equal(pipe, program, image=given[1])
    refusal(program, image=given[2])


# Every call has the pipeline's result, or is refused, whatever Python does to pixels


def cut(array):
    np.clip(array, 0, 1, out=array)


def cut_rows(array):
    for row in array:
        row[row > 1] = 1


def cut_a_view(array):
    array.reshape(-1)[array.reshape(-1) > 1] = 1


def cut_by_a_function(array):
    np.copyto(array, 0, where=array > 1)


def cut_shared(array):
    torch.from_numpy(array).clamp_(0, 1)


@pytest.mark.parametrize("write", [cut, cut_rows, cut_a_view, cut_by_a_function, cut_shared])
def test_writes_that_change_nothing_at_capture(write):
    def function(parts, array):
        array = np.array(array)
        write(array)
        return torch.from_numpy(array) * 1

    assert holds(function, *({"array": np.full((3, 4), v, np.float32)} for v in (0.25, 0.5, 2.0)))


QUESTIONS = {
    "of two answers": lambda a: bool(a[0, 0, 0] > 100) != bool(a[0, 0, 1] > 100),
    "the largest": lambda a: max(a[0, 0]) > 200,
    "kinds": lambda a: len(np.unique(a)) < 3,
    "places": lambda a: len(np.argwhere(a > 0)) == 0,
    "selected": lambda a: a[a > 0].size == 0,
    "bytes": lambda a: a.tobytes() == bytes(a.size),
    "one by one": lambda a: any(v > 200 for v in a.flat),
    "order": lambda a: a.ravel().argsort()[0] == 0,
    "text": lambda a: f"{a.max()}" == "0",
    "a table": lambda a: {0: True}.get(a.max(), False),
    "of a canvas": lambda a: canvas(a).max() == 0,
    "as long": lambda a: len(np.zeros(int(a.max()))) == 0,
}


def canvas(array):
    made = np.zeros((*array.shape[:2], 3))
    made[:] = array
    return made


def test_questions_about_pixels():
    for name, question in QUESTIONS.items():

        def function(parts, image, question=question):
            values = torch.from_numpy(np.array(image))
            return values * 2 if question(np.array(image)) else values

        source = random.Random(1)
        assert holds(function, *({"image": i} for i in (picture(source), flat(0), flat(255)))), name


PICTURE_QUESTIONS = {
    "a pixel": lambda i: i.load()[0, 0] == (255, 255, 255),
    "all pixels": lambda i: max(max(p) for p in i.getdata()) < 10,
    "bytes": lambda i: not any(i.tobytes()),
    "a difference": lambda i: ImageChops.difference(i, flat(255, i.size)).getbbox() is None,
    "colors": lambda i: len(i.quantize(4).getcolors()) < 2,
    "information": lambda i: "dpi" in i.info,
    "equality": lambda i: i == flat(0, i.size),
}


def test_questions_about_pictures():
    for name, question in PICTURE_QUESTIONS.items():

        def function(parts, image, question=question):
            values = torch.from_numpy(np.array(image))
            return values * 2 if question(image) else values

        marked = flat(255)
        marked.info["dpi"] = (72, 72)
        source = random.Random(1)
        given = ({"image": i} for i in (picture(source), flat(0), flat(255), marked))
        assert holds(function, *given), name


def test_a_picture_that_is_to_be_turned():
    turned = picture(random.Random(1))
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.info["exif"] = exif.tobytes()

    def function(parts, image):
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))

    upright = picture(random.Random(2))
    assert holds(function, {"image": upright}, {"image": turned})
    assert holds(function, {"image": turned}, {"image": upright})


def holds(function, first, *others):
    """Tell whether all calls give the pipeline's result or are refused; the first is traced."""
    pipe = sampler(function)
    try:
        program = diffopt.trace(pipe, check=False, **separated(first))
    except CaptureError:
        return True
    program.retrace = None
    for arguments in (first, *others):
        try:
            got = program(**separated(arguments))
        except DiffoptError:
            continue
        if [*differences(pipe(**separated(arguments)), got)]:
            return False
    return True


# What is not recorded is refused


def aliased(image):
    array = np.array(image)
    array[..., 0][:] = 7  # a view is written
    return array


def by_unknown_functions(image):
    return np.fft.fft(np.array(image, dtype=np.float32)).real.astype(np.float32)


def by_bytes(image):
    return np.frombuffer(image.tobytes(), np.uint8).copy()


def by_a_lookup(image):
    return np.array(ImageOps.autocontrast(image))


@pytest.mark.parametrize("function", [aliased, by_unknown_functions, by_bytes, by_a_lookup])
@pytest.mark.parametrize("entry", ["from_numpy", "tensor"])
def test_refused(function, entry):
    pipe = sampler(lambda parts, image: getattr(torch, entry)(function(image)) * 1)
    with pytest.raises(CaptureError, match=r"by functions (which|that) are not recorded"):
        diffopt.trace(pipe, image=picture(random.Random(1)), check=False)


def test_a_function_of_torch_that_is_not_watched():
    from_numpy = torch.from_numpy  # as `from torch import from_numpy` binds it
    pipe = sampler(lambda parts, image, x: from_numpy(np.array(image)).sum() * x)
    with pytest.raises(CaptureError, match="depends in Python on the text, picture or seed"):
        diffopt.trace(pipe, image=picture(random.Random(1)), x=torch.ones(2), check=False)


@pytest.mark.parametrize(
    "row",
    [
        ["numpy.load", ["a.npy"], {}],
        ["numpy.fromfile", ["a"], {}],
        ["image.save", [{"row": 0}, "a.png"], {}],
        ["image.__class__", [{"row": 0}], {}],
        ["Image.open", ["a.png"], {}],
        ["array.tofile", [{"row": 0}, "a"], {}],
        ["array.__class__", [{"row": 0}], {}],
        ["ufunc.load", ["a.npy"], {}],
        ["ufunc.add.at", [{"row": 0}, 0, 1], {}],
        ["image.filter", [{"row": 0}, {"filter": ["Kernel", {}]}], {}],
        ["os.system", ["true"], {}],
        ["system", ["true"], {}],
    ],
)
def test_only_known_operations_are_run(row):
    rows = [["argument", [["image"], "image"], {}], row]
    with pytest.raises(DiffoptError, match="known"):
        evaluate(rows, {"image": picture(random.Random(1))})


# What is made of results


def as_pictures(array):
    return [Image.fromarray((row * 255).round().astype("uint8")) for row in array]


RESULTS = {
    "bytes": lambda array: (array * 255).astype(np.uint8),
    "halves": lambda array: (array[..., :2], array[..., 2:].sum(-1)),
    "pictures": lambda array: [i.resize((3, 3)).convert("L") for i in as_pictures(array)],
    "depth": lambda array: Image.fromarray((array[0, ..., 0] * 65535).astype(np.uint16)),
    "stacked": lambda array: np.stack([row.max(axis=-1) for row in array]),
    "constant": lambda array: {"axis": np.linspace(0, 1, 5), "image": array},
    "clipped": lambda array: array.clip(-10, 10),
    "the largest": lambda array: [array.min(), array.max()],
    "one by one": lambda array: [array[1], array[0][2]],
    "turned": lambda array: array[::-1],
    "grid": lambda array: np.concatenate(list(array), axis=1).clip(0.2, 0.8),
}


@pytest.mark.parametrize("name", RESULTS)
def test_what_numpy_makes_of_results(name, tmp_path):
    pipe = sampler(lambda parts, x: RESULTS[name](parts.net(x).numpy()), net=torch.nn.Sigmoid())
    program = diffopt.trace(pipe, x=torch.rand(2, 4, 5, 3))
    program.save(tmp_path / "a.program")
    x = torch.rand(2, 4, 5, 3)
    for loaded in (program, Program.load(tmp_path / "a.program")):
        assert not [*differences(pipe(x=x), loaded(x=x))]


def test_a_result_in_bfloat16_beside_one_of_numpy():
    def function(parts, x):
        y = parts.net(x)
        return (y * 2).numpy().clip(0, 1), y.bfloat16()

    pipe = sampler(function, net=torch.nn.Sigmoid())
    program = diffopt.trace(pipe, x=torch.rand(3))
    x = torch.rand(3)
    assert not [*differences(pipe(x=x), program(x=x))]


def test_numpy_on_results_that_python_reads_or_torch_takes_back():
    def branch(parts, x):
        array = parts.net(x).numpy()
        return array / array.max() if array.max() > 1 else array

    for function in (branch, lambda parts, x: torch.from_numpy(parts.net(x).numpy() + 1) * x):
        with pytest.raises(CaptureError, match=r"numpy computes (on|of) a traced value"):
            diffopt.trace(sampler(function, net=torch.nn.Sigmoid()), x=torch.rand(3), check=False)


def test_an_argument_that_is_returned():
    pipe = sampler(lambda parts, x, image: (x * 2, np.array(image)))
    with pytest.raises(CaptureError, match="by functions that are not recorded"):
        diffopt.trace(pipe, x=torch.rand(3), image=flat(3), check=False)
