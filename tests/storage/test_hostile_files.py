"""Files that somebody has written to do harm, or by mistake: one line each, and nothing else.

A grammar changes the JSON, the headers and the names of files with correct checksums. What opens,
verifies, inspects and runs them may read the file, and may do nothing else: Python's audit hooks
tell of every file, process, socket and of every piece of code that is compiled or imported.

    COUNT=20000 pytest tests/storage/test_hostile_files.py
"""

import copy
import io
import json
import os
import random
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

import diffopt.ir.qdq  # noqa: F401  # registers operators, which a file may name
from diffopt import trace
from diffopt.cli import inspect as inspect_command
from diffopt.engine import engine, engine_file
from diffopt.errors import DiffoptError, VerifyError
from diffopt.ir.program import Program
from diffopt.storage import container, program_file
from tests import sampler
from tests.zoo.text import clip_tokenizer

COUNT = int(os.environ.get("COUNT", "5000"))
SEED = int(os.environ.get("SEED", "0"))

CODE = "__import__('os').system('touch /tmp/diffopt-was-here')"
NAMES = (
    *(
        "os.system",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.call",
        "builtins.eval",
    ),
    *("aten.from_file.default", "aten.set_.source_Tensor", "aten.copy_.default", "os:system"),
    *("aten._print.default", "aten.fbgemm_linear_fp16_weight.default", "prims.device_put.default"),
    *(
        "subprocess:Popen",
        "diffusers.utils.import_utils:os",
        "transformers:AutoModel",
        "inductor.x",
    ),
    *("save_pretrained", "push_to_hub", "from_pretrained", "__class__", "__reduce__", "import"),
    *("../../x", "/etc/passwd", "a/../../b", "x\x1b[31m\x07", "a b", "a:=1", "lambda", "1x", ""),
    *(CODE, f"x={CODE}", f"x\n    {CODE}\n#", "load", "hub", "cuda:0", "float32", "eager", "cpu"),
    *("\ud800", "\u202egnp", "a" * 70_000, "(guards)", "(computed 0)", "unet", "output"),
)
NUMBERS = (-1, 0, 1, 7, 1 << 31, 1 << 62, (1 << 63) - 1, 1 << 64, 1 << 200, -(1 << 63), 0.5)
ATOMS: tuple[Any, ...] = (
    *NAMES,
    *NUMBERS,
    *(None, True, False, [], {}, [[]], float("nan"), float("inf"), [1 << 40, 1 << 40]),
    *({"node": -1}, {"node": 1 << 40}, {"node": "0"}, {"dtype": "load"}, {"device": "file:x"}),
    *({"float": "x"}, {"tuple": 3}, {"slice": [0]}, {"complex": ["1"]}, {"layout": "compile"}),
    *({"text": [CODE]}, {"expression": [["image.save", [{"row": 0}, "x.png"], {}]]}),
    *({"expression": [["np.fromfile", ["/etc/passwd"], {}]]}, {"computed": 99}, {"a": 1, "b": 2}),
    *({"class": ["os:system", {"command": {"value": "true"}}]}, {"many": [1]}, {"int": "x"}),
    *({"class": ["subprocess:Popen", {"args": {"value": "true"}}]}, {"tensor": -1}),
)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def places(data: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value within JSON."""
    todo: list[tuple[tuple[Any, ...], Any]] = [((), data)]
    while todo:
        at, value = todo.pop()
        if at:
            yield at
        if isinstance(value, (dict, list)):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [((*at, key), part) for key, part in parts]


def changed(data: Any, numbers: random.Random) -> Any:
    """Return JSON with one to three changes."""
    data = copy.deepcopy(data)
    for _ in range(numbers.choice((1, 1, 1, 2, 3))):
        known = list(places(data))
        if not known:
            return data
        *outer, key = numbers.choice(known)
        owner = data
        for part in outer:
            owner = owner[part]
        kind = numbers.randrange(7)
        if kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[numbers.choice(NAMES)] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(numbers.randrange(len(owner) + 1), copy.deepcopy(numbers.choice(owner)))
        elif kind == 3:
            *source, last = numbers.choice(known)
            value = data
            for part in (*source, last):
                value = value[part] if isinstance(value, (dict, list)) else value
            owner[key] = copy.deepcopy(value)
        elif kind == 4 and numbers.random() < 0.1:
            owner[key] = deep(numbers.choice((50, 150, 300)))
        else:
            owner[key] = copy.deepcopy(numbers.choice(ATOMS))
    return data


def header_changed(content: bytes, numbers: random.Random) -> bytes:
    """Return a safetensors member with another header."""
    length = int.from_bytes(content[:8], "little")
    header = changed(json.loads(content[8 : 8 + length]), numbers)
    text = dumped(header)
    size = numbers.choice((len(text), len(text), len(text), 0, 1 << 62, len(text) - 1))
    return size.to_bytes(8, "little") + text + content[8 + length :]


def dumped(data: Any) -> bytes:
    try:
        return json.dumps(data).encode()
    except RecursionError:
        return b"[" * 100_000


class Hostile:
    """Files made of one intact file."""

    def __init__(self, path: Path, kind: str) -> None:
        opened = container.Archive(path, kind, "a file", "")
        table = opened.manifest["members"]
        self.kind = kind
        self.members = {name: bytes(opened.read(name)) for name in table}
        self.manifest = {k: v for k, v in opened.manifest.items() if k != "members"}

    def write(self, path: Path, numbers: random.Random) -> None:
        """Write a file with correct checksums, and something else than this library writes."""
        members, manifest = dict(self.members), self.manifest
        kind = numbers.randrange(10)
        if kind < 6:
            members["program.json"] = dumped(changed(json.loads(members["program.json"]), numbers))
        elif kind == 6 and manifest:
            manifest = changed(manifest, numbers)
        elif kind == 7:
            weights = members["weights.safetensors"]
            members["weights.safetensors"] = header_changed(weights, numbers)
        elif kind == 8:
            old = numbers.choice(sorted(members))
            members[old if numbers.random() < 0.3 else f"assets/{numbers.choice(NAMES)}"] = (
                members.pop(old) if numbers.random() < 0.5 else b"{}"
            )
        jsons = [name for name in members if name.endswith(".json") and name != "program.json"]
        if kind == 9 and jsons:
            name = numbers.choice(jsons)
            members[name] = dumped(changed(json.loads(members[name]), numbers))
        self._pack(path, manifest, members, numbers)

    def _pack(
        self, path: Path, manifest: Any, members: dict[str, bytes], numbers: random.Random
    ) -> None:
        table = {
            name: {"size": len(content), "sha256": container._digest([content])}
            for name, content in members.items()
        }
        text = {**manifest, "members": table} if isinstance(manifest, dict) else manifest
        if numbers.random() < 0.05:
            text = {**text, "members": changed(table, numbers)}
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(container.KIND, self.kind)
            for name, content in members.items():
                archive.writestr(name.encode("utf-8", "replace").decode()[:1000], content)
            archive.writestr(container.MANIFEST, dumped(text))
        path.write_bytes(buffer.getvalue())


class Watch:
    """Notes what the process does beside computing, while it is on.

    Tokenizers are loaded of a folder of their own, into which their files are unpacked, and
    libraries import parts of themselves when they are first used.
    """

    HARM = ("subprocess", "socket", "os.", "shutil", "ctypes", "pickle", "open")
    LIBRARIES = frozenset(("transformers", "diffusers", "tokenizers", "google", "torch", "PIL"))

    def __init__(self) -> None:
        self.on = False
        self.file = ""
        temporary = f"{tempfile.gettempdir()}/tmp"
        self.own = (f"{sys.prefix}/", f"{sys.base_prefix}/", temporary)
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.on and not self._is_harmless(event, args):
            self.seen.append(f"{event} {str(args)[:200]}")

    def _is_harmless(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "import":
            return args[0].partition(".")[0] in self.LIBRARIES | sys.stdlib_module_names
        if event in ("compile", "exec"):
            name = args[1] if event == "compile" else args[0].co_filename
            return str(name).startswith((*self.own, "<frozen"))
        if not event.startswith(self.HARM) or event in ("os.listdir", "os.scandir"):
            return True
        if event == "os.remove" and args[1] >= 0:  # `rmtree` of such a folder, by its number
            return True
        path = str(args[0]) if args else ""
        if event == "open" and path == self.file:
            return args[1] is None or "r" in args[1]
        return (path.startswith(self.own) and "w" not in str(args[1:2])) or path.startswith(
            self.own[2:]
        )


class Pictured:
    """Make a small picture of a text, a picture and noise."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.tokenizer = clip_tokenizer()
        self.model = torch.nn.Linear(4, 4).eval().requires_grad_(False)
        self.words = torch.nn.Embedding(len(self.tokenizer), 4).eval().requires_grad_(False)
        self.components = {"model": self.model, "words": self.words, "tokenizer": self.tokenizer}

    def __call__(
        self, prompt: str, image: Image.Image, scale: float = 2.0, generator: Any = None
    ) -> Any:
        if "cat" in prompt:
            scale = 1.0
        ids = self.tokenizer(prompt.strip(), padding="max_length", return_tensors="pt").input_ids
        pixels = np.asarray(image.convert("L").resize((4, 4)), np.float32) / 255
        x = torch.from_numpy(pixels)[None] + torch.randn(1, 4, 4, generator=generator)
        for _ in range(2):
            x = x - scale * self.model(x + self.words(ids).mean(1, keepdim=True))
        return ImagePipelineOutput(images=[x.sigmoid()])


def pictured() -> Program:
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    generator = torch.Generator().manual_seed(0)
    return trace(Pictured(), prompt="a dog", image=picture, generator=generator)


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def bases(folder: Path) -> list[Hostile]:
    """Return files of a small loop and of a pipeline with a tokenizer, as programs and engines."""
    result = []
    for number, program in enumerate((sampler.program(), pictured())):
        path = folder / f"{number}.program"
        program.save(path)
        engine.write(program, "eager", folder / f"{number}.engine")
        result.append(Hostile(path, program_file.KIND))
        result.append(Hostile(folder / f"{number}.engine", engine_file.KIND))
    return result


def arguments(program: Program) -> dict[str, Any]:
    """Return arguments that fit the captured call, as far as the file tells."""
    result: dict[str, Any] = {}
    for name in program.host.inputs():
        ((kind, known),) = program.host.schema.get(name, {"value": None}).items()
        if kind == "picture":
            size = [min(int(n), 64) for n in known[1][:2]]
            result[name] = Image.fromarray(np.zeros(size[::-1], np.uint8))
        elif kind == "tensor" and isinstance(getattr(torch, known[0], None), torch.dtype):
            size = [min(n, 64) for n in known[1]]
            result[name] = torch.zeros(size, dtype=getattr(torch, known[0]))
        elif kind == "value" and isinstance(known, str):
            result[name] = "a dog"
    return {**result, "seed": 1} if program.host.takes_seed() else result


def use(path: Path) -> None:
    """Do with a file what its reader does: verify it, load it, show it, and prepare a call."""
    told = inspect_command.problem(path)
    assert told is None or "\n" not in told
    if path.suffix == ".program":
        program = Program.load(path)
    else:
        program, _ = inspect_command.open_engine(str(path))
    str(program)
    program.fingerprint()
    program.host.bindings()
    program.prepare(**arguments(program))


def expect_harmless(path: Path, watch: Watch) -> str:
    """Use a file and return how it was refused; empty if it was not."""
    watch.seen.clear()
    watch.file, watch.on = str(path), True
    try:
        use(path)
        text = ""
    except (DiffoptError, VerifyError) as error:
        text = str(error)
    finally:
        watch.on = False
    assert watch.seen == []
    assert "\x1b" not in text
    return text


@pytest.mark.filterwarnings("ignore")
def test_intact_files_are_read(bases: list[Hostile], folder: Path, watch: Watch) -> None:
    # The first use imports and compiles what later ones have.
    for number in range(2):
        for path in (folder / f"{number}.program", folder / f"{number}.engine"):
            use(path)


@pytest.mark.filterwarnings("ignore")
def test_random_files(bases: list[Hostile], folder: Path, watch: Watch) -> None:
    numbers = random.Random(SEED)
    for number in range(4):
        use(folder / f"{number // 2}.{'program' if number % 2 else 'engine'}")
    refused = 0
    for number in range(COUNT):
        base = numbers.choice(bases)
        path = folder / f"x.{'program' if base.kind == program_file.KIND else 'engine'}"
        base.write(path, numbers)
        try:
            refused += bool(expect_harmless(path, watch))
        except BaseException as error:
            kept = folder / f"failed-{number}{path.suffix}"
            path.rename(kept)
            raise AssertionError(f"file {number} of seed {SEED}, kept as {kept}") from error
    assert refused > COUNT / 3  # others are changed where nothing depends on it


def first(data: Any, op: str, graph: str = "unet") -> dict[str, Any]:
    """Return the first row of an operation in a graph."""
    rows: list[dict[str, Any]] = data["graphs"][graph]["nodes"]
    return next(row for row in rows if row["op"] == op)


def name_of_placeholder(data: Any) -> None:
    first(data, "placeholder")["target"] = f"x=({CODE})"


def keyword_of_call(data: Any) -> None:
    first(data, "call_function")["kwargs"] = {f"x={CODE}, y": 1}


def name_of_constant(data: Any) -> None:
    first(data, "get_attr")["target"] = "__class__"


def function_of_python(data: Any) -> None:
    first(data, "call_function")["target"] = "operator.methodcaller"


def method(data: Any) -> None:
    first(data, "call_function").update(op="call_method", target="share_memory_")


def file_on_disk(data: Any) -> None:
    row = first(data, "call_function")
    row.update(target="aten.from_file.default", args=["/etc/passwd", False, 8])


def write_in_place(data: Any) -> None:
    first(data, "call_function")["target"] = "aten.add_.Tensor"


def pointer_in_a_tensor(data: Any) -> None:
    first(data, "call_function")["target"] = "aten.fbgemm_linear_fp16_weight.default"


def kernel_of_a_library(data: Any) -> None:
    first(data, "call_function")["target"] = "mkldnn._linear_pointwise.default"


def method_of_a_tokenizer(data: Any) -> None:
    data["host"]["steps"][0]["method"] = "save_pretrained"


def later_node(data: Any) -> None:
    first(data, "call_function")["args"] = [{"node": 999}]


def another_component(data: Any) -> None:
    first(data, "call_module", "")["target"] = "vae_of_another"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (name_of_placeholder, "is no name in a graph"),
        (keyword_of_call, "is no name in a graph"),
        (name_of_constant, "reads '__class__', which the file lacks"),
        (function_of_python, "'operator.methodcaller' is no operator that a file may call"),
        (method, "op: Input should be 'placeholder', 'get_attr', 'call_function'"),
        (file_on_disk, "no file may call the operator 'aten.from_file.default'; if you trust it"),
        (write_in_place, "no file may call the operator 'aten.add_.Tensor'"),
        (pointer_in_a_tensor, "'aten.fbgemm_linear_fp16_weight.default'; if you trust it, import"),
        (kernel_of_a_library, "no file may call the operator 'mkldnn._linear_pointwise.default'"),
        (later_node, "IndexError: list index out of range"),
        (another_component, "calls 'vae_of_another', which is no component"),
    ],
)
def test_what_a_graph_may_not_have_is_named(
    bases: list[Hostile], folder: Path, watch: Watch, change: Any, message: str
) -> None:
    assert message in refusal_of(bases[0], change, folder, watch)


