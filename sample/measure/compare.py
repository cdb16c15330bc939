"""VAEs or generators side by side on the same clips (`lvdm compare A B ...`)."""

import sys
from pathlib import Path

from lvdm.cli import program
from lvdm.data.datasets import VIDEOS
from lvdm.data.frames import SUFFIXES
from lvdm.errors import UserError
from sample.measure import compare_generators, compare_vaes
from sample.measure.configs import Compare


def run(config: Compare) -> Path:
    """Writes index.html and results.json to `config.out` and prints the numbers; a UserError for mixed kinds."""
    if len(config.models) < 2:
        raise UserError(f"models={','.join(config.models)}: expected two or more, e.g. lvdm compare runs/a runs/b")
    generators = [spec for spec in config.models if is_generator(spec)]
    vaes = [spec for spec in config.models if spec not in generators]
    if generators and vaes:
        raise UserError(f"{vaes[0]} is no folder of videos, {generators[0]} is one: compare VAEs, or generators")
    return (compare_generators if generators else compare_vaes).run(config)


def is_generator(spec: str) -> bool:
    """Whether it is a folder of videos (what lvdm sample wrote, or any other) and no trained model."""
    folder = Path(spec)
    if not folder.is_dir() or any((folder / f"{place}config.json").is_file() for place in ("", "export/", "vae/")):
        return False
    return (folder / "samples.jsonl").is_file() or any(
        path.suffix.lower() in (*VIDEOS, *SUFFIXES) for path in folder.rglob("*")
    )


def main(argv: list[str] | None = None) -> int:
    """`lvdm compare`."""
    return program(Compare, argv, run)


if __name__ == "__main__":
    sys.exit(main())
