"""The signatures of what `import scepsy` offers, pinned in public_api.txt: a change of one is a decision.

`python tests/test_public_api.py > tests/public_api.txt` writes it anew.
"""

import inspect
import sys
from pathlib import Path

import scepsy

PINNED = Path(__file__).with_name("public_api.txt")


def members(name):
    """The callables behind a public name: a function, or a class with its public methods."""
    value = getattr(scepsy, name)
    yield name, value
    if inspect.isclass(value):
        for part, member in sorted(vars(value).items()):
            if not part.startswith("_") and inspect.isfunction(member):
                yield f"{name}.{part}", member


def signatures():
    """One line for each, in order."""
    for name in scepsy.__all__:
        for path, value in members(name):
            # A constructor that is Python's own may differ between its versions.
            own = not inspect.isclass(value) or "__init__" in vars(value)
            yield f"{path}{inspect.signature(value) if own else ''}\n"


def test_signatures_are_pinned():
    assert list(signatures()) == PINNED.read_text().splitlines(keepends=True)


def test_every_parameter_and_result_is_typed():
    for name in scepsy.__all__:
        for path, value in members(name):
            if inspect.isfunction(value):
                signature = inspect.signature(value)
                assert signature.return_annotation is not signature.empty, path
                for parameter in signature.parameters.values():
                    assert parameter.name == "self" or parameter.annotation is not parameter.empty, (
                        f"{path}: {parameter}"
                    )


if __name__ == "__main__":
    sys.stdout.writelines(signatures())
