"""Programs as files and as values: what is written comes back, what is broken is found."""

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import diffopt
from diffopt.cli import inspect as inspect_command
from diffopt.core import allow_operators
from diffopt.engine import engine
from diffopt.errors import DiffoptError, VerifyError
from diffopt.ir import allowed_operators, serialize
from diffopt.ir import graph as g
from diffopt.ir.program import Program
from diffopt.storage import container, program_file
from tests import sampler
from tests.passes import build
from tests.zoo import CASES, call

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    return sampler.program()


@pytest.fixture
def file(program, tmp_path) -> Path:
    path = tmp_path / "a.program"
    program.save(path)
    return path


def operators(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function"]


# Files


@pytest.mark.parametrize("stride", [0, 1, 7])
def test_a_single_number_of_any_stride_is_written(stride):
    number = torch.arange(8).as_strided((1,), (stride,), 5)
    assert number.is_contiguous()
    assert bytes(container.raw_bytes(number)) == (5).to_bytes(8, "little")


def test_a_saved_program_gives_the_same_bits(program, file):
    loaded = Program.load(file)
    loaded.verify()
    assert str(loaded) == str(program)
    for name in ("source", "history", "digests"):
        assert getattr(loaded, name) == getattr(program, name) == getattr(program.clone(), name)
    assert loaded.digests.keys() == {"unet", "unet (settings)", "vae", "vae (settings)"}
    assert torch.equal(loaded(seed=4)["images"], program(seed=4)["images"])


RUN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "tests"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from diffopt.ir.program import Program
program = Program.load(sys.argv[1])
program.verify()
result = program(prompt="two blue dogs", seed=3, output_type="pt")
torch.save(result.images, sys.argv[2])
"""


@pytest.mark.filterwarnings("ignore")
def test_a_file_runs_without_the_pipelines_library(tmp_path):
    pipe = CASES["sd"].build()
    program = diffopt_trace(pipe)
    program.save(tmp_path / "sd.program")
    arguments = [sys.executable, "-c", RUN, tmp_path / "sd.program", tmp_path / "out.pt"]
    subprocess.run(arguments, check=True, cwd=Path(__file__).parents[2])
    arguments = CASES["sd"].inputs(3) | {"prompt": "two blue dogs"}
    expected = call(pipe, arguments)[0]
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def diffopt_trace(pipe) -> Program:
    import diffopt

    return diffopt.trace(pipe, **CASES["sd"].inputs(0))


def test_no_pickle_is_written(file):
    with zipfile.ZipFile(file) as whole:
        suffixes = {Path(n).suffix for n in whole.namelist() if n != "mimetype"}
        assert suffixes == {".json", ".safetensors"}
        for name in whole.namelist():
            assert not whole.read(name).startswith(b"\x80")
        json.loads(whole.read("program.json"))


def test_a_program_is_a_kind_of_file_and_readable_as_any_new_one(file):
    with zipfile.ZipFile(file) as whole:
        assert whole.namelist() == [
            *("mimetype", "program.json", "weights.safetensors", "manifest.json")
        ]
        assert whole.read("mimetype") == b"application/x-diffopt-program"
        manifest = json.loads(whole.read("manifest.json"))
        for name, row in manifest["members"].items():
            assert row["sha256"] == hashlib.sha256(whole.read(name)).hexdigest()
    new = file.with_name("new")
    new.touch()
    assert file.stat().st_mode == new.stat().st_mode


def test_weights_are_mapped_aligned_and_private_to_the_program(program, file):
    before = file.read_bytes()
    loaded = Program.load(file)
    weight = loaded.components["unet"].first_weight
    assert weight.data_ptr() % container.ALIGNMENT == 0
    weight.add_(1.0)
    assert not torch.equal(loaded(seed=4)["images"], program(seed=4)["images"])
    assert file.read_bytes() == before
    loaded.save(file)  # over the file that it is mapped from
    assert torch.equal(Program.load(file)(seed=4)["images"], loaded(seed=4)["images"])


def test_constants_of_every_kind_come_back(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    constants = [
        torch.tensor(2.5),
        torch.zeros(0, 4),
        torch.arange(4.0).expand(3, 4),
        base.t().contiguous().t(),
        base[1:],
        base[:, 1],
        base[::2, ::2],
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
        torch.tensor([True, False, True]),
        torch.tensor([1, 65535], dtype=torch.uint16),
    ]

    def make(b, x):
        return [x, *(b(aten.clone.default, constant) for constant in constants)]

    program = build.program(make, torch.ones(1))
    program.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    loaded.verify()
    for constant, result in zip(constants, loaded.run([torch.ones(1)])[1:], strict=True):
        assert (result.dtype, result.shape) == (constant.dtype, constant.shape)
        assert result.tolist() == constant.tolist()


def test_a_constant_that_no_file_can_hold_is_one_line(tmp_path):
    constant = torch.ones(2, dtype=torch.complex32)
    program = build.program(lambda b, x: b(aten.mul.Tensor, x, constant), torch.ones(2))
    with pytest.raises(DiffoptError) as caught:
        program.save(tmp_path / "a.program")
    assert str(caught.value) == (
        "constant is complex32, which the safetensors format has no name for"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_constants(dtype, tmp_path):
    constant = torch.tensor([[1 + 2j, 3 - 1j]], dtype=dtype).t()
    program = build.program(
        lambda b, x: b(aten.view_as_real.default, b(aten.mul.Tensor, x, constant)), torch.ones(2, 1)
    )
    program.save(tmp_path / "a.program")
    loaded = Program.load(tmp_path / "a.program")
    assert torch.equal(loaded.run([torch.ones(2, 1)])[0], program.run([torch.ones(2, 1)])[0])


def test_a_failed_write_leaves_the_old_file_and_is_one_line(program, file, monkeypatch):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiffoptError) as caught:
        program.save(file)
    assert str(caught.value) == f"{file}: cannot be written: No space left on device"
    assert (list(file.parent.iterdir()), file.read_bytes()) == ([file], before)
    with pytest.raises(DiffoptError) as caught:
        program.save(file / "b.program")
    assert str(caught.value) == f"{file}/b.program: cannot be written: Not a directory"


def refusal(file: Path) -> str:
    with pytest.raises(DiffoptError) as caught:
        Program.load(file)
    assert inspect_command.problem(file) == str(caught.value)  # what `diffopt verify` prints
    return str(caught.value).replace(str(file), "FILE")


@pytest.mark.parametrize("damage", ["empty", "text", "zip", "engine"])
def test_another_file_is_one_line(program, file, damage):
    if damage == "zip":
        with zipfile.ZipFile(file, "w") as other:
            other.writestr("other.txt", "")
    elif damage == "engine":
        engine.build(program, "eager", file)
    else:
        file.write_bytes({"empty": b"", "text": b"not a program"}[damage])
    assert refusal(file) == (
        "FILE: not a program file; write one with `diffopt trace MODEL -o FILE.program`"
    )


@pytest.mark.parametrize("part", [0.05, 0.5, 0.999])
def test_a_truncated_file_is_one_line(file, part):
    content = file.read_bytes()[: int(part * file.stat().st_size)]
    file.write_bytes(content)
    assert refusal(file) == (
        f"FILE: truncated, only {len(content)} bytes of it are here; copy it again, or trace it"
        " again"
    )


@pytest.mark.parametrize("member", ["program.json", "weights.safetensors", "manifest.json"])
def test_a_flipped_bit_names_the_member(file, member):
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as whole:
        content[content.index(whole.read(member)[:-1]) + 60] ^= 4
    file.write_bytes(content)
    assert refusal(file) == f"FILE: member {member} is damaged; copy it again, or trace it again"


def test_any_flipped_bit_is_an_error_or_harmless(file):
    content, expected = file.read_bytes(), Program.load(file)(seed=0)["images"]
    numbers = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[numbers.randrange(len(content))] ^= 1 << numbers.randrange(8)
        file.write_bytes(damaged)
        try:
            loaded = Program.load(file)
        except DiffoptError:
            continue
        assert torch.equal(loaded(seed=0)["images"], expected)


def rewrite(file: Path, change) -> None:
    opened = container.Archive(file, program_file.KIND, "a program", "")
    members = {name: [bytes(opened.read(name))] for name in opened.manifest["members"]}
    data = json.loads(members["program.json"][0])
    change(data)
    members["program.json"] = [json.dumps(data).encode()]
    container.write(file, program_file.KIND, {}, members)


def test_another_format_or_operator_is_one_line(file, tmp_path):
    assert refusal(tmp_path / "none.program") == "FILE: no such file"
    with pytest.raises(DiffoptError) as caught:
        Program.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: is a directory, not a program file"

    def unknown(data):
        nodes = data["graphs"]["unet"]["nodes"]
        next(n for n in nodes if n["op"] == "call_function")["target"] = "aten.nothing.default"

    rewrite(file, unknown)
    with pytest.raises(DiffoptError, match=r"needs the operator 'aten\.nothing\.default', which"):
        Program.load(file)

    def newer(data):
        data["format"] = 99

    rewrite(file, newer)
    assert refusal(file) == "FILE: format 99, this diffopt reads 1; trace the model again"


# Verification


def wrong_type(program: Program) -> None:
    node = operators(program.root)[1]
    node.meta["val"] = g.fake(torch.zeros(3, dtype=torch.int64))


def wrong_weight_type(program: Program) -> None:
    gm = program.components["unet"]
    gm._parameters["first_weight"] = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


def wrong_arity(program: Program) -> None:
    node = program.calls()[0]
    node.args = node.args[:1]


def dangling(program: Program) -> None:
    nodes = list(program.root.graph.nodes)
    target = nodes[-1].args[0][0]
    nodes[1].append(target)


def missing_value(program: Program) -> None:
    del operators(program.root)[0].meta["val"]


def missing_input(program: Program) -> None:
    program.sample.pop()


def unknown_component(program: Program) -> None:
    program.calls()[0].target = "nothing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (wrong_type, "recorded as int64[3], is "),
        (wrong_weight_type, "recorded as float32[16,8], is float32[1]"),
        (wrong_arity, "passes 1 values, takes 2"),
        (dangling, "used before it has been defined"),
        (missing_value, "the value has no recorded type"),
        (missing_input, "program: 1 placeholders for 0 inputs"),
        (unknown_component, "nothing"),
    ],
)
def test_verify_finds(program, damage, message):
    program.verify()
    damage(program)
    with pytest.raises(VerifyError) as caught:
        program.verify()
    assert message in str(caught.value)


def test_a_clone_is_independent(program):
    text, copy = str(program), program.clone()
    body = copy.components["unet"]
    node = operators(body)[-1]
    with body.graph.inserting_after(node):
        new = g.call(body.graph, aten.neg.default, node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    body.recompile()
    assert str(copy) != text
    assert str(program) == text
    assert not torch.equal(copy(seed=0)["images"], program(seed=0)["images"])
    shared = program.weights().keys()
    assert copy.weights().keys() == shared


# Arguments as JSON


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from(
        [
            torch.float32,
            torch.int8,
            torch.bool,
            torch.strided,
            torch.contiguous_format,
            torch.preserve_format,
            torch.device("cpu"),
            torch.device("cuda", 1),
        ]
    ),
    st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9), st.none()),
)
arguments = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@given(arguments)
@settings(max_examples=200, deadline=None)
def test_every_kind_of_argument_round_trips(value):
    graph = fx.Graph()
    node = graph.placeholder("x")
    data = json.loads(json.dumps(serialize.encode((value, node), {node: 0})))
    assert serialize.decode(data, [node]) == (value, node)


def test_nan_and_what_has_no_json():
    assert str(serialize.decode(serialize.encode(float("nan"), {}), [])) == "nan"
    with pytest.raises(TypeError, match="cannot serialize"):
        serialize.encode(object(), {})


# Operators of other libraries


@torch.library.custom_op("tests_of_files::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_of_another_library_is_in_files_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipeline(x: Tensor) -> Tensor:
        return torch.ops.tests_of_files.twice(x) + 1

    program = diffopt.trace(pipeline, x=torch.ones(3))
    file = tmp_path / "x.program"
    refusal = (
        "no file may call the operator 'tests_of_files.twice.default'; if you trust it, import what"
        ' registers it and call diffopt.core.allow_operators("tests_of_files::twice") before saving'
        " and before loading"
    )
    with pytest.raises(DiffoptError) as caught:
        program.save(file)
    assert str(caught.value) == refusal
    assert not file.exists()
    monkeypatch.setattr(allowed_operators, "_allowed", set())
    allow_operators("tests_of_files::twice")
    program.save(file)
    assert torch.equal(Program.load(file)(x=torch.zeros(3)), torch.ones(3))
    allowed_operators._allowed.clear()
    with pytest.raises(DiffoptError) as caught:
        Program.load(file)
    assert str(caught.value) == f"{file}: {refusal}"
    with pytest.raises(DiffoptError, match="'twice' names no operator; write it as torch does"):
        allow_operators("twice")


def test_a_file_that_is_written_to_while_it_is_loaded(file: Path) -> None:
    program = Program.load(file)
    before = program(seed=0)["images"]
    content = file.read_bytes()
    file.unlink()
    assert torch.equal(program(seed=0)["images"], before)
    file.write_bytes(content)
    program = Program.load(file).clone()
    with open(file, "r+b") as opened:
        opened.write(content[:10])
    os.utime(file)
    with pytest.raises(DiffoptError, match="was written to while it is loaded; load it again"):
        program(seed=0)


def test_names_of_modules_that_are_no_identifiers(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ModuleDict({"2-1": torch.nn.Linear(2, 2), "a b": torch.nn.ReLU()})

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["a b"](self.parts["2-1"](x))

    model = Model().eval().requires_grad_(False)
    components = {"the model": model, "class": model}

    def pipeline(x: Tensor) -> Tensor:
        return model(x)

    program = diffopt.trace(pipeline, components=components, x=torch.ones(1, 2))
    program.save(tmp_path / "x.program")
    x = torch.randn(1, 2)
    assert torch.equal(Program.load(tmp_path / "x.program")(x=x), model(x))
