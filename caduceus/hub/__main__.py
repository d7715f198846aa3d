"""Converts published Caduceus checkpoints to models of this package, and back.

    python -m caduceus.hub export --run RUN_DIR_OR_CHECKPOINT --out DIR
    python -m caduceus.hub import --from FOLDER_OR_FILE --out DIR
    python -m caduceus.hub show FOLDER_OR_FILE

`import` writes `config.yaml` (the `model:` section) and `model.safetensors` (our own names); `export` reads them.
"""

import logging

from caduceus.arguments import Parser
from caduceus.errors import run_command
from caduceus.hub.checkpoint import load_published
from caduceus.hub.folders import load, save_imported, save_published
from caduceus.hub.show import contents

_START = """
Turns a trained model into a published checkpoint, and back. To begin:

  {caduceus-hub} export --run runs/ps-1k --out my-caduceus
  {caduceus-hub} import --from my-caduceus --out weights
  {caduceus-hub} show my-caduceus  # what a folder holds: of a run, an export, or any published checkpoint
"""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(called="caduceus-hub", start=_START, description="Published Caduceus checkpoints, in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a trained model as a published checkpoint")
    export.add_argument("--run", required=True, metavar="RUN_DIR_OR_CHECKPOINT", dest="source")
    export.add_argument(
        "--published-code",
        action="store_true",
        help="refer to the published repository's code instead of including this package's",
    )
    export.add_argument(
        "--published-tokens",
        action="store_true",
        help="for weights of the published training: the tokenizer appends [SEP], and N is a token of its own",
    )
    import_ = commands.add_parser("import", help="convert a published checkpoint to this package's layout")
    import_.add_argument("--from", required=True, metavar="FOLDER_OR_FILE", dest="source")
    show = commands.add_parser("show", help="describe the model in a folder or a file of weights")
    show.add_argument("source", metavar="FOLDER_OR_FILE")
    for command in (export, import_):
        command.add_argument("--out", required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    if options.command == "show":
        told = contents(options.source)
        width = max(map(len, told))
        print("\n".join(f"{name:{width}}  {value}" for name, value in told.items()))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "export":
        model = load(options.source)
        published = {"published_code": options.published_code, "published_tokens": options.published_tokens}
        save_published(model, options.out, options.source, **published)
    else:
        model = load_published(options.source)
        save_imported(model, options.out)
    print(f"{options.out}: {options.command}ed {sum(p.numel() for p in model.parameters()):,} parameters")


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
