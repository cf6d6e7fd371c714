"""The cost model: catalogue of GPUs and models, step times, KV sizes, transfer times, calibration.

`step_model` is the entry point. May import `hetkv.models`, and nothing of the simulator.
"""

from __future__ import annotations

from hetkv.costmodel.calibration_file import load_efficiencies
from hetkv.costmodel.catalogue import DTYPE_BYTES, Catalogue, Gpu, load_catalogue
from hetkv.costmodel.efficiency import Efficiencies, Efficiency
from hetkv.costmodel.interface import Estimate, StepModel
from hetkv.costmodel.models import ModelShape, known_models, model_shape
from hetkv.costmodel.request_bytes import RequestBytes
from hetkv.costmodel.step import Placement, RooflineStepModel
from hetkv.errors import InputError

__all__ = [
    "Catalogue",
    "Efficiencies",
    "Efficiency",
    "Estimate",
    "Gpu",
    "ModelShape",
    "Placement",
    "RequestBytes",
    "RooflineStepModel",
    "StepModel",
    "known_models",
    "load_catalogue",
    "load_efficiencies",
    "model_shape",
    "step_model",
]


def step_model(
    gpu: str | Gpu,
    model: str | ModelShape,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    *,
    engine: str = "vllm",
    engine_version: str | None = None,
    weight_dtype: str = "bf16",
    kv_dtype: str | None = None,
    max_batched_tokens: int = 8192,
    memory_share: float = 0.9,
    confidence: float = 0.5,
    hybrid_kv_cache: bool = True,
    catalogue: Catalogue | None = None,
    efficiencies: Efficiencies | None = None,
) -> RooflineStepModel:
    """The step model of one instance.

    `gpu` and `model` are names, or objects of the catalogue; `model` may be the path of a `config.json`. `kv_dtype`
    defaults to bf16. `max_batched_tokens` bounds the tokens of one step (activations, chunk of a pipeline stage);
    `memory_share` is the part of the GPU memory that the engine may use. `confidence` is the probability that measured
    steps take no longer than predicted: 0.5 is the centre, 0.95 the slow end of the 90 % interval. Without
    `hybrid_kv_cache`, layers with a window keep every token. Unknown GPUs, models
    or dtypes, missing figures and models that do not fit raise `InputError`.
    """
    if weight_dtype not in DTYPE_BYTES:
        raise InputError(f"unknown weight dtype {weight_dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if max_batched_tokens < 1:
        raise InputError(f"`max_batched_tokens` must be at least 1, got {max_batched_tokens}")
    catalogue = catalogue or load_catalogue()
    found_gpu = gpu if isinstance(gpu, Gpu) else catalogue.gpu(gpu)
    shape = model if isinstance(model, ModelShape) else model_shape(model)
    known = efficiencies or load_efficiencies()
    efficiency = known.find(found_gpu.name, found_gpu.vendor, engine, engine_version, weight_dtype, shape.name)
    efficiency = efficiency.for_model(shape.name, tp).at(confidence)
    place = Placement(tp, pp, dp)
    return RooflineStepModel(
        found_gpu,
        shape,
        place,
        efficiency,
        weight_dtype,
        kv_dtype or "bf16",
        max_batched_tokens,
        memory_share,
        hybrid_kv_cache,
    )
