"""`python -m flash_attn` with doctor, bench, compile and explain."""

import argparse

from flash_attn.cli import bench, compile, doctor, explain


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m flash_attn")
    commands = parser.add_subparsers(metavar="command", required=True)
    for module in (doctor, bench, compile, explain):
        name = module.__name__.rpartition(".")[2]
        summary, _, details = module.__doc__.partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{details}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
