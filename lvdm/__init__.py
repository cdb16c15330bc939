"""The ground floor: configs, registry, video I/O, datasets, latent store, diffusion, metrics, run keeping, reports.

Importing this package imports nothing else, so that the command line answers at once; the pipeline comes when asked:

    from lvdm import LVDMPipeline
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "LVDMPipeline":
        from lvdm.cli import pipeline

        return pipeline()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
