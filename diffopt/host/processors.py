"""Saves tokenizers and image processors as files, and loads them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffopt import optional


def load_component(name: str, files: Mapping[str, bytes]) -> Any:
    """Load a tokenizer or image processor from its files."""
    transformers = optional.require("transformers", f"the tokenizer {name!r}", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            path = Path(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        is_both = {"tokenizer_config.json", "preprocessor_config.json"} <= files.keys()
        if is_both or "processor_config.json" in files:
            return transformers.AutoProcessor.from_pretrained(folder)
        if "tokenizer_config.json" in files:
            return transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.AutoImageProcessor.from_pretrained(folder)


def save_component(component: Any) -> dict[str, bytes]:
    """Return the files from which `load_component` loads it; none if it cannot be saved."""
    if not hasattr(component, "save_pretrained"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
