"""What every command line here shares: flags made from dataclass fields, errors in one sentence, exit codes."""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import NoReturn


class UserError(ValueError):
    """What a user can cause and mend, in one sentence: cause, value, remedy."""


class Flags(argparse.ArgumentParser):
    """A parser whose flags are the fields of dataclasses, with the comment behind each as its help; without one it is
    no flag."""

    def __init__(self, description: str):
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, description=description, formatter_class=layout)

    def add_fields(self, defaults: object) -> None:
        kind = type(defaults)
        source = "".join(inspect.getsource(base) for base in reversed(kind.__mro__) if base is not object)
        comments = dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", source, re.MULTILINE))
        for field in (field for field in fields(kind) if field.name in comments):
            action = {"action": argparse.BooleanOptionalAction} if field.type is bool else {"type": field.type}
            text = f"{comments[field.name]} (default: {getattr(defaults, field.name)})".replace("%", "%%")
            self.add_argument(f"--{field.name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **action)

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        flags, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
            self.error(f"unknown argument {unknown[0]}: " + (f"did you mean {near[0]}?" if near else "see --help"))
        return flags

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def differences(before: dict, now: dict, free: Collection[str] = ()) -> str:
    """The settings in which two dictionaries differ, but for `free` ones, as `name: old, now new`; empty if in none."""
    changed = [name for name in {**before, **now} if name not in free and before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name)}, now {now.get(name)}" for name in changed)


def run(main: Callable[[], None]) -> None:
    """Run a command; what a user can mend, a full disk included, ends in one sentence and exit code 2."""
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
