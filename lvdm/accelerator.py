"""The one place that makes an Accelerator, with the pitfalls of CPU, gloo, DeepSpeed and several runs a process."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch

from lvdm.conv_check import bf16_problem
from lvdm.errors import UserError

T, U = TypeVar("T"), TypeVar("U")


def make_accelerator(
    precision: str,
    accumulate: int = 1,
    tracker: str = "none",
    folder: str | None = None,
    deterministic: bool = False,
    tf32: bool = False,
) -> Any:
    """An Accelerator on CUDA where there is one; works under `accelerate launch` and `torchrun` too.

    `deterministic` asks CUDA for repeatable kernels, `tf32` lets it round the factors of fp32 products.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

    AcceleratorState._reset_state()  # several programs, of different precision, run one after another in a plan
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    cuda = device(tf32).type == "cuda"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    first = not torch.distributed.is_initialized()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    # Without a backend named, accelerate runs every CPU process of a DeepSpeed launch as a world of one. The others
    # wait while the main process looks at every video for the first time, which may take hours.
    group = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=timedelta(days=1))
    handlers = [group] if several else []
    if deepspeed:
        _tame_deepspeed(cuda)
    try:
        accelerator = Accelerator(
            cpu=several and not cuda and not deepspeed,  # else CPU processes would neither wait nor average gradients
            mixed_precision="no" if precision == "fp32" else precision,
            # As a plugin: a plain number would give way to what the launcher put in the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False),
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(project_dir=folder),
            kwargs_handlers=handlers,
            step_scheduler_with_optimizer=False,
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot start the accelerator (tracker={tracker}, precision={precision}): {error}") from None
    accelerator.first = first  # of a plan that runs several; what it opened stays open for the others
    if precision == "fp16" and accelerator.device.type == "cpu":  # where it would silently be fp32
        raise UserError("precision=fp16: needs a GPU; use bf16 or fp32")
    if precision == "bf16" and (problem := bf16_problem(accelerator.device)):
        raise UserError(f"precision=bf16: {problem}; install a torch with cuDNN 9.15 or later, or take precision=fp32")
    if tracker != "none" and not accelerator.log_with:  # accelerate leaves out what is not installed
        raise UserError(
            f"tracker={tracker}: not installed; pip install {tracker}, or leave it out: log.jsonl is enough"
        )
    return accelerator


def for_training(config: Any) -> Any:
    """The Accelerator that a training config asks for; refuses batches that cannot be shared out, in any phase."""
    accelerator = make_accelerator(
        config.precision, config.accumulate, config.tracker, config.out, config.deterministic, config.tf32
    )
    parts = config.accumulate * accelerator.num_processes
    for i, phase in enumerate(config.phases):
        if phase.batch % parts:
            raise UserError(
                f"phases[{i}].batch={phase.batch}: must be divisible by accumulate x processes = "
                f"{config.accumulate} x {accelerator.num_processes}"
            )
    if uses_zero(accelerator):
        _configure_zero(accelerator, config)
    return accelerator


def uses_zero(accelerator: Any) -> bool:
    """Whether DeepSpeed divides gradients and optimizer state over the processes."""
    return accelerator.distributed_type == "DEEPSPEED"


def engine(accelerator: Any) -> str:
    """Which checkpoints this launch reads and writes: "zero2 x 8" (as many shards as processes), or "plain"."""
    return f"zero2 x {accelerator.num_processes}" if uses_zero(accelerator) else "plain"


def check_engine(accelerator: Any, log: Sequence[dict[str, Any]], latest: int) -> None:
    """A UserError where the last checkpoint of a run, at `latest` samples, was written by another engine."""
    wrote = next((record["engine"] for record in reversed(log) if "engine" in record), None)
    if latest and wrote != engine(accelerator):
        raise UserError(
            f"the checkpoint at {latest} samples was written under {wrote}, and this launch is {engine(accelerator)}:"
            " go on as it was begun, or begin another run with init= this one's export"
        )


def descend(accelerator: Any, model: Any, optimizer: Any, loss: torch.Tensor, clip: float = math.inf) -> float | None:
    """The backward pass of a micro-batch and, with the last one of a step, the step.

    Gradients are clipped to the norm `clip`. Returns their norm before that, or None where no step was due. A step
    whose norm is not finite is left out (with fp16 that belongs to finding the loss scale).
    """
    if uses_zero(accelerator):  # its engine clips and steps within the backward pass
        optimizer.optimizer.clip_grad = clip if math.isfinite(clip) else 0.0
        accelerator.backward(loss)
        return float(accelerator.clip_grad_norm_(None, clip)) if accelerator.sync_gradients else None
    accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), clip)) if accelerator.sync_gradients else None
    if norm is None or math.isfinite(norm) or accelerator.scaler is not None:
        optimizer.step()
    optimizer.zero_grad()
    return norm


