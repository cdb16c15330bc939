"""What one sample costs a transformer: the one count of `--dry-run`, of the rates in a log and of benchmarks."""

import torch

from dit.conditioning import Condition
from dit.latte import Latte
from lvdm import cost


def sample_cost(model: Latte, images: int = 0, backward: bool = False, checkpointing: bool = False) -> cost.StepCost:
    """FLOPs and activations of one sample, `images` of joint training behind its frames, with or without `backward`.

    Counted on a twin of `model` on the meta device, which attends by sdpa and is not compiled: the other kernels need a
    device. With `checkpointing`, what the backward pass computes again counts, and is not kept.
    """
    config = model.config
    with torch.device("meta"):
        twin = Latte.from_config(config)
        if checkpointing:
            twin.enable_gradient_checkpointing()
        labels = torch.zeros(1, dtype=torch.int64)
        classes = Condition(labels, labels.expand(1, images) if images else None)
        condition = classes if config.condition == "class" else Condition()
        x, t = torch.empty(1, config.in_channels, config.frames + images, *config.size), torch.zeros(1)
        return cost.forward_cost(lambda: twin(x, t, condition), backward)
