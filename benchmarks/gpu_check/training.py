"""The trainer: needs torch, transformers and deepspeed, neither Ray nor vLLM."""

import copy
import gc
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.gpu_check.check import CheckFailed, Setting, at_most
from rlhf_ray.config import training as config
from rlhf_ray.config.roles import Level
from rlhf_ray.models.heads import load_causal, load_config
from rlhf_ray.models.packed import PackedSequences
from rlhf_ray.models.role_models import CausalModel
from rlhf_ray.models.weights import model_weights
from rlhf_ray.platform import platform, synchronize

if TYPE_CHECKING:  # DeepSpeed takes seconds to import, and has to be told of the device before
    from rlhf_ray.engines.training import TrainingEngine

LORA = config.Lora(rank=8, alpha=64.0)
_OPTIMIZER = config.Optimizer(lr=1e-3, eps=1e-5)
_LENGTHS = (5, 17, 60, 33)
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
Weights = dict[str, torch.Tensor]


def steps(
    setting: Setting, *, stage: int, dtype: config.Dtype = "bfloat16", adapters: config.Lora | None = None
) -> str:
    """Two optimizer steps of a ZeRO stage, against plain torch in float32: number for number where they are in float32
    too, else by the size of the gradients and the direction of the steps."""
    engine, plain = _engine(setting, stage, dtype, adapters), _model(setting, "float32", adapters)
    start = whole_weights(plain)
    norms, mine = _train(engine, 2), whole_weights(engine.model)
    plain_norms, wanted = _train_plainly(plain.to(platform().device))
    if dtype == "float32":
        worst = max(float((mine[name] - wanted[name]).abs().max()) for name in wanted)
        return at_most("largest difference", worst, 2e-5)
    by_norm = max(abs(a / b - 1) for a, b in zip(norms, plain_norms, strict=True))
    step, theirs = (torch.cat([(w[n] - start[n]).ravel() for n in start]) for w in (mine, wanted))
    apart = 1 - float(torch.nn.functional.cosine_similarity(step, theirs, dim=0))
    return f"{at_most('gradient norm off by', by_norm, 0.05)}; {at_most('direction off by', apart, 0.1)}"


def nf4(setting: Setting) -> str:
    """Adapters beside weights of 4 bits: a step, and the way to host memory and back."""
    engine = _engine(setting, 2, "bfloat16", config.Lora(rank=8, base="nf4"))
    _train(engine, 1)
    before = _logprobs(engine)
    engine.move(Level.OUT)
    engine.move(Level.FULL)
    _check_unchanged(engine, before)
    whole = load_causal(str(setting.tiny), dtype=torch.bfloat16, vocab_chunk_tokens=64).to(platform().device)
    return at_most("mean gap to whole weights, nats", float((_logprobs(whole) - before).abs().mean()), 0.5)


def moves(setting: Setting, *, stage: int, adapters: config.Lora | None = None) -> str:
    """What a trainer frees when it leaves its device, and that it comes back as it was."""
    engine = _engine(setting, stage, "bfloat16", adapters, setting.large)
    if not setting.on_gpu:
        from rlhf_ray.engines.host_copies import HostCopies

        engine._states._host = HostCopies(apart=True)  # copies are made as where a device has its own memory
    _train(engine, 1)
    before = _logprobs(engine)
    gc.collect()
    held = _allocated()
    out = _seconds(partial(engine.move, Level.OUT))
    freed = held - _allocated()
    first_back = _seconds(partial(engine.move, Level.FULL))
    again = [_seconds(partial(engine.move, level)) for level in (Level.OUT, Level.FULL)]
    _check_unchanged(engine, before)
    _train(engine, 1)
    times = f"out {out:.2f} s, back {first_back:.2f} s, then {again[0]:.2f} and {again[1]:.2f} s"
    figure = _planned_bytes(setting, stage, adapters)
    if not setting.on_gpu:
        return f"numbers as before; {times}; bytes are not measured on a CPU (planned for a GPU: {figure / 1e6:.1f} MB)"
    if not 0.9 <= freed / figure <= 1.1:
        raise CheckFailed(f"{freed / 1e9:.2f} GB were freed, the planner says {figure / 1e9:.2f}")
    return f"{freed / 1e9:.2f} GB freed, {freed / figure:.2f} of the planner's; {times}"


def utilisation(setting: Setting) -> str:
    """Model FLOPs of an update, per second and as a share of the best matrix product's."""
    engine = _engine(setting, 2, "bfloat16", None, setting.large)
    shape = load_config(str(setting.large))
    length, count = (1024, 8) if setting.on_gpu else (64, 2)
    texts = [np.random.default_rng(n).integers(3, shape.vocab_size, length).astype(np.int32) for n in range(count)]
    parameters = sum(weight.parameter.numel() for weight in model_weights(engine.model))
    attention = 6 * shape.num_hidden_layers * shape.hidden_size * length  # of a token, half of the square being masked
    flops = count * length * (6 * parameters + attention)
    seconds = min(_seconds(partial(_train, engine, 1, [texts])) for _ in range(3))
    size = 8192 if setting.on_gpu else 1024
    a, b = (torch.randn(size, size, device=platform().device).bfloat16() for _ in range(2))
    peak = 2 * size**3 / min(_seconds(partial(torch.mm, a, b)) for _ in range(5))
    return (
        f"{flops / seconds / 1e12:.3g} TFLOP/s, {flops / seconds / peak:.2f} of the best product's "
        f"{peak / 1e12:.3g} ({parameters / 1e6:.0f}M parameters, {count} x {length} tokens)"
    )


