"""A trained transformer, its VAE and a scheduler as one pipeline folder (`lvdm export`)."""

import shutil
import sys
from pathlib import Path

import dit
import vae
from lvdm.cli import program
from lvdm.errors import UserError
from lvdm.samplers import make_scheduler
from sample.configs import Export
from sample.pipeline import LVDMPipeline, space_of


def run(config: Export) -> Path:
    """Writes what `LVDMPipeline.from_pretrained(config.out)` loads; the folder is replaced as a whole."""
    if not config.out:
        raise UserError("out: expected the folder to write, e.g. out=pipelines/my-model")
    out = Path(config.out)
    if out.exists() and not (out / "model_index.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"out={out}: there is something else already; choose another out")
    transformer, model = dit.load(config.dit), vae.load(config.vae)
    space_of(transformer, model, f"dit={config.dit}", f"vae={config.vae}")
    scheduler = make_scheduler(transformer.config.objective, config.sampler)
    replace(out, LVDMPipeline(model, transformer, scheduler))
    print(f'{out}: transformer, VAE and {type(scheduler).__name__}; LVDMPipeline.from_pretrained("{out}") loads it')
    return out


def replace(out: Path, pipe: LVDMPipeline) -> None:
    """Writes `pipe` to the folder `out`, which at any moment holds all of the old one, all of the new one or, between
    two renames, nothing: then a kill leaves both beside it, and the next export begins by putting the old one back."""
    new, old = (out.with_name(f".{out.name}.{which}") for which in ("new", "old"))
    if old.exists() and not out.exists():
        old.rename(out)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipe.save_pretrained(new)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    """`lvdm export`."""
    return program(Export, argv, run)


if __name__ == "__main__":
    sys.exit(main())
