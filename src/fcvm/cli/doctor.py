"""`fcvm doctor`: what this host can do, what is missing, and the command that mends it."""

import argparse
import json
import os
import sys

from fc_agent import structs
from fcvm.cli.context import Context

WHERE = "here"

SCHEMA = 1
COLOURS = {"ok": "\033[32m", "warn": "\033[33m", "fail": "\033[31m"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="an object; docs/setup.md describes the fields")


def run(args: argparse.Namespace, context: Context) -> int:
    from fcvm.setup import checks

    found = list(checks.every(context.config, context.layout))
    works = all(check.status != "fail" for check in found)
    if args.json:
        listed = [structs.asdict(check) for check in found]
        print(json.dumps({"schema": SCHEMA, "ok": works, "checks": listed}, indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        width = max(len(check.name) for check in found)
        for check in found:
            mark = f"{COLOURS[check.status]}{check.status:4}\033[0m" if colour else f"{check.status:4}"
            print(f"{mark}  {check.name:{width}}  {check.detail}")
            if check.hint and check.status != "ok":
                print(f"      {'':{width}}  hint: {check.hint}")
        print("fcvm podman run can work here." if works else "fcvm podman run cannot work here yet.")
    return 0 if works else 1