def refusal_of(base: Hostile, change: Any, folder: Path, watch: Watch) -> str:
    members = dict(base.members)
    data = json.loads(members["program.json"])
    change(data)
    members["program.json"] = json.dumps(data).encode()
    path = folder / "y.program"
    container.write(path, base.kind, {}, {name: [c] for name, c in members.items()})
    return expect_harmless(path, watch)


def test_a_method_that_makes_no_inputs(bases: list[Hostile], folder: Path, watch: Watch) -> None:
    text = refusal_of(bases[2], method_of_a_tokenizer, folder, watch)
    assert text == "'save_pretrained' is no method that a file may call of 'tokenizer'"


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "c:x", "a\\..\\x", "a\x1b[2J"])
def test_a_file_outside_of_its_folder(
    bases: list[Hostile], folder: Path, watch: Watch, name: str
) -> None:
    members = {**bases[0].members, f"assets/tokenizer/{name}": b"x"}
    path = folder / "z.program"
    container.write(path, bases[0].kind, {}, {n: [c] for n, c in members.items()})
    assert "is damaged" in expect_harmless(path, watch)


def test_a_result_of_another_class_is_plain(bases: list[Hostile], folder: Path) -> None:
    members = dict(bases[0].members)
    data = json.loads(members["program.json"])
    data["host"]["output"] = {"class": ["subprocess:Popen", {"args": {"value": ["true"]}}]}
    members["program.json"] = json.dumps(data).encode()
    path = folder / "w.program"
    container.write(path, bases[0].kind, {}, {n: [c] for n, c in members.items()})
    assert Program.load(path)(seed=0) == {"args": ["true"]}


@pytest.mark.parametrize("size", [-1, "5", 12 << 30, 1.5, None])
def test_sizes_that_nobody_allocates(size: Any, folder: Path) -> None:
    path = folder / "size.program"
    container.write(path, program_file.KIND, {}, {"program.json": [b"a" * 400_000]}, 3)
    old, new = b'"size": 400000', f'"size": {json.dumps(size)}'.encode()
    with zipfile.ZipFile(path) as archive:
        manifest = archive.read("manifest.json").replace(old, new)
        frame = archive.read("program.json.zst")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mimetype", program_file.KIND)
        archive.writestr("program.json.zst", frame)
        archive.writestr("manifest.json", manifest)
    with pytest.raises(DiffoptError, match=r"member (manifest|program)\.json is") as caught:
        Program.load(path)
    assert "\n" not in str(caught.value)
