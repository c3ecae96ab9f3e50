"""Score the demo: an answer counts only if it is exactly the wanted command."""

import json


def exact_match(answer: str, expected: str) -> bool:
    """Whether `answer` is JSON with the same value as `expected`.

    Spaces and the order of keys are ignored. Text around the JSON, a missing or extra key, or one
    wrong letter is an error, as it would be for a program that runs the command.
    """
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except json.JSONDecodeError:
        return False
