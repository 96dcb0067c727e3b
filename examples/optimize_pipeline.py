"""Optimize a diffusers pipeline from Python, and look at what each pass did.

python examples/optimize_pipeline.py examples/models/fashion-dit dit.engine
"""

import sys

import torch
from diffusers import DiffusionPipeline

import diffopt
from diffopt.core import Record


def main(model: str, path: str, steps: int = 10, target: str = "cpu") -> None:
    """Trace a class-conditional pipeline, run the exact passes, build an engine, draw an image."""
    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    program = diffopt.trace(pipe, class_labels=[9], num_inference_steps=steps, generator=seed)
    program = diffopt.Pipeline.parse("unroll,hoist,simplify,fuse").run(program)
    for record in map(Record.from_json, program.history):
        print(
            f"{record.text:9} FLOPs {record.before.flops:,} → {record.after.flops:,},"
            f" parameters {record.before.parameters:,} → {record.after.parameters:,},"
            f" max abs difference {record.max_abs:.1e}"
        )
    engine = diffopt.build(program, target, path)
    image = engine(class_labels=[9], seed=0).images[0]
    print(f"{path}: an image of {image.size}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
