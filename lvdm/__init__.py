"""The ground floor: configs, registry, video I/O, datasets, latent store, diffusion, metrics, run keeping, reports.

Importing this package imports nothing else, so that the command line answers at once.
"""

__version__ = "0.1.0"
