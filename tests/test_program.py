"""Programs as files and as values: what is written comes back, what is broken is found."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from diffopt import graph as g
from diffopt import serialize
from diffopt.errors import DiffoptError, VerifyError
from diffopt.program import Program
from tests import sampler
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


def test_a_saved_program_gives_the_same_bits(program, file):
    loaded = Program.load(file)
    loaded.verify()
    assert str(loaded) == str(program)
    assert (loaded.source, loaded.history) == (program.source, program.history)
    assert torch.equal(loaded(seed=4)["images"], program(seed=4)["images"])


RUN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("diffusers", "tests"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from diffopt.program import Program
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
    subprocess.run(arguments, check=True, cwd=Path(__file__).parents[1])
    arguments = CASES["sd"].inputs(3) | {"prompt": "two blue dogs"}
    expected = call(pipe, arguments)[0]
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def diffopt_trace(pipe) -> Program:
    import diffopt

    return diffopt.trace(pipe, **CASES["sd"].inputs(0))


def test_no_pickle_is_written(file):
    with zipfile.ZipFile(file) as archive:
        assert {Path(n).suffix for n in archive.namelist()} == {".json", ".safetensors"}
        for name in archive.namelist():
            assert not archive.read(name).startswith(b"\x80")
        json.loads(archive.read("program.json"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "zip"])
def test_a_damaged_file_is_one_line(file, damage):
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    elif damage == "empty":
        content = bytearray()
    elif damage == "text":
        content = bytearray(b"not a program")
    file.write_bytes(content)
    if damage == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("other.txt", "")
    with pytest.raises(DiffoptError) as caught:
        Program.load(file)
    assert str(caught.value).startswith(f"{file}: not a whole program file (")
    assert str(caught.value).endswith("; write it again with `diffopt trace`")
    assert "\n" not in str(caught.value)


def rewrite(file: Path, change) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["program.json"])
    change(data)
    members["program.json"] = json.dumps(data).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_another_format_or_operator_is_one_line(file, tmp_path):
    with pytest.raises(DiffoptError) as caught:
        Program.load(tmp_path / "none.program")
    assert str(caught.value) == f"{tmp_path / 'none.program'}: no such file"
    with pytest.raises(DiffoptError, match="is a directory, not a program file"):
        Program.load(tmp_path)

    def unknown(data):
        nodes = data["graphs"]["unet"]["nodes"]
        next(n for n in nodes if n["op"] == "call_function")["target"] = "aten.nothing.default"

    rewrite(file, unknown)
    with pytest.raises(DiffoptError, match=r"needs the operator 'aten\.nothing\.default', which"):
        Program.load(file)

    def newer(data):
        data["format"] = 99

    rewrite(file, newer)
    with pytest.raises(DiffoptError) as caught:
        Program.load(file)
    assert str(caught.value) == (f"{file}: format 99, this diffopt reads 1; trace the model again")


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
