"""Score the demo: an answer counts only when it is exactly the command that was asked for."""

import json


def exact_match(answer: str, expected: str) -> bool:
    """Say whether `answer` is JSON that means the same as `expected`.

    Spaces and the order of keys do not matter.  Text around the JSON, a missing or extra key,
    or one wrong letter does: a program that had to run the command would stumble over it.
    """
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except json.JSONDecodeError:
        return False
