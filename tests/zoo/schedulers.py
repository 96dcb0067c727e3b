"""Every scheduler that diffusers exports, and a pipeline that runs with it."""

import importlib.util
from typing import Any

import diffusers

from tests.zoo import audio, cascade, plain, transformer, unet, video
from tests.zoo.case import Case

STABLE = unet.STABLE
MULTI = "DPMSolverMultistepScheduler"
EULER = "EulerDiscreteScheduler"
FLOW = "FlowMatchEulerDiscreteScheduler"
UNIPC = "UniPCMultistepScheduler"
STEPS = 5  # the first number with which a third order solver takes a step of third order

# Row, scheduler, its configuration (none: the pipeline is already built with it), case.
SCHEDULERS: list[tuple[str, str, dict[str, Any] | None, str]] = [
    ("ddim", "DDIMScheduler", {**STABLE, "clip_sample": False}, "sd"),
    ("ddim-eta", "DDIMScheduler", None, "ddim"),
    (
        "ddim-trailing",
        "DDIMScheduler",
        {
            **STABLE,
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
        },
        "sd",
    ),
    ("ddim-parallel", "DDIMParallelScheduler", {**STABLE, "clip_sample": False}, "sd"),
    ("ddim-inverse", "DDIMInverseScheduler", {**STABLE, "clip_sample": False}, "sd"),
    ("ddpm", "DDPMScheduler", {**STABLE, "clip_sample": False}, "sd"),
    ("ddpm-learned-variance", "DDPMScheduler", None, "kandinsky-decoder"),
    ("ddpm-parallel", "DDPMParallelScheduler", {**STABLE, "clip_sample": False}, "sd"),
    ("ddpm-wuerstchen", "DDPMWuerstchenScheduler", None, "stable-cascade-prior"),
    ("pndm", "PNDMScheduler", {**STABLE, "skip_prk_steps": True}, "sd"),
    ("pndm-prk", "PNDMScheduler", STABLE, "sd"),
    ("euler", EULER, STABLE, "sd"),
    ("euler-karras", EULER, {**STABLE, "use_karras_sigmas": True}, "sd"),
    ("euler-exponential", EULER, {**STABLE, "use_exponential_sigmas": True}, "sd"),
    ("euler-beta", EULER, {**STABLE, "use_beta_sigmas": True}, "sd"),
    ("euler-ancestral", "EulerAncestralDiscreteScheduler", STABLE, "sd"),
    ("heun", "HeunDiscreteScheduler", STABLE, "sd"),
    ("kdpm2", "KDPM2DiscreteScheduler", STABLE, "sd"),
    ("kdpm2-ancestral", "KDPM2AncestralDiscreteScheduler", STABLE, "sd"),
    ("lms", "LMSDiscreteScheduler", STABLE, "sd"),
    ("dpm++-2m", MULTI, STABLE, "sd"),
    ("dpm++-2m-karras", MULTI, {**STABLE, "use_karras_sigmas": True}, "sd"),
    ("dpm++-2m-heun", MULTI, {**STABLE, "solver_type": "heun"}, "sd"),
    ("dpm++-2m-sde", MULTI, {**STABLE, "algorithm_type": "sde-dpmsolver++"}, "sd"),
    ("dpm++-3m", MULTI, {**STABLE, "solver_order": 3, "lower_order_final": False}, "sd"),
    (
        "dpm-2m",
        MULTI,
        {**STABLE, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "sd",
    ),
    (
        "dpm-2m-sde",
        MULTI,
        {**STABLE, "algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
        "sd",
    ),
    (
        "dpm++-flow",
        MULTI,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
        "sana",
    ),
    ("dpm-inverse", "DPMSolverMultistepInverseScheduler", STABLE, "sd"),
    ("dpm++-2s", "DPMSolverSinglestepScheduler", STABLE, "sd"),
    (
        "dpm++-2s-sde",
        "DPMSolverSinglestepScheduler",
        {**STABLE, "algorithm_type": "sde-dpmsolver++"},
        "sd",
    ),
    ("dpm++-3s", "DPMSolverSinglestepScheduler", {**STABLE, "solver_order": 3}, "sd"),
    ("dpm-sde", "DPMSolverSDEScheduler", STABLE, "sd"),
    ("unipc", UNIPC, STABLE, "sd"),
    ("unipc-3", UNIPC, {**STABLE, "solver_order": 3}, "sd"),
    ("unipc-bh1", UNIPC, {**STABLE, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, "sd"),
    ("unipc-flow", UNIPC, None, "wan"),
    ("deis", "DEISMultistepScheduler", STABLE, "sd"),
    ("sa-solver", "SASolverScheduler", STABLE, "sd"),
    ("ipndm", "IPNDMScheduler", {}, "sd"),
    ("tcd", "TCDScheduler", STABLE, "sd"),
    ("lcm", "LCMScheduler", None, "lcm"),
    ("edm-euler", "EDMEulerScheduler", {"sigma_max": 5.0}, "sd"),
    ("edm-dpm", "EDMDPMSolverMultistepScheduler", {"sigma_max": 5.0}, "sd"),
    ("edm-dpm-v", "EDMDPMSolverMultistepScheduler", None, "stable-audio"),
    (
        "cosine-dpm",
        "CosineDPMSolverMultistepScheduler",
        {"sigma_data": 1.0, "prediction_type": "v_prediction"},
        "stable-audio",
    ),
    ("unclip", "UnCLIPScheduler", None, "kandinsky"),
    ("consistency", "CMStochasticIterativeScheduler", None, "consistency"),
    ("scm", "SCMScheduler", None, "sana-sprint"),
    ("cogvideox-ddim", "CogVideoXDDIMScheduler", None, "cogvideox"),
    ("cogvideox-dpm", "CogVideoXDPMScheduler", {}, "cogvideox"),
    ("flow-euler", FLOW, {"shift": 3.0}, "sd3"),
    ("flow-euler-dynamic", FLOW, None, "flux"),
    ("flow-euler-stochastic", FLOW, {"shift": 3.0, "stochastic_sampling": True}, "sd3"),
    ("flow-euler-karras", FLOW, {"use_karras_sigmas": True}, "sd3"),
    ("flow-euler-beta", FLOW, {"use_beta_sigmas": True}, "sd3"),
    ("flow-heun", "FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, "sd3"),
    ("flow-lcm", "FlowMatchLCMScheduler", {"shift": 3.0}, "sd3"),
    ("flow-map-euler", "FlowMapEulerDiscreteScheduler", {"shift": 3.0}, "sd3"),
    ("minimax-h3", "MiniMaxH3Scheduler", {"shift": 3.0}, "sd3"),
    ("ltx-ancestral", "LTXEulerAncestralRFScheduler", {}, "sd3"),
    ("helios", "HeliosScheduler", {"stages": 1, "stage_range": [0, 1]}, "sd3"),
    ("repaint", "RePaintScheduler", None, "repaint"),
    ("score-sde-ve", "ScoreSdeVeScheduler", None, "score-sde-ve"),
    ("karras-ve", "KarrasVeScheduler", None, "karras-ve"),
]

TOKENS = "chooses discrete tokens of a language model, with a data-dependent loop"
LEFT_OUT: dict[str, str] = {
    "AmusedScheduler": "unmasks discrete image tokens; only in deprecated pipelines",
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "HeliosDMDScheduler": "its step takes tensors that only the Helios pipelines pass",
    "PiflowScheduler": "needs the widened output of a distilled Kandinsky 6",
    "RFD4ProteinaScheduler": "makes protein structures, two modalities at once",
    "VQDiffusionScheduler": "denoises discrete image tokens; only in a deprecated pipeline",
}

ROWS = {row[0]: row for row in SCHEDULERS}
FAMILIES = [unet, transformer, video, audio, cascade, plain]
CASES = {case.name: case for family in FAMILIES for case in family.CASES}


def all_schedulers() -> list[str]:
    """Return the names of all schedulers that diffusers exports."""
    return sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))


def missing_package(scheduler: str) -> str | None:
    """Return the package without which a scheduler cannot be made, if it is not installed."""
    needs = {"DPMSolverSDEScheduler": "torchsde", "CosineDPMSolverMultistepScheduler": "torchsde"}
    package = needs.get(scheduler)
    return package if package and importlib.util.find_spec(package) is None else None


def scheduler_case(name: str) -> Case:
    """Return the case of one row, its pipeline with the row's scheduler."""
    _, scheduler, config, base = ROWS[name]
    if config is None:
        return CASES[base]

    def inputs(seed: int) -> dict[str, Any]:
        return {**CASES[base].inputs(seed), "num_inference_steps": STEPS}

    def build() -> Any:
        pipe = CASES[base].build()
        pipe.register_modules(scheduler=getattr(diffusers, scheduler)(**config))
        return pipe

    return Case(f"{base}+{name}", build, inputs)