def device(tf32: bool = False) -> torch.device:
    """CUDA where there is one, else the CPU. From then on fp32 means fp32, or TF32 if asked for: torch's own default is
    TF32 in convolutions and fp32 in matrix products."""
    for products in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
        products.fp32_precision = "tf32" if tf32 else "ieee"
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def callable_of(accelerator: Any, model: Any) -> Any:
    """What to call where gradients are also taken of parts of the output: a DeepSpeed engine would end its step there,
    so the module within it."""
    return model.module if uses_zero(accelerator) else model


def autocast(accelerator: Any) -> torch.autocast:
    """The accelerator's precision, under DeepSpeed too, whose engine casts only what goes through it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return torch.autocast(accelerator.device.type, dtype, enabled=dtype is not None)


def native_precision(device: torch.device) -> str:
    """bf16 where `device` computes in it, and rightly, else fp32: elsewhere it would be slower."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False) and not bf16_problem(device)
        return "bf16" if able else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def average_gradients(accelerator: Any, parameters: Sequence[torch.Tensor]) -> None:
    """Gives all processes the mean of their gradients, of a network that no engine wraps."""
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in parameters]
    means = accelerator.reduce(torch.cat([grad.flatten() for grad in gradients]), "mean")
    for grad, mean in zip(gradients, means.split([grad.numel() for grad in gradients]), strict=True):
        grad.copy_(mean.view_as(grad))


def close(accelerator: Any) -> None:
    """Ends trackers and the process group, where this is the accelerator that began it; gloo may abort at interpreter
    exit otherwise."""
    if accelerator.first:
        accelerator.end_training()
    else:
        for tracker in accelerator.trackers:
            tracker.finish()
    sys.stdout.flush()
    sys.stderr.flush()


def agreed(value: Any) -> Any:
    """`value` as the first process of a launch has it, in all of them, once all are here."""
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    torch.distributed.barrier()
    return values[0]


def is_main() -> bool:
    """Whether this process speaks for all of a launch."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def world_size() -> int:
    """Processes of this launch."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that are this process's."""
    world = world_size()
    return items[torch.distributed.get_rank() :: world] if world > 1 else items


def spread(items: Sequence[T], work: Callable[[T], U]) -> list[U]:
    """`work` of every item in order, shared out to the processes of a launch; each gets all results."""
    world, done = world_size(), [work(item) for item in share(items)]
    if world == 1:
        return done
    parts: list = [None] * world
    torch.distributed.all_gather_object(parts, done)
    return [parts[i % world][i // world] for i in range(len(items))]


def threads(count: int, log: Sequence[dict[str, Any]] = ()) -> int:
    """Sets the CPU threads of torch and returns how many there are. Results repeat bitwise at an equal count only, so
    runs record it: 0 takes the count that a run's `log` began with, or else torch's default."""
    count = count or next((record["threads"] for record in log if "threads" in record), 0)
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def leave(code: int) -> None:
    """Ends this process, which a launcher started, with an exit code: gloo's threads may abort a Python that shuts down
    in the usual way, after all work is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


def _configure_zero(accelerator: Any, config: Any) -> None:
    """All numbers of the engine, explicit: what accelerate calls "auto" changes with the model, or clips at 1."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage != 2:
        raise UserError(
            f"this accelerate config asks for ZeRO stage {plugin.zero_stage}: expected zero_stage: 2, as in"
            " configs/accelerate/zero2.yaml"
        )
    batch = config.phases[0].batch
    numbers = plugin.deepspeed_config
    numbers["zero_optimization"] |= {
        "overlap_comm": accelerator.device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": 200_000_000,
        "allgather_bucket_size": 200_000_000,
    }
    numbers |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": batch // (config.accumulate * accelerator.num_processes),
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.clip,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if numbers["bf16"]["enabled"]:
        numbers["bf16"]["check_grad_overflow"] = True


def _tame_deepspeed(cuda: bool) -> None:
    """No lines about every phase of its start and, on a CPU, no C++ collective compiled for a minute: gloo does."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("this accelerate config asks for DeepSpeed: pip install 'lvdm[deepspeed]'") from None
    deepspeed.utils.logger.setLevel("WARNING")
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
