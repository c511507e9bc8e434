"""Puts a checkpoint's weights and configurations beside the code of this repository, itself a model repository.

    python scripts/ship.py --model outputs/27m [--output-dir .]

Weights are rounded to bfloat16, which halves the file; the configuration has them computed with in float32. Code is
not written: it is the repository's own.
"""

import json
from pathlib import Path

import torch
from transformers.utils import logging

from spaceexploreai.data.files import files_into
from spaceexploreai.pipeline_spaceexplore import add_pipeline
from spaceexploreai.scripts.forecasters import load_whole
from spaceexploreai.tokenization_spaceexplore import SpaceExploreTokenizer
from spaceexploreai.train.arguments import bare_parser, command


def ship(checkpoint: str, folder: Path) -> list[Path]:
    """Writes what `from_pretrained` reads beside the code, each file whole or not at all."""
    model, extractor, tokenizer = load_whole(checkpoint, "cpu")
    tokenizer = tokenizer or SpaceExploreTokenizer()  # so that it loads from the root, whatever head lies there
    with files_into(folder) as temporary:
        add_pipeline(model, temporary)
        model.to(torch.bfloat16).save_pretrained(temporary)
        config = temporary / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
        for part in (extractor, tokenizer):
            part.save_pretrained(temporary)
        for code in temporary.glob("*.py"):
            code.unlink()
        names = sorted(path.name for path in temporary.iterdir())
    return [folder / name for name in names]


@command
def main(argv: list[str] | None = None) -> None:
    parser = bare_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parents[1])
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for path in ship(args.model, args.output_dir):
        print(f"{path.stat().st_size:>12,}  {path}")


if __name__ == "__main__":
    main()