def _planned_bytes(setting: Setting, stage: int, adapters: config.Lora | None) -> int:
    """What the planner counts as gone when a trainer has left a GPU."""
    from rlhf_ray.config.placement import RolePlacement
    from rlhf_ray.config.roles import StepShape
    from rlhf_ray.models.config_json import read_shape
    from rlhf_ray.planner.role_memory import trained_items
    from rlhf_ray.planner.workload import TrainedRole

    role = TrainedRole(
        name="policy",
        kind="causal",
        section="policy",
        model=None,
        shape=read_shape(str(setting.large)),
        engine=_config(stage, "bfloat16"),
        lora=adapters,
        placed_as="policy",
        placement=RolePlacement(),
        ranks=1,
        step=StepShape(samples=1, prompt=0, response=64),
    )
    items = trained_items(role, cpu=False)
    return sum(
        item.size for item in items if item.location == "device" and item.moments is None and item.level > Level.OUT
    )


def _config(stage: int, dtype: config.Dtype) -> config.TrainingEngine:
    return config.TrainingEngine.model_validate({"zero_stage": stage, "dtype": dtype, "gradient_clip": 0.5})


def _model(
    setting: Setting,
    dtype: config.Dtype,
    adapters: config.Lora | None,
    folder: Path | None = None,
    *,
    sharded: bool = False,
) -> CausalModel:
    torch.manual_seed(5)  # of the adapters
    source = str(folder or setting.tiny)
    return load_causal(source, dtype=_DTYPES[dtype], vocab_chunk_tokens=64, lora=adapters, sharded=sharded)


def _engine(
    setting: Setting, stage: int, dtype: config.Dtype, adapters: config.Lora | None, folder: Path | None = None
) -> "TrainingEngine":
    from rlhf_ray.engines.collectives import Rendezvous, join_collectives
    from rlhf_ray.engines.training import TrainingEngine

    gc.collect()
    if not dist.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        join_collectives(Rendezvous(0, 1, "127.0.0.1", port, 60.0))
    model = _model(setting, dtype, adapters, folder, sharded=stage == 3)
    return TrainingEngine(model, _config(stage, dtype), _OPTIMIZER, total_steps=10)


def _texts() -> list[np.ndarray]:
    return [np.random.default_rng(length).integers(3, 500, length).astype(np.int32) for length in _LENGTHS]


def _loss(model: Callable[..., Any], texts: list[np.ndarray], tokens: int) -> torch.Tensor:
    logprobs, entropy = _forward(model, texts)
    return -(logprobs.sum() + 0.01 * entropy.sum()) / tokens


def _forward(model: Callable[..., Any], texts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    packed = PackedSequences.of(texts, platform().device)
    ends = np.cumsum([len(text) for text in texts])
    positions = torch.from_numpy(np.setdiff1d(np.arange(ends[-1]), ends - 1)).to(platform().device)
    out: tuple[torch.Tensor, torch.Tensor] = model(packed, positions, packed.input_ids[0][positions + 1], 1.0)
    return out


@torch.no_grad()
def _logprobs(model: Callable[..., Any]) -> torch.Tensor:
    return _forward(model, _texts())[0].float()


def _check_unchanged(engine: "TrainingEngine", before: torch.Tensor) -> None:
    if not torch.equal(before, _logprobs(engine)):
        raise CheckFailed("log-probs after a move are not those before")


def _train(engine: "TrainingEngine", steps: int, micro_batches: list[list[np.ndarray]] | None = None) -> list[float]:
    micro_batches = micro_batches or [_texts()[:2], _texts()[2:]]
    tokens = sum(len(text) - 1 for texts in micro_batches for text in texts)
    norms = []
    for _ in range(steps):
        for number, texts in enumerate(micro_batches):
            engine.backward(_loss(engine, texts, tokens), last=number == len(micro_batches) - 1)
        norms.append(engine.step().grad_norm)
    return norms


def _train_plainly(model: CausalModel) -> tuple[list[float], Weights]:
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(
        learnt, lr=_OPTIMIZER.lr, betas=_OPTIMIZER.betas, eps=_OPTIMIZER.eps, weight_decay=_OPTIMIZER.weight_decay
    )
    norms = []
    for _ in range(2):
        adam.zero_grad()
        _loss(model, _texts(), sum(_LENGTHS) - len(_LENGTHS)).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learnt, 0.5)))
        adam.step()
    return norms, whole_weights(model)


def whole_weights(model: torch.nn.Module) -> Weights:
    """In float32, on the host."""
    from rlhf_ray.engines.training import full_weights

    return {name: copy.deepcopy(weight.detach()).float().cpu() for name, weight in full_weights(model, 2**24)}


def _allocated() -> int:
    return torch.cuda.memory_allocated() if platform().device.type == "cuda" else 0


def _seconds(work: Callable[[], object]) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began
