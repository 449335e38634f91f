"""Reads jsonargparse's message about a setting that it does not accept.

If a setting may be of several types, the message is an indented tree of all types that were tried. The fault is the
failure of the type that got furthest: a class whose argument is wrong was meant to be that class, and not null.
"""

import re
import textwrap
from dataclasses import dataclass, replace

_KEY = re.compile(r'Parser key "([^"]+)"(?: element \d+)?:[ ]?\n?')
_CLASS = re.compile(r"Problem with given class_path '([^']*)':[ ]?\n?")
_CALLABLE = re.compile(r"Type (.+?) expects a function or a callable class: ")
_UNION = "Does not validate against any of the Union subtypes\n"
_PATH = "- Expected a path but "
_GOT = ". Got value: "
_MISMATCH = re.compile(
    r"Expected an? <class '(?P<type>[^']+)'>|Expected a typing.Literal\[(?P<values>.+)\]|"
    r"Not a valid subclass of (?P<base>\w+)|Expected a member of <enum '[^']+'>: (?P<members>.+)|"
    r"Not of type (?P<other>\w+)|(?P<spec>Expected an import path or a subclass spec)"
)
_NAME = "Expected a dot import path string: "
_CLASS_PATH = re.compile(r"^(?:Namespace\(|\{'?|NestedArg\().*?\bclass_path'?[=:] ?'([^']+)'", re.DOTALL)
_NESTED = re.compile(r"^NestedArg\(key='[^']*', val='?(.*?)'?\)$", re.DOTALL)
_NUMBERS = {"int", "float"}


@dataclass(frozen=True)
class Fault:
    """What is wrong with one setting.

    Args:
        keys: The keys that lead to the setting.
        reason: Why the value is refused; empty if its type is not accepted.
        kinds: The accepted types, as YAML writes them, if the value is of another type.
        value: The value.
        owner: Class path of the class whose setting it is, or that is the value.
        types: The accepted types, as ``typing`` writes them.
        is_part: Whether the value stands in a list or a mapping that was given.
    """

    keys: tuple[str, ...] = ()
    reason: str = ""
    kinds: tuple[str, ...] = ()
    value: str = ""
    owner: str = ""
    types: str = ""
    is_part: bool = False

    @property
    def given(self) -> str:
        """The value; for a class, its path."""
        if match := _CLASS_PATH.match(self.value):
            return match[1]
        return match[1] if (match := _NESTED.match(self.value)) else self.value

    @property
    def class_name(self) -> str | None:
        """The name, if the fault is that there is no class of this name."""
        return self.reason.removeprefix(_NAME) if self.reason.startswith(_NAME) else None


def read_fault(text: str, within: Fault = Fault()) -> Fault:
    r"""Read a message of jsonargparse, or a part of one.

    Args:
        text: The message.
        within: The fault as far as the outer parts of the message tell it.

    Example:
        >>> fault = read_fault('Parser key "lr":\n  Expected a <class \'float\'>. Got value: fast')
        >>> fault.keys, fault.kinds, fault.value
        (('lr',), ('float',), 'fast')
    """
    text = textwrap.dedent(text).strip("\n")
    if text.startswith(_PATH):  # jsonargparse says so of every text that is not the name of a file
        text = text.partition("\n")[2].removeprefix("- ")
    if match := _KEY.match(text):
        return read_fault(text[match.end() :], replace(within, keys=(*within.keys, match[1]), types=""))
    if match := _CLASS.match(text):
        return read_fault(text[match.end() :], replace(within, owner=match[1], value=within.value or match[1]))
    if match := _CALLABLE.match(text):
        inner, got, value = text[match.end() :].rpartition(_GOT)
        refined = replace(within, types=match[1], value=value) if got else replace(within, types=match[1])
        owner = refined.given if _CLASS_PATH.match(refined.value) else within.owner
        return read_fault(inner if got else value, replace(refined, owner=owner))
    if text.startswith(_UNION):
        return _furthest(text, within)
    reason, _, value = text.partition(_GOT)
    reason, fault = reason.strip(), replace(within, value=value.partition("\nSubclass types expect")[0] or within.value)
    if match := _MISMATCH.match(reason):
        return replace(fault, kinds=(_kind(match),))
    return replace(fault, reason=" ".join(reason.split()))


def _furthest(text: str, within: Fault) -> Fault:
    """Return the fault of the type that was meant, of several; or the fault that the value is of none of them."""
    types, _, details = text.removeprefix(f"{_UNION}Subtypes: ").partition("\nErrors:\n")
    errors, *given = re.split(r"^Given value type: .*\nGiven value: ", details, maxsplit=1, flags=re.M)
    value = given[0] if given else within.value
    within = replace(within, types=types, value=value)
    tried = [
        read_fault(re.sub(r"^ {4}", "", item, flags=re.M), within)
        for item in re.split(r"^  - ", errors, flags=re.M)[1:]
    ]
    kinds = tuple(dict.fromkeys(kind for fault in tried for kind in fault.kinds))
    best = max(tried, key=lambda fault: _progress(fault, within), default=within)
    # A word where a number may be given is meant as one, and not as the name of a class.
    is_word = best.class_name is not None and not _CLASS_PATH.match(value)
    if len(best.keys) == len(within.keys) and (best.kinds or (is_word and _NUMBERS & {*kinds})):
        return replace(best, is_part=True) if best.value != value else replace(within, kinds=kinds)
    return best


def _progress(fault: Fault, within: Fault) -> int:
    if len(fault.keys) > len(within.keys):
        return 4
    if fault.owner != within.owner:
        return 3
    if fault.kinds:
        return int(fault.value != within.value)
    return 1 if fault.class_name is not None else 2


def _kind(expected: re.Match[str]) -> str:
    """Return the type that a setting should have, as YAML writes it."""
    if expected["spec"]:
        return "a class or a function (class_path and init_args)"
    if values := expected["values"] or expected["members"]:
        return f"one of {values}"
    if base := expected["base"]:
        return f"a {base} (class_path and init_args)"
    name = expected["other"] or expected["type"].rpartition(".")[2]
    return {"NoneType": "null", "Iterable": "list"}.get(name, name)
