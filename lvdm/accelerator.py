"""The one place that makes an Accelerator, with the pitfalls of CPU, gloo and several runs in one process."""

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from lvdm.errors import UserError


def make_accelerator(
    precision: str, accumulate: int = 1, tracker: str = "none", folder: str | None = None, deterministic: bool = False
) -> Any:
    """An Accelerator on CUDA where there is one; works under `accelerate launch` and `torchrun` too.

    TF32 stays off; `deterministic` asks CUDA for repeatable kernels.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    AcceleratorState._reset_state()  # several programs, of different precision, run one after another in a plan
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    cuda = device().type == "cuda"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    # Without a backend named, accelerate runs every CPU process of a DeepSpeed launch as a world of one. The others
    # wait while the main process looks at every video for the first time, which may take hours.
    group = InitProcessGroupKwargs(backend="nccl" if cuda else "gloo", timeout=timedelta(days=1))
    handlers = [group] if several else []
    if not cuda and deepspeed:
        _skip_shared_memory_build()
    try:
        accelerator = Accelerator(
            cpu=several and not cuda and not deepspeed,  # else CPU processes would neither wait nor average gradients
            mixed_precision="no" if precision == "fp32" else precision,
            gradient_accumulation_steps=accumulate,
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(project_dir=folder),
            kwargs_handlers=handlers,
            step_scheduler_with_optimizer=False,
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot start the accelerator (tracker={tracker}, precision={precision}): {error}") from None
    if precision == "fp16" and accelerator.device.type == "cpu":  # where it would silently be fp32
        raise UserError("precision=fp16: needs a GPU; use bf16 or fp32")
    if tracker != "none" and not accelerator.log_with:  # accelerate leaves out what is not installed
        raise UserError(
            f"tracker={tracker}: not installed; pip install {tracker}, or leave it out: log.jsonl is enough"
        )
    return accelerator


def for_training(config: Any) -> Any:
    """The Accelerator that a training config asks for; refuses batches that cannot be shared out, in any phase."""
    accelerator = make_accelerator(
        config.precision, config.accumulate, config.tracker, folder=config.out, deterministic=config.deterministic
    )
    parts = config.accumulate * accelerator.num_processes
    for i, phase in enumerate(config.phases):
        if phase.batch % parts:
            raise UserError(
                f"phases[{i}].batch={phase.batch}: must be divisible by accumulate x processes = "
                f"{config.accumulate} x {accelerator.num_processes}"
            )
    return accelerator


def device() -> torch.device:
    """CUDA where there is one, else the CPU; fp32 means fp32 from then on: torch's default for convolutions is TF32."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mean_over_processes(accelerator: Any, values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over the processes, all of which give the same names."""
    if accelerator.num_processes == 1:
        return values
    means = accelerator.reduce(torch.tensor(list(values.values()), device=accelerator.device), "mean")
    return dict(zip(values, means.tolist(), strict=True))


def close(accelerator: Any) -> None:
    """Ends trackers and the process group; gloo may abort at interpreter exit otherwise."""
    accelerator.end_training()
    sys.stdout.flush()
    sys.stderr.flush()


def threads(count: int, log: Sequence[dict[str, Any]] = ()) -> int:
    """Sets the CPU threads of torch and returns how many there are. Results repeat bitwise at an equal count only, so
    runs record it: 0 takes the count that a run's `log` began with, or else torch's default."""
    count = count or next((record["threads"] for record in log if "threads" in record), 0)
    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def _skip_shared_memory_build() -> None:
    """DeepSpeed would compile a C++ collective for a minute at the first start on a CPU; gloo does the same work."""
    try:
        import deepspeed
    except ImportError:
        raise UserError("this accelerate config asks for DeepSpeed: pip install 'lvdm[deepspeed]'") from None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
